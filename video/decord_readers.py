"""decord's VideoReader and AudioReader on the pack's reader, for decord_module.py.

Arguments, shapes, dtypes and errors are decord 0.6's: frames are uint8 [H, W, 3], a batch [N, H, W, 3], what is
returned is an array with ``asnumpy()``, or a torch tensor after ``bridge.set_bridge("torch")``.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from .errors import VideoError
from .reader import FrameSize, open_video

BRIDGES = ("native", "torch")
_bridge = threading.local()
_default_bridge = "native"


class DECORDError(ValueError):
    """What decord raises."""


class Context(NamedTuple):
    """A device; everything here is decoded on the processor."""

    device: str
    device_id: int


def cpu(dev_id: int = 0) -> Context:
    return Context("cpu", dev_id)


def gpu(dev_id: int = 0) -> Context:
    return Context("gpu", dev_id)


class DecordArray(np.ndarray):  # type: ignore[type-arg]
    """A numpy array that is asked for itself as decord's arrays are."""

    def asnumpy(self) -> NDArray[Any]:
        """The same as a plain array."""
        return self.view(np.ndarray)


def set_bridge(name: str) -> None:
    """Choose what is returned: "native" or "torch"."""
    global _default_bridge
    if name not in BRIDGES:
        raise AssertionError(f"valid bridges: {', '.join(BRIDGES)}; for others install eva-decord")
    _bridge.name = name
    if threading.current_thread() is threading.main_thread():
        _default_bridge = name


def reset_bridge() -> None:
    set_bridge("native")


@contextmanager
def use_torch() -> Iterator[None]:
    """Torch tensors within a `with` block."""
    before = getattr(_bridge, "name", _default_bridge)
    set_bridge("torch")
    try:
        yield
    finally:
        set_bridge(before)


def _out(array: NDArray[Any]) -> Any:
    if getattr(_bridge, "name", _default_bridge) == "torch":
        return torch.from_numpy(array)
    return array.view(DecordArray)


def _open(uri: Any) -> Any:
    try:
        return open_video(BytesIO(uri.read()) if hasattr(uri, "read") else uri)
    except VideoError as error:
        raise DECORDError(str(error)) from error


class VideoReader:
    """decord.VideoReader. ctx, num_threads and fault_tol are taken and have no effect."""

    def __init__(
        self,
        uri: Any,
        ctx: Context = Context("cpu", 0),  # noqa: B008
        width: int = -1,
        height: int = -1,
        num_threads: int = 0,
        fault_tol: int | float = -1,
    ) -> None:
        self._reader = _open(uri)
        info = self._reader.info
        wanted = (width if width > 0 else info.width, height if height > 0 else info.height)
        self._size = FrameSize(*wanted) if wanted != (info.width, info.height) else None
        self._shape = (wanted[1], wanted[0], 3)
        self._next = 0

    def __len__(self) -> int:
        return self._reader.info.frames

    def __getitem__(self, idx: int | slice) -> Any:
        if isinstance(idx, slice):
            return self.get_batch(range(*idx.indices(len(self))))
        if not -len(self) <= idx < len(self):
            raise IndexError(f"Index: {idx} out of bound: {len(self)}")
        self._next = idx % len(self)
        return self.next()

    def next(self) -> Any:
        """The next frame; StopIteration after the last one."""
        if self._next >= len(self):
            raise StopIteration
        self._next += 1
        return _out(self._read(np.array([self._next - 1]))[0])

    def get_batch(self, indices: Iterable[int]) -> Any:
        """Frames of any indices, negative ones from the end, in their order."""
        return _out(self._read(self._validate_indices(indices)))

    def get_avg_fps(self) -> float:
        return float(self._reader.info.fps)

    def get_frame_timestamp(self, idx: int | slice | Iterable[int]) -> NDArray[np.float32]:
        """Start and end of frames in seconds, float32 [2] or [N, 2]."""
        wanted = range(*idx.indices(len(self))) if isinstance(idx, slice) else idx
        stamps = [*self._reader.timestamps(), self._reader.info.duration]
        table = np.array([[float(a), float(b)] for a, b in zip(stamps, stamps[1:])], np.float32)  # noqa: RUF007
        return table[self._validate_indices(wanted)]

    def get_key_indices(self) -> list[int]:
        return self._reader.key_frames

    def seek(self, pos: int) -> None:
        """Let the key frame at or before `pos` be the next one."""
        assert 0 <= pos < len(self)
        self._next = max((key for key in self.get_key_indices() if key <= pos), default=0)

    def seek_accurate(self, pos: int) -> None:
        """Let `pos` be the next one."""
        assert 0 <= pos < len(self)
        self._next = pos

    def skip_frames(self, num: int = 1) -> None:
        assert num > 0
        self._next += num

    def _validate_indices(self, indices: Any) -> NDArray[np.int64]:
        chosen = np.array(indices if isinstance(indices, int) else list(indices), dtype=np.int64)
        chosen = np.where(chosen < 0, chosen + len(self), chosen)
        if chosen.size and not ((chosen >= 0) & (chosen < len(self))).all():
            raise IndexError(f"Out of bound indices: {chosen[(chosen < 0) | (chosen >= len(self))]}")
        return chosen

    def _read(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """uint8 [N, H, W, 3], decoded frame by frame in ascending order."""
        result = np.empty((len(indices), *self._shape), np.uint8)
        ascending = np.unique(indices).tolist()
        try:
            for index, frame in zip(ascending, self._reader.frames(ascending, size=self._size)):
                result[indices == index] = frame.mul_(255).round_().to(torch.uint8).numpy()
        except VideoError as error:
            raise DECORDError(str(error)) from error
        return result


class AudioReader:
    """decord.AudioReader: the whole sound, float32 [channels, samples]."""

    def __init__(
        self,
        uri: Any,
        ctx: Context = Context("cpu", 0),  # noqa: B008
        sample_rate: int = -1,
        mono: bool = True,
    ) -> None:
        from .audio_reading import read_all

        try:
            self._array, self.sample_rate = read_all(
                BytesIO(uri.read()) if hasattr(uri, "read") else uri, sample_rate, mono
            )
        except VideoError as error:
            raise DECORDError(str(error)) from error

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Channels and samples of each."""
        return self._array.shape[0], self._array.shape[1]

    def duration(self) -> float:
        """Seconds."""
        return self.shape[1] / self.sample_rate

    def __getitem__(self, idx: int | slice) -> Any:
        if isinstance(idx, slice):
            return self.get_batch(range(*idx.indices(self.shape[1])))
        if not -self.shape[1] <= idx < self.shape[1]:
            raise IndexError(f"Index: {idx} out of bound: {self.shape[1]}")
        return _out(np.ascontiguousarray(self._array[:, idx]))

    def get_batch(self, indices: Iterable[int]) -> Any:
        """Samples of any indices, float32 [channels, N]."""
        chosen = np.array(list(indices), dtype=np.int64)
        if chosen.size and not ((chosen >= -self.shape[1]) & (chosen < self.shape[1])).all():
            raise IndexError(f"Out of bound indices: {chosen}")
        return _out(np.ascontiguousarray(self._array[:, chosen]))
