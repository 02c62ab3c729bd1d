"""Which frames of a video to read: a range by frames or by time, every n-th one, or resampled to another rate.

Everything is computed from exact presentation times (fractions of a second), so that a variable frame rate needs no
special case. Wan's models take 4 n + 1 frames, because their VAE packs four frames into one after the first.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from .errors import VideoError

MOST_RESAMPLED = 10_000_000
Seconds = Fraction | float | int


@dataclass(frozen=True)
class FrameSelection:
    """Frames of a video, in presentation order.

    start_frame: index of the first one, negative counts from the end. start_time: seconds instead; the first frame
    shown at or after it, negative counts from the end. end_frame, end_time: where to end, exclusive, negative from
    the end. length: seconds after the start instead. stride: every n-th frame. fps: resample to this rate first:
    frame k is the one on screen at start + k / fps. limit: at most so many frames, 0 for all. round_to_4n1: drop
    frames at the end until 4 n + 1 are left.
    """

    start_frame: int = 0
    start_time: Seconds | None = None
    end_frame: int | None = None
    end_time: Seconds | None = None
    length: Seconds | None = None
    stride: int = 1
    fps: Seconds | None = None
    limit: int = 0
    round_to_4n1: bool = False

    def __post_init__(self) -> None:
        if self.stride < 1 or self.limit < 0:
            raise VideoError(
                f"Every {self.stride}th frame and at most {self.limit} frames cannot be read; enter 1 or more for "
                "the first and 0 or more for the second."
            )
        if self.fps is not None and not 0 < self.fps < float("inf"):
            raise VideoError(f"fps is {self.fps}; enter a number above 0, or leave it out for the video's own rate.")
        if self.length is not None and self.length < 0:
            raise VideoError(f"The length is {self.length} seconds; enter 0 or more.")

    def indices(self, timestamps: Sequence[Fraction], duration: Fraction) -> list[int]:
        """Indices into `timestamps` (ascending, seconds), possibly repeated where fps is above the video's rate.

        duration: when the last frame ends, on the clock of the timestamps. Empty where nothing lies in the range.
        """
        first, begin, end = self._range(timestamps, duration)
        if self.fps is None:
            stop = bisect_left(timestamps, end)
            if self.end_frame is not None:
                stop = min(stop, _from_end(self.end_frame, len(timestamps)))
            chosen = list(range(first, stop, self.stride))
            chosen = chosen[: self.limit] if self.limit else chosen
        else:
            chosen = self._resampled(timestamps, begin, end)
        if self.round_to_4n1 and chosen:
            chosen = chosen[: (len(chosen) - 1) // 4 * 4 + 1]
        return chosen

    def section(self, timestamps: Sequence[Fraction], duration: Fraction) -> tuple[Fraction, Fraction]:
        """Seconds from the start of the first chosen frame to the end of the last one: what its sound is cut to."""
        chosen = self.indices(timestamps, duration)
        first, begin, end = self._range(timestamps, duration)
        if not chosen:
            return begin, begin
        if self.fps is not None:
            return begin, min(duration, begin + len(chosen) * self.stride / _exact(self.fps))
        after = first + len(chosen) * self.stride
        shown_until = timestamps[after] if after < len(timestamps) else duration
        return timestamps[first], min(shown_until, max(end, timestamps[chosen[-1]]))

    def rate(self, fps: Fraction) -> Fraction:
        """Frames a second of the chosen frames, for a video of so many frames a second."""
        return (_exact(self.fps) if self.fps is not None else fps) / self.stride

    def _range(self, timestamps: Sequence[Fraction], duration: Fraction) -> tuple[int, Fraction, Fraction]:
        """First frame, and begin and end in seconds."""
        count = len(timestamps)
        origin = timestamps[0] if count else Fraction(0)
        if self.start_time is not None:
            begin = _exact(self.start_time)
            begin = max(origin, duration + begin if begin < 0 else begin)
            first = bisect_left(timestamps, begin)
        else:
            first = max(0, _from_end(self.start_frame, count))
            begin = timestamps[first] if first < count else duration
        end = duration
        if self.end_time is not None:
            end_time = _exact(self.end_time)
            end = min(end, duration + end_time if end_time < 0 else end_time)
        if self.end_frame is not None:
            stop = _from_end(self.end_frame, count)
            end = min(end, timestamps[max(stop, 0)] if stop < count else duration)
        if self.length is not None:
            end = min(end, begin + _exact(self.length))
        return first, begin, end

    def _resampled(self, timestamps: Sequence[Fraction], begin: Fraction, end: Fraction) -> list[int]:
        assert self.fps is not None
        step = self.stride / _exact(self.fps)
        count = max(0, -int((begin - end) // step)) if timestamps else 0
        count = min(count, self.limit) if self.limit else count
        if count > MOST_RESAMPLED:
            raise VideoError(f"At {self.fps} frames a second the range has {count} frames; enter a smaller rate.")
        return [max(0, bisect_right(timestamps, begin + k * step) - 1) for k in range(count)]


def _from_end(index: int, count: int) -> int:
    return index + count if index < 0 else index


def _exact(seconds: Seconds) -> Fraction:
    """The fraction that a number typed with few decimals means: 0.1 is 1/10."""
    return seconds if isinstance(seconds, Fraction) else Fraction(seconds).limit_denominator(1_000_000)
