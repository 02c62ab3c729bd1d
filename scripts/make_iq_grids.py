"""Write quantization/data/iq_grids.npz: the codebooks of ggml's IQ1, IQ2 and IQ3 types.

The codebooks are fixed tables of the file format; gguf-py carries them packed in hexadecimal. This script unpacks
them once, at development time, so that the pack needs no gguf-py at run time. The result is byte for byte
reproducible: ``python scripts/make_iq_grids.py`` and then ``git diff --stat`` shows nothing.
"""

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.pop(0)  # this folder has a gguf.py of its own, which would hide gguf-py
from gguf import quants

TARGET = Path(__file__).resolve().parents[1] / "quantization" / "data" / "iq_grids.npz"
NAMES = ("IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")


def grid(name: str) -> np.ndarray:
    """Return one codebook as int8, shape (entries, weights per entry)."""
    quant = getattr(quants, name)
    quant.init_grid()
    return quant.grid.reshape(quant.grid_shape).astype(np.int8)


def main() -> None:
    temporary = TARGET.with_suffix(".tmp.npz")
    grids: dict[str, Any] = {name: grid(name) for name in NAMES}
    np.savez_compressed(temporary, **grids)
    os.replace(temporary, TARGET)
    print(f"{TARGET.name}: {TARGET.stat().st_size} bytes")


if __name__ == "__main__":
    main()
