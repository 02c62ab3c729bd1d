"""A small H.264 copy of what is being saved, for files that a browser cannot play (ProRes, HEVC, image sequences)."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .encoding import VideoWriter
from .errors import VideoError
from .video_formats import FOLDER, load_format

log = logging.getLogger(__name__)

LONG_SIDE = 512  # pixels
BACKGROUND = 0.5  # grey behind transparent parts


class PreviewCopy:
    """Context manager: `begin` before the first frame, `add` each, `finish` for the file, None where it failed.

    A preview that fails is told in one log line and never fails the video it shows.
    """

    def __init__(self, names: Iterable[Path], fps: float | Fraction, audio: Mapping[str, Any] | None) -> None:
        self._names, self._fps, self._audio = names, fps, audio
        self._writer: VideoWriter | None = None

    def __enter__(self) -> PreviewCopy:
        return self

    def __exit__(self, *exception: object) -> None:
        self._close()

    def begin(self) -> None:
        """Start, or start over."""
        self._close()
        video_format = load_format(FOLDER / "h264-mp4.json")
        writer = VideoWriter(self._names, fps=self._fps, video_format=video_format, quality="small", audio=self._audio)
        try:
            self._writer = writer.__enter__()
        except VideoError as error:
            self._give_up(error)

    def add(self, frame: Tensor) -> None:
        """Add a frame of any size, floating [H, W, 3 or 4]."""
        if self._writer is None:
            return
        try:
            self._writer.write(small_picture(frame, LONG_SIDE))
        except VideoError as error:
            self._give_up(error)

    def finish(self) -> Path | None:
        """Complete the copy."""
        if self._writer is None:
            return None
        try:
            return self._writer.finish().path
        except VideoError as error:
            self._give_up(error)
            return None

    def _give_up(self, error: VideoError) -> None:
        log.info("There is no preview of this video: %s", error)
        self._close()

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.__exit__()
            self._writer = None


def small_picture(frame: Tensor, long_side: int) -> Tensor:
    """A frame scaled to even sides of at most `long_side` pixels, float32 [H', W', 3], transparent parts over grey."""
    height, width = frame.shape[:2]
    scale = min(1.0, long_side / max(height, width))
    size = [2 * max(1, round(side * scale / 2)) for side in (height, width)]
    picture = frame.permute(2, 0, 1)[None, :4].to(torch.float32)
    if size != [height, width]:
        picture = torch.nn.functional.interpolate(picture, size=size, mode="area")
    picture = picture[0].permute(1, 2, 0)
    if picture.shape[2] < 4:
        return picture
    alpha = picture[:, :, 3:].clamp(0, 1)
    return picture[:, :, :3] * alpha + BACKGROUND * (1 - alpha)
