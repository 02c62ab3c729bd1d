"""Gates that decide over a cure at the first call of trigger size, and the evidence that they collect there.

For defects from 2^31 elements on: a probe at start would take gigabytes, or do harm. What would do harm is tried out in
a child process (child_probe.py); the rest is compared in place, a few slices of the device's result with a reference.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import child_probe, probing
from .registry import FirstUse, Function, Maker, ProbeResult

log = logging.getLogger(__name__)

CHILD_SECONDS = 120
SAMPLED_COLUMNS = 1024

Settle = Callable[[ProbeResult], None]


def gate(first_use: FirstUse, make: Maker, settle: Settle) -> Maker:
    """A maker of wrappers that leave every call alone until one is of trigger size, then check it and ``settle``.

    The call that was checked gets the cure's result unless the device is shown to be right.
    """

    def make_gate(original: Function) -> Function:
        cured = make(original)

        def watched(*args: Any, **kwargs: Any) -> Any:
            if not first_use.meets(*args, **kwargs):
                return original(*args, **kwargs)
            found = evidence(first_use, original, args, kwargs)
            settle(found)
            right = found.ok and found.applicable
            return (original if right else cured)(*args, **kwargs)

        return watched

    return make_gate


def evidence(first_use: FirstUse, original: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ProbeResult:
    """What the check of one call says; a check that stops with an error gives no evidence.

    Raises torch.OutOfMemoryError, as the original would.
    """
    try:
        return first_use.check(original, args, kwargs)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        log.warning("A check at first use could not run: %s", error)
        return ProbeResult(True, 0.0, 0.0, f"the check could not run ({probing.first_line(error)})", False, failed=True)


def product_check(original: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ProbeResult:
    """Rows of a matrix product of [..., M, K] and [..., K, N], from the first matrix to the last, in float32."""
    left, right = (*args, *kwargs.values())
    product = original(*args, **kwargs)
    return probing.worst(
        [
            probing.compare(functools.partial(found.cpu), expected, _rounding(product.dtype), "rows of the product")
            for found, expected in _product_rows(product, left, right)
        ]
    )


def _rounding(dtype: torch.dtype) -> float:
    """What a right product may be off by, relative to its largest value."""
    return 1e-3 if dtype == torch.float32 else 2e-2


def _product_rows(product: Tensor, left: Tensor, right: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Pieces of rows of ``product`` and what they should be, on the CPU."""
    batch = product.shape[:-2]
    left, right = left.expand(*batch, -1, -1), right.expand(*batch, -1, -1)
    pairs = []
    for number in probing.sampled(batch.numel()):
        place = _unravel(number, batch)
        for row in probing.sampled(product.size(-2)):
            values = left[place][row].cpu().float()
            for start in sorted({0, max(0, product.size(-1) - SAMPLED_COLUMNS)}):
                columns = slice(start, start + SAMPLED_COLUMNS)
                expected = values @ right[place][:, columns].cpu().float()
                pairs.append((product[place][row, columns], expected))
    return pairs


def _unravel(number: int, shape: torch.Size) -> tuple[int, ...]:
    place = []
    for size in reversed(shape):
        number, index = divmod(number, size)
        place.append(index)
    return tuple(reversed(place))


def in_child(name: str, limit: int) -> ProbeResult:
    """Set a defect off in a process of its own, where it can only damage or end that one; once for each limit.

    name: an entry of ``child_probe.PROBES``. limit: as in ``gate.LIMITS``.
    """
    return _in_child(name, limit)


@functools.cache
def _in_child(name: str, limit: int) -> ProbeResult:
    command = [sys.executable, str(Path(child_probe.__file__)), name, str(limit)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=CHILD_SECONDS, stdin=subprocess.DEVNULL, env=os.environ
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return probing.not_applicable(f"a process to try it out in could not run ({probing.first_line(error)})")
    if done.returncode < 0:
        detail = f"{name} ends the process that tries it out (signal {-done.returncode})"
        return ProbeResult(False, float("inf"), 0.0, detail)
    try:
        said = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return probing.not_applicable(f"a process to try it out in stopped ({last[:160]})")
    if "unable" in said:
        return probing.not_applicable(said["unable"])
    return ProbeResult(said["wrong"] == 0, float(said["wrong"]), 0.0, f"{said['what']}, in a process of its own")


def forget() -> None:
    """Try everything out again."""
    _in_child.cache_clear()
