"""Giving memory back, in the order in which each step can work: unload, drop references, collect, synchronize, empty.

A model must leave the device before its tensors can die, tensors in reference cycles die only when they are collected,
and the MPS allocator returns a buffer to the system only when it is unused and the GPU has finished with it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .report import GIB, ROWS
from .telemetry import MemorySnapshot, take_snapshot


@dataclass(frozen=True)
class ReleaseReport:
    """Memory before and after, the names of the models that were unloaded, and a line for whatever else was dropped."""

    before: MemorySnapshot
    after: MemorySnapshot
    unloaded: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()

    def text(self) -> str:
        """What was released, and a line for each known figure: GiB before, after, and the difference."""
        lines = [f"Unloaded: {', '.join(self.unloaded) or 'nothing'}", *self.dropped]
        for label, name in ROWS:
            before, after = getattr(self.before, name), getattr(self.after, name)
            if before is not None and after is not None:
                change = round((after - before) / GIB, 2) + 0.0  # no -0.00
                lines.append(f"{label}: {before / GIB:.2f} GiB before, {after / GIB:.2f} GiB after ({change:+.2f})")
        if self.after.recommended is not None:
            lines.append(f"Recommended working set: {self.after.recommended / GIB:.2f} GiB")
        else:
            lines.append("No MPS device here")
        return "\n".join(lines)


def release_memory(
    unload: Callable[[], list[str]] | None = None,
    empty_cache: bool = True,
    drop: Callable[[], list[str]] | None = None,
) -> ReleaseReport:
    """Free what can be freed now, on any machine.

    unload: takes models off their devices, drops what it held, and returns their names; None leaves them.
    drop: gives up other references and returns a line about each. empty_cache: return the MPS allocator's unused
    buffers to the system.
    """
    before = take_snapshot()
    unloaded = tuple(unload()) if unload is not None else ()
    dropped = tuple(drop()) if drop is not None else ()
    gc.collect()
    if torch.backends.mps.is_available():
        torch.mps.synchronize()
        if empty_cache:
            torch.mps.empty_cache()
    return ReleaseReport(before, take_snapshot(), unloaded, dropped)
