"""Speed and resident memory of the quantiser, for each type of file that it makes.

The source is one block of Wan 1.3B in bfloat16, random and of the right scale, so that every mix has its part; what
lies around the blocks is hardly ever quantised and left out. Each type is made in a process of its own. Part of
``python benchmarks/run.py``.
"""

from __future__ import annotations

import tempfile
import time
from math import prod
from pathlib import Path

from measure import PeakMemory, Row, in_own_process, main

TYPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K", "Q5_0", "Q4_0", "IQ4_XS")
SMALL_TYPES = ("Q5_K_M", "Q4_0")
WEIGHTS_14B = 14_288_491_584


def write_source(path: Path, small: bool) -> None:
    """One block of Wan 1.3B (46 million weights); small: one of width 256."""
    from dataclasses import replace

    import torch
    from small_models import SIZES, SMALL, wan_tensors
    from small_models.weights import random_weight, wan_statistics, write_safetensors

    shape = replace(SMALL if small else SIZES["1.3b"], layers=1)
    weights = [
        random_weight(name, dims, "BF16", wan_statistics(name, dims), 0)
        for name, dims in wan_tensors(shape).items()
        if name.startswith(("blocks.", "head."))
    ]
    write_safetensors(path, {weight.name: weight.decoded(torch.bfloat16) for weight in weights})


def measure(type_name: str, source_name: str) -> Row:
    """Quantise a file and delete the result."""
    from _pack import load_pack

    load_pack()
    import torch
    from apple_silicon_video.quantization.quantizer_files import default_threads, quantize_file
    from apple_silicon_video.quantization.quantizer_sources import open_source

    source = Path(source_name)
    torch.set_num_threads(1)  # as scripts/gguf.py does: the quantiser's own threads are the parallel part
    weights = sum(prod(tensor.shape) for tensor in open_source(source).tensors.values())
    destination = source.with_suffix(".gguf")
    with PeakMemory() as memory:
        begin = time.perf_counter()
        report = quantize_file(source, destination, type_name)
        seconds = time.perf_counter() - begin
    destination.unlink()
    return {
        "weights": weights,
        "threads": default_threads(),
        "seconds": seconds,
        "bits_per_weight": report.bits_per_weight,
        "resident_bytes": memory.peak,
    }


def run(small: bool = False) -> list[Row]:
    """A row per type: ``resident_bytes`` are the whole process', ``minutes_14b`` what a Wan 14B would take."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source.safetensors"
        write_source(source, small)
        for type_name in SMALL_TYPES if small else TYPES:
            row = in_own_process(__file__, type_name, source)
            speed = row["weights"] / row["seconds"]
            rows.append(
                {"type": type_name, **row, "weights_per_second": speed, "minutes_14b": WEIGHTS_14B / speed / 60}
            )
    return rows


if __name__ == "__main__":
    main(measure, run)
