"""Frames on their way to a file, in playing order and with their mask, made one at a time and never all at once."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from .errors import VideoError
from .reader import VideoReader

FRAMES_BACKWARDS = 8


def playing_order(count: int, repeats: int = 0, ping_pong: bool = False) -> list[range]:
    """Frame numbers 0..count - 1 as they are shown: with ping_pong also back again, without showing either end twice;
    all of it `repeats` more times."""
    once = [range(count)] + [range(count - 2, 0, -1)] * ping_pong
    return once * (repeats + 1)


class ImageFrames:
    """An IMAGE as frames of [H, W, C] in an order of frame numbers; can be read any number of times.

    images: floating [N, H, W, 3 or 4]. mask: None or a MASK, floating [N or 1, H', W'] or [H', W'] in 0..1, 1 being
    transparent, scaled to the frames: it becomes the fourth channel as 1 - mask. order: parts of the playing order.
    Raises VideoError if there are not as many masks as images.
    """

    def __init__(self, images: Tensor, mask: Tensor | None = None, order: Iterable[range] | None = None) -> None:
        self._images, self._mask = images, _masks(mask, images.shape[0])
        self._order = [range(images.shape[0])] if order is None else list(order)

    def __len__(self) -> int:
        return sum(map(len, self._order))

    def __iter__(self) -> Iterator[Tensor]:
        indices = itertools.chain.from_iterable(self._order)
        return (_masked(self._images[index], self._mask, index) for index in indices)


class TappedFrames:
    """Frames that are shown to someone else as they pass.

    begin is called whenever reading starts, tap with each frame before it is handed on. Frames that can be read again
    can be read again through this; give `iter(...)` of it for those that cannot.
    """

    def __init__(self, frames: Iterable[Tensor], begin: Callable[[], None], tap: Callable[[Tensor], None]) -> None:
        self._frames, self._begin, self._tap = frames, begin, tap

    def __iter__(self) -> Iterator[Tensor]:
        self._begin()
        for frame in self._frames:
            self._tap(frame)
            yield frame


class VideoFrames:
    """Frames of an open video (reader.py) in an order of frame numbers; can be read any number of times.

    indices: the chosen frames, ascending. mask and order: as for ImageFrames. Backwards a few frames are decoded at a
    time, each few from the key frame before them.
    """

    def __init__(
        self, reader: VideoReader, indices: list[int], mask: Tensor | None = None, order: Iterable[range] | None = None
    ) -> None:
        self._reader, self._indices = reader, indices
        self._mask = _masks(mask, len(indices))
        self._order = [range(len(indices))] if order is None else list(order)

    def __len__(self) -> int:
        return sum(map(len, self._order))

    def __iter__(self) -> Iterator[Tensor]:
        for part in self._order:
            if part.step > 0:
                yield from self._forward(part)
                continue
            for begin in range(0, len(part), FRAMES_BACKWARDS):
                yield from reversed(list(self._forward(part[begin : begin + FRAMES_BACKWARDS][::-1])))

    def _forward(self, part: range) -> Iterator[Tensor]:
        frames = self._reader.frames([self._indices[index] for index in part], alpha=self._reader.info.has_alpha)
        return (_masked(frame, self._mask, index) for index, frame in zip(part, frames))


def _masks(mask: Tensor | None, count: int) -> Tensor | None:
    if mask is None:
        return None
    mask = mask if mask.ndim == 3 else mask[None]
    if mask.shape[0] not in (1, count):
        raise VideoError(f"There are {mask.shape[0]} masks for {count} frames; connect one mask, or one for each.")
    return mask


def _masked(frame: Tensor, masks: Tensor | None, index: int) -> Tensor:
    if masks is None:
        return frame
    mask = masks[index % masks.shape[0]].to(frame)
    if mask.shape != frame.shape[:2]:
        mask = torch.nn.functional.interpolate(mask[None, None], size=frame.shape[:2], mode="bilinear")[0, 0]
    return torch.cat((frame[:, :, :3], 1 - mask[:, :, None]), 2)
