"""Run as a script, in a process of its own: sets off a defect that writes outside its buffers or ends the process.

    python child_probe.py NAME LIMIT

Needs torch alone. Prints one JSON object: what was done and how many values are wrong, or why it could not be done.
Shapes are those of the reports (pytorch#189960; ComfyUI#11628 for the buffer), the type is the smallest there is.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable

# This folder's modules must not stand in for others of the same name.
if __name__ == "__main__":
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != os.path.dirname(os.path.abspath(__file__))]

import torch


def cat(device: torch.device, limit: int) -> tuple[str, int]:
    """Two halves, one buffer given twice, joined to a little more than ``limit`` elements; looks at the last row."""
    side = math.isqrt(limit // 4) + 1
    half = torch.full((2 * side, side), 7, dtype=torch.int8, device=device)
    joined = torch.cat([half, half], 1)
    wrong = int((joined[-1].cpu() != 7).sum()) + int((joined[0].cpu() != 7).sum())
    return f"cat to {joined.numel()} elements", wrong


def power(device: torch.device, limit: int) -> tuple[str, int]:
    """The square of a few numbers that lie in a buffer of more than ``limit`` elements."""
    buffer = torch.empty((limit // 64 + 2, 64), dtype=torch.uint8, device=device)
    values = torch.arange(64, dtype=torch.uint8)
    buffer[-1].copy_(values)
    try:
        squares = buffer[-1].pow(2).cpu()
    except RuntimeError as error:
        return f"pow in a buffer of {buffer.numel()}: refused ({str(error)[:80]})", len(values)
    return f"pow in a buffer of {buffer.numel()}", int((squares != values.pow(2)).sum())


PROBES: dict[str, Callable[[torch.device, int], tuple[str, int]]] = {"cat-2-31": cat, "int-max-dims": power}


def footprint(name: str, limit: int) -> int:
    """Bytes that a probe holds on the device."""
    return {"cat-2-31": limit // 2 * 3, "int-max-dims": limit}[name] + (1 << 27)


def main(name: str, limit: int) -> dict[str, object]:
    """Run one probe and say what came out."""
    if not torch.backends.mps.is_available():
        return {"unable": "there is no MPS device in the process that was to try it out"}
    try:
        what, wrong = PROBES[name](torch.device("mps"), limit)
    except torch.OutOfMemoryError as error:
        return {"unable": f"not enough memory ({str(error)[:120]})"}
    return {"what": what, "wrong": wrong}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]))))
