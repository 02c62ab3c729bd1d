"""Makes tests/data/plan_table.json: what sampling stages take on the simulated device, for the planner to be held to.

    python tests/simulated_mps/plan_table.py [--torch 2.13] [--held-out]

Each torch version has a process of its own; a combination takes a few seconds (inside/plan_measure.py). With --torch
only that version is measured anew and the other rows stay. --held-out makes tests/data/plan_held_out.json instead: the
planner's constants are fitted to the first table, and never to the second.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
TABLE = TESTS / "data" / "plan_table.json"
HELD_OUT_TABLE = TESTS / "data" / "plan_held_out.json"


@dataclass(frozen=True)
class Combination:
    """A variant of small_models, a recipe, a size; cfg "none", "apart" or "batched"; LoRA rank, 0 for none."""

    torch: str
    variant: str
    recipe: str
    width: int
    height: int
    frames: int
    cfg: str = "none"
    lora_rank: int = 0


T13, T14, I14 = "wan2.1-t2v-1.3b", "wan2.1-t2v-14b", "wan2.1-i2v-14b"
T22, I22, FIVE = "wan2.2-t2v-a14b-high", "wan2.2-i2v-a14b-high", "wan2.2-ti2v-5b"
VACE = "wan2.1-vace-1.3b"
SD, HD, HD5, TINY = (832, 480), (1280, 720), (1280, 704), (480, 272)

EVERYWHERE = (
    (T13, "Q5_K_M", *SD, 81, "apart", 0),
    (T13, "Q8_0", *SD, 33, "batched", 0),
    (T14, "Q3_K_M", *SD, 81, "none", 0),
    (T22, "Q4_K_M", *SD, 49, "none", 64),
    (I22, "Q3_K_M", *SD, 81, "apart", 0),
    (I22, "Q5_K_M", *SD, 49, "none", 64),
    (FIVE, "Q4_K_M", *HD5, 81, "apart", 0),
    (FIVE, "Q8_0", *HD5, 121, "apart", 0),
)
MORE = (
    (T13, "Q2_K", *TINY, 33, "batched", 0),
    (T13, "F16", *SD, 121, "none", 0),
    (T13, "Q8_0", *SD, 81, "none", 32),
    (T14, "Q2_K", *TINY, 17, "none", 0),
    (T14, "Q8_0", *TINY, 81, "batched", 0),
    (T14, "Q5_K_M", *TINY, 33, "apart", 64),
    (I14, "Q4_0", *SD, 81, "apart", 0),
    (FIVE, "Q5_K_M", 960, 544, 81, "batched", 0),
    (FIVE, "Q8_0", 640, 352, 49, "none", 64),
    (VACE, "Q8_0", *SD, 81, "apart", 0),
)
PREFILL = (
    (T14, "Q4_K_M", *HD, 81, "none", 0),
    (T22, "Q5_K_M", *HD, 81, "none", 64),
    (T22, "Q8_0", *HD, 81, "apart", 0),
    (I22, "Q8_0", *HD, 121, "apart", 0),
    (T14, "Q6_K", *SD, 81, "batched", 0),
    (I22, "Q4_K_S", *SD, 81, "batched", 64),
    (T14, "Q4_K_M", 1920, 1088, 33, "none", 0),
)
FP8 = ((T13, "F8_E4M3", *SD, 81, "apart", 0), (I22, "F8_E4M3", *SD, 49, "none", 0))
ROWS: dict[str, tuple[tuple[str, str, int, int, int, str, int], ...]] = {
    "2.8": EVERYWHERE,
    "2.10": EVERYWHERE + MORE + FP8,
    "2.13": EVERYWHERE + MORE + PREFILL + FP8,
    "2.15": EVERYWHERE + MORE + PREFILL[:3],
}
"""By torch version; HD without prefill kernels is left out, where one block alone is 64,000 operations."""


HELD_OUT: dict[str, tuple[tuple[str, str, int, int, int, str, int], ...]] = {
    "2.8": (
        (T14, "Q5_0", 640, 384, 21, "apart", 0),
        (I22, "Q4_1", 624, 624, 65, "none", 32),
    ),
    "2.10": (
        (T13, "IQ4_XS", 1024, 576, 65, "apart", 0),
        (T22, "Q6_K", 640, 384, 97, "none", 64),
        (FIVE, "Q5_0", 1024, 576, 97, "batched", 0),
        (T13, "IQ4_NL", 544, 544, 109, "batched", 0),
    ),
    "2.13": (
        (T14, "Q4_1", 624, 624, 97, "batched", 0),
        (I14, "IQ4_XS", 1024, 576, 21, "apart", 32),
        (T13, "Q6_K", 640, 384, 65, "none", 128),
        (VACE, "Q5_0", 624, 624, 21, "batched", 0),
        (I22, "Q2_K", 640, 384, 97, "apart", 64),
        (FIVE, "Q4_1", 640, 384, 65, "apart", 32),
        (T13, "Q5_1", 704, 400, 37, "none", 64),
        (T14, "IQ4_NL", 704, 400, 37, "apart", 16),
        (T13, "Q4_1", 768, 432, 53, "apart", 16),
    ),
    "2.15": (
        (T22, "IQ4_XS", 1024, 576, 65, "apart", 0),
        (I22, "Q5_0", 624, 624, 21, "batched", 0),
        (T13, "Q4_1", 1024, 576, 97, "none", 0),
        (FIVE, "Q6_K", 1024, 576, 21, "none", 0),
    ),
}
"""Sizes, lengths, LoRA ranks and quantisations that ROWS does not have."""

SETS = {False: (ROWS, TABLE), True: (HELD_OUT, HELD_OUT_TABLE)}
"""Held out or not -> the rows and their file."""


def combinations(torch_version: str, held_out: bool = False) -> Iterator[Combination]:
    return (Combination(torch_version, *row) for row in SETS[held_out][0][torch_version])


def _measure_here(torch_version: str, held_out: bool) -> None:
    """In a process of its own: prints one JSON object per row."""
    sys.path[:0] = [str(TESTS), str(TESTS.parent / "scripts"), str(Path(__file__).with_name("inside"))]
    os.environ["SIMULATED_TORCH"] = torch_version
    import torch

    from simulated_mps.environment import install_from_environment

    install_from_environment()
    torch.set_num_threads(1)
    from _pack import load_pack

    load_pack()
    import plan_measure

    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        for row in combinations(torch_version, held_out):
            print(json.dumps(asdict(row) | plan_measure.measure(row, Path(folder))), flush=True)


def _measured(torch_version: str, held_out: bool) -> list[dict[str, object]]:
    command = [sys.executable, __file__, "--torch", torch_version, "--here", *["--held-out"] * held_out]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in result.stdout.splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", choices=sorted(ROWS), help="measure this version only")
    parser.add_argument("--held-out", action="store_true", help="the combinations that nothing is fitted to")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        return _measure_here(options.torch, options.held_out)
    known, table = SETS[options.held_out]
    wanted = [options.torch] if options.torch else list(known)
    old = json.loads(table.read_text()) if table.exists() else []
    rows = [row for row in old if row["torch"] in known and row["torch"] not in wanted]
    for version in wanted:
        rows += _measured(version, options.held_out)
    rows.sort(key=lambda row: list(known).index(row["torch"]))
    table.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    print(f"{len(rows)} combinations in {table}")


if __name__ == "__main__":
    main()
