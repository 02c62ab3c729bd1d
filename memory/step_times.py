"""Time left, from the steps that were measured."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

WINDOW = 5
"""Steps that the estimate rests on: the first ones of a run are slower, since kernels are compiled and weights read."""


class StepTimes:
    """Measures steps; ``clock`` gives seconds."""

    def __init__(self, steps: int, clock: Callable[[], float] = time.monotonic) -> None:
        """``steps``: how many there are in all. The first one begins now."""
        self.steps = steps
        self._clock = clock
        self._marks: deque[float] = deque([clock()], maxlen=WINDOW + 1)
        self._done = 0

    def step(self, done: int) -> str:
        """Note that ``done`` steps are complete; return what to show: "step 7 of 25, 41 s a step, 12 min left"."""
        if done > self._done:
            self._marks.append(self._clock())
            self._done = done
        text = f"step {done} of {self.steps}"
        if len(self._marks) < 2:
            return text
        each = (self._marks[-1] - self._marks[0]) / (len(self._marks) - 1)
        return f"{text}, {duration(each)} a step, {duration(each * (self.steps - done))} left"


def duration(seconds: float) -> str:
    """Seconds as people say them: 0.4 s, 41 s, 12 min, 1 h 20 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
