"""Bytes that products with quantised weights move, decoded first and fused with decoding, and on a Mac their time.

The shapes are those of Wan 14B's time embedding (one row) and of UMT5-XXL for short prompts. Bytes are computed from
the shapes (``metal_matmul.bytes_moved``), not measured; times are measured on MPS and on nothing else, since the fused
kernels run nowhere else. Part of ``python benchmarks/run.py``; alone, ``python benchmarks/matmul.py [--rounds N]
[--json]``.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from measure import Row

TYPES = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K")
MATRICES = {"Wan 14B time projection": (30720, 5120), "UMT5-XXL query": (4096, 4096), "UMT5-XXL gate": (10240, 4096)}
"""Rows and columns of the weights."""

INPUT_ROWS = {"Wan 14B time projection": (1,), "UMT5-XXL query": (4, 32, 64), "UMT5-XXL gate": (4, 32, 64)}
ROUNDS = 20
DTYPE = torch.float16
PATHS = {"decoded first": "0", "fused": ""}
"""Setting of the row limit by path."""


def seconds(run: Callable[[], Any], rounds: int) -> float:
    """The fastest of some rounds on MPS, after one to warm up."""
    best = float("inf")
    for turn in range(rounds + 1):
        torch.mps.synchronize()
        begin = time.perf_counter()
        run()
        torch.mps.synchronize()
        if turn > 0:
            best = min(best, time.perf_counter() - begin)
    return best


def measure(matrix: str, name: str, rows: int, rounds: int) -> list[Row]:
    """A row for each path: see ``run``."""
    from apple_silicon_video.quantization import metal_matmul
    from apple_silicon_video.quantization.formats import FORMATS, packed_size, random_blocks
    from apple_silicon_video.quantization.tensor import QuantizedWeight

    fmt, (features, columns) = FORMATS[name], MATRICES[matrix]
    moved = metal_matmul.bytes_moved(rows, features, columns, packed_size(fmt, (features, columns)), DTYPE.itemsize)
    found: list[Row] = [
        {
            "matrix": matrix,
            "type": name,
            "rows": rows,
            "features": features,
            "columns": columns,
            "path": path,
            "bytes": moved[path],
            "ratio": moved["decoded first"] / moved[path],
            "seconds": None,
        }
        for path in PATHS
    ]
    if not torch.backends.mps.is_available():
        return found
    row = random_blocks(fmt, columns // fmt.block_size, seed=0).view(-1)
    weight = QuantizedWeight(row.repeat(features).to("mps"), fmt, (features, columns), DTYPE)
    x = torch.randn(rows, columns, dtype=DTYPE, device="mps")

    def product() -> torch.Tensor:
        fused = metal_matmul.linear(x, weight, None)
        return torch.nn.functional.linear(x, weight.dequantize(DTYPE)) if fused is None else fused

    for result in found:
        with mock.patch.dict(os.environ, {metal_matmul.ROWS_SWITCH: PATHS[result["path"]]}):
            fused = metal_matmul.linear(x, weight, None) is not None
            if fused == (result["path"] == "fused"):
                result["seconds"] = seconds(product, rounds)
    return found


def run(small: bool = False, rounds: int | None = None) -> list[Row]:
    """Compare both paths for every matrix, number of input rows and type.

    small: one matrix and one type. Each row has the ``matrix`` and ``type``, ``rows`` of the input, ``features`` and
    ``columns`` of the matrix, the ``path``, the ``bytes`` that it moves, computed, the ``ratio`` to them of what
    decoding first moves, and ``seconds`` of a product; None off MPS and where the kernels are not in use.
    """
    from _pack import load_pack

    load_pack()
    rounds = rounds or (1 if small else ROUNDS)
    matrices = list(MATRICES)[1:2] if small else list(MATRICES)
    return [
        row
        for matrix in matrices
        for rows in INPUT_ROWS[matrix]
        for name in (TYPES[:1] if small else TYPES)
        for row in measure(matrix, name, rows, rounds)
    ]


def main() -> None:
    """Run it and print a table or JSON."""
    parser = argparse.ArgumentParser(description="Compare fused products with decoding first.")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="rounds, of which the fastest counts")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    rows = run(rounds=options.rounds)
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    print(f"{'matrix':<25}{'type':<6}{'rows':>5}  {'path':<14}{'MB':>8}{'ratio':>8}{'ms':>9}")
    for row in rows:
        spent = "-" if row["seconds"] is None else f"{1000 * row['seconds']:.3f}"
        print(
            f"{row['matrix']:<25}{row['type']:<6}{row['rows']:>5}  {row['path']:<14}{row['bytes'] / 1e6:>8.1f}"
            f"{row['ratio']:>7.2f}x{spent:>9}"
        )


if __name__ == "__main__":
    main()
