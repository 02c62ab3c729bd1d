"""What every writer of a video file needs to know about its task, and what it says about the result.

A writer (container_file.py, gif_file.py, image_files.py) takes frames one at a time: `add`, then `finish` or `close`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Protocol

import av
from torch import Tensor

from .audio import AudioClip
from .errors import VideoError
from .pixel_formats import fill, padded_size
from .video_formats import AudioEncoding, VideoEncoder, VideoFormat

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncodedVideo:
    """What was written: size in pixels, frames, exact rate in frames a second, the encoder, and whether with sound.

    path: the file, or the folder of an image sequence.
    """

    path: Path
    width: int
    height: int
    frames: int
    fps: Fraction
    encoder: str
    has_audio: bool

    @property
    def duration(self) -> Fraction:
        """Seconds."""
        return self.frames / self.fps


class EncoderFailed(Exception):
    """An encoder cannot be opened, or gave up after it had `started` to take frames; another one may work."""

    def __init__(self, error: Exception, started: bool) -> None:
        super().__init__(str(error))
        self.started = started


@dataclass
class Job:
    """One file to write. size: of the frames, in pixels; loops: how often a player repeats an animated picture."""

    format: VideoFormat
    quality: str
    fps: Fraction
    audio: AudioClip | None = None
    audio_encoding: AudioEncoding | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    encoder_options: Mapping[str, str] = field(default_factory=dict)
    loops: int | None = None
    palette: av.VideoFrame | None = None
    size: tuple[int, int] = (0, 0)
    alpha: bool = False
    nan_frames: list[int] = field(default_factory=list)

    def begin(self, frame: Tensor) -> None:
        """Take size and alpha from the first frame."""
        self.size = frame_size(frame)
        self.alpha = frame.shape[2] > 3
        self.nan_frames.clear()

    def options(self, encoder: VideoEncoder) -> dict[str, str]:
        """The encoder's options for this quality and the user's own."""
        return encoder.options | encoder.qualities[self.quality] | dict(self.encoder_options)

    def pixel_format(self, encoder: VideoEncoder) -> str:
        """FFmpeg's name of what this encoder takes."""
        return encoder.alpha_pixel_format if self.alpha and encoder.alpha_pixel_format else encoder.pixel_format

    def stored_size(self, encoder: VideoEncoder) -> tuple[int, int]:
        """(width, height) in the file: the frames', or rounded up to what the encoder takes."""
        return padded_size(*self.size, self.pixel_format(encoder), self.format.odd_sizes)

    def picture(self, frame: Tensor, index: int, encoder: VideoEncoder) -> av.VideoFrame:
        """The frame as the encoder takes it, at its time."""
        if frame_size(frame) != self.size:
            raise VideoError(
                f"Frame {index} is {frame.shape[1]}x{frame.shape[0]} and the first one {self.size[0]}x{self.size[1]}; "
                "resize the frames to one size."
            )
        picture = av.VideoFrame(*self.stored_size(encoder), self.pixel_format(encoder))
        if fill(picture, frame, self.format.color_space):
            self.nan_frames.append(index)
        picture.pts = index
        picture.time_base = 1 / self.fps
        return picture

    def tell(self, path: Path, encoder: VideoEncoder) -> None:
        """One log line for each thing that the user may not expect in the file."""
        name, stored = path.name, self.stored_size(encoder)
        if stored != self.size:
            log.info(
                "%s: %dx%d became %dx%d by repeating the last column or row, because %s needs even sides.",
                name, *self.size, *stored, self.format.name,
            )  # fmt: skip
        if self.alpha and not encoder.alpha_pixel_format:
            log.info("%s: the alpha channel is left out, because %s has none.", name, self.format.name)
        if self.audio is not None and self.audio_encoding is None:
            log.info("%s: the sound is left out, because %s has none.", name, self.format.name)
        if self.nan_frames:
            log.warning(
                "%s: %d frames hold NaN, from frame %d on; those pixels are saved as black.",
                name, len(self.nan_frames), self.nan_frames[0],
            )  # fmt: skip


class FrameWriter(Protocol):
    """Fills a file frame by frame."""

    def add(self, frame: Tensor, index: int) -> None:
        """Write frame number `index`. Raises EncoderFailed or VideoError."""

    def finish(self) -> None:
        """Complete the file. Raises EncoderFailed or VideoError."""

    def close(self) -> None:
        """Give the file up; never raises."""


def frame_size(frame: Tensor) -> tuple[int, int]:
    """(width, height) of one frame. Raises VideoError if it is not floating [H, W, 3 or 4 and more]."""
    if frame.ndim != 3 or frame.shape[2] < 3 or 0 in frame.shape or not frame.dtype.is_floating_point:
        raise VideoError(
            f"A frame is {frame.dtype} of shape {list(frame.shape)}, not floating [height, width, 3 or 4 channels]; "
            "connect an IMAGE output."
        )
    return frame.shape[1], frame.shape[0]
