"""Makes tests/data/plan_table.json: what sampling stages take on the simulated device, for the planner to be held to.

    python tests/simulated_mps/plan_table.py [--torch 2.13]

Each torch version has a process of its own; a combination takes a few seconds (inside/plan_measure.py). With --torch
only that version is measured anew and the other rows stay.
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


def combinations(torch_version: str) -> Iterator[Combination]:
    return (Combination(torch_version, *row) for row in ROWS[torch_version])


def _measure_here(torch_version: str) -> None:
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
        for row in combinations(torch_version):
            print(json.dumps(asdict(row) | plan_measure.measure(row, Path(folder))), flush=True)


def _measured(torch_version: str) -> list[dict[str, object]]:
    command = [sys.executable, __file__, "--torch", torch_version, "--here"]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in result.stdout.splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", choices=sorted(ROWS), help="measure this version only")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        return _measure_here(options.torch)
    wanted = [options.torch] if options.torch else list(ROWS)
    old = json.loads(TABLE.read_text()) if TABLE.exists() else []
    rows = [row for row in old if row["torch"] in ROWS and row["torch"] not in wanted]
    for version in wanted:
        rows += _measured(version)
    rows.sort(key=lambda row: list(ROWS).index(row["torch"]))
    TABLE.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    print(f"{len(rows)} combinations in {TABLE}")


if __name__ == "__main__":
    main()
