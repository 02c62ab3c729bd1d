"""Watches memory while a model samples, and acts before macOS begins to swap: trim, then shrink, then stop.

What counts is the MPS driver's memory against the working set that Metal recommends, and how much swap has grown since
the run began. Every step of escalation is one line in the log; the last one is an error that says what to do.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from .telemetry import MemorySnapshot

log = logging.getLogger(__name__)

GIB = 1 << 30
LEAST_TEMPORARY = 32 << 20
WORTH_TRIMMING = 64 << 20
"""Bytes of unused cache below which emptying it gains nothing."""

PERIOD = 1.0
"""Seconds between two looks; one look costs well under a millisecond, and a block of Wan 14B takes longer than that."""


class MemoryStop(RuntimeError):
    """Sampling was ended before the machine began to swap; the message is one sentence."""


class Budget(Protocol):
    """What the governor shrinks: bytes for temporary tensors."""

    temporary_bytes: int


@dataclass(frozen=True)
class Policy:
    """When to act.

    trim, shrink, stop: share of the recommended working set that the driver holds; stop is None for never. swap: bytes
    by which swap may grow during the run before it is stopped, as a share of the machine's memory.
    """

    trim: float
    shrink: float
    stop: float | None
    swap: float


POLICIES: dict[str, Policy] = {
    "careful": Policy(trim=0.90, shrink=0.95, stop=None, swap=0.25),
    "strict": Policy(trim=0.80, shrink=0.85, stop=1.0, swap=0.05),
}
"""careful tolerates what macOS can compress or swap away once; strict keeps the run inside the working set."""


class Governor:
    """One run's watch.

    budget: temporary bytes to shrink, or None. snapshot: takes the figures. trim: empties the allocator's cache.
    clock: seconds.
    """

    def __init__(
        self,
        policy: Policy,
        budget: Budget | None,
        snapshot: Callable[[], MemorySnapshot],
        trim: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """The run begins now: swap that is in use already does not count."""
        self.policy = policy
        self.budget = budget
        self._before = budget.temporary_bytes if budget is not None else 0
        self._snapshot = snapshot
        self._trim = trim
        self._clock = clock
        self._next = clock()
        self._swap = snapshot().swap or 0

    def restore(self) -> None:
        """Give the budget its size from before the run."""
        if self.budget is not None:
            self.budget.temporary_bytes = self._before

    def look(self) -> None:
        """Act if it is time to look again and memory is short. Raises MemoryStop."""
        now = self._clock()
        if now < self._next:
            return
        self._next = now + PERIOD
        figures = self._snapshot()
        if figures.driver is None or not figures.recommended:
            return
        if self._share(figures) >= self.policy.trim and figures.driver - (figures.live or 0) >= WORTH_TRIMMING:
            figures = self._trimmed(figures)
        swapping = self._swapping(figures)
        if self._share(figures) < self.policy.shrink and not swapping:
            return
        if not self._shrunk(figures) and (
            swapping or (self.policy.stop is not None and self._share(figures) >= self.policy.stop)
        ):
            raise MemoryStop(self._sentence(figures))

    def _share(self, figures: MemorySnapshot) -> float:
        return (figures.driver or 0) / (figures.recommended or 1)

    def _swapping(self, figures: MemorySnapshot) -> bool:
        if figures.swap is None or not figures.total:
            return False
        return figures.swap - self._swap > self.policy.swap * figures.total

    def _trimmed(self, figures: MemorySnapshot) -> MemorySnapshot:
        self._trim()
        after = self._snapshot()
        log.info("Memory governor: trimmed the MPS cache, %s -> %s.", _gib(figures.driver), _gib(after.driver))
        return after

    def _shrunk(self, figures: MemorySnapshot) -> bool:
        if self.budget is None or self.budget.temporary_bytes <= LEAST_TEMPORARY:
            return False
        self.budget.temporary_bytes = max(LEAST_TEMPORARY, self.budget.temporary_bytes // 2)
        log.info(
            "Memory governor: %s of %s in use, chunks are now %d MiB.",
            _gib(figures.driver),
            _gib(figures.recommended),
            self.budget.temporary_bytes >> 20,
        )
        return True

    def _sentence(self, figures: MemorySnapshot) -> str:
        grown = (figures.swap or 0) - self._swap
        swap = f" and swap has grown by {_gib(grown)}" if grown > 0 else ""
        return (
            f"Sampling was stopped because {_gib(figures.driver)} of the {_gib(figures.recommended)} that this Mac's "
            f"GPU should hold are in use{swap}: its steps are saved, so close other programs and queue it again to go "
            "on, or choose fewer frames or a smaller size."
        )


def _gib(size: int | None) -> str:
    return f"{(size or 0) / GIB:.1f} GiB"
