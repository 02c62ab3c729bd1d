"""Things that read like an open video file: a part of one, and frames that were never encoded.

Both have what VideoReader has (info, timestamps, indices, section, frames, read, read_images, audio), so that whoever
reads a video need not know which of the three it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from .errors import VideoError
from .geometry import FrameSize
from .media_info import AudioInfo, ColorTags, VideoInfo
from .reader import FrameTable, Selection, VideoReader
from .selection import FrameSelection


def _nothing(done: int) -> None:
    pass


class VideoSection(FrameTable):
    """A part of an open video, whose clock starts with it; closing it closes the video.

    start: seconds, negative from the end. length: seconds, 0 up to the end. Raises VideoError where no frame is left.
    """

    def __init__(self, reader: VideoReader, start: float | Fraction, length: float | Fraction) -> None:
        self._reader, self.backend = reader, reader.backend
        selection = FrameSelection(start_time=start, length=length or None)
        self._indices = reader.indices(selection)
        self._begin, end = reader.section(selection)
        stamps = reader.timestamps()
        times = [stamps[index] - self._begin for index in self._indices]
        info = replace(reader.info, frames=len(times), duration=end - self._begin)
        super().__init__(info, reader.name, times)

    def __enter__(self) -> VideoSection:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the video."""
        self._reader.close()

    @property
    def begin(self) -> Fraction:
        """Where the part begins in the video, in seconds."""
        return self._begin

    def _wanted(self, selection: Selection) -> list[int]:
        return [self._indices[index] for index in self.indices(selection)]

    def frames(self, selection: Selection, *, size: FrameSize | None = None, alpha: bool = False) -> Iterator[Tensor]:
        """See VideoReader.frames."""
        return self._reader.frames(self._wanted(selection), size=size, alpha=alpha)

    def read(self, selection: Selection, **options: Any) -> Tensor:
        """See VideoReader.read."""
        return self._reader.read(self._wanted(selection), **options)

    def read_images(self, selection: Selection, **options: Any) -> tuple[Tensor, Tensor | None]:
        """See VideoReader.read_images."""
        return self._reader.read_images(self._wanted(selection), **options)

    def audio(
        self, start: Fraction | float | None = None, end: Fraction | float | None = None
    ) -> dict[str, Any] | None:
        """See VideoReader.audio; without an end, up to the end of the part."""
        end = self.info.duration if end is None else Fraction(end)
        return self._reader.audio(self._begin + Fraction(start or 0), self._begin + end)


class TensorVideo(FrameTable):
    """Frames in memory as a video.

    images: floating [N, H, W, 3 or 4] in 0..1. fps: frames a second. audio: AUDIO or None. alpha: [N, H, W] in 0..1,
    1 being opaque, or None. Raises VideoError where there are no frames.
    """

    backend = "memory"

    def __init__(
        self,
        images: Tensor,
        fps: Fraction,
        audio: dict[str, Any] | None = None,
        alpha: Tensor | None = None,
        metadata: dict[str, str] | None = None,
    ) -> None:
        if images.ndim != 4 or 0 in images.shape:
            raise VideoError(f"The video has frames of shape {list(images.shape)}; connect one that has pictures.")
        self._audio, self._images = audio, images[..., :3]
        self._alpha = images[..., 3] if images.shape[3] > 3 else alpha
        count, height, width = images.shape[:3]
        info = VideoInfo(
            path="",
            container="",
            codec="",
            width=width,
            height=height,
            frames=count,
            duration=count / fps,
            fps=fps,
            variable_frame_rate=False,
            rotation=0,
            pixel_format="",
            bit_depth=32,
            color=ColorTags("rgb", "pc"),
            hdr=None,
            has_alpha=self._alpha is not None,
            audio=_audio_info(audio),
            metadata=metadata or {},
        )
        super().__init__(info, "The video", [index / fps for index in range(count)])

    def __enter__(self) -> TensorVideo:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Nothing is open."""

    def frames(self, selection: Selection, *, size: FrameSize | None = None, alpha: bool = False) -> Iterator[Tensor]:
        """See VideoReader.frames."""
        for index in self.indices(selection):
            frame = self._images[index].float()
            if alpha:
                mask = torch.ones_like(frame[..., 0]) if self._alpha is None else self._alpha[index].to(frame)
                frame = torch.cat((frame, mask[..., None]), -1)
            yield placed(frame, size) if size is not None else frame.clone()

    def read(
        self,
        selection: Selection,
        *,
        size: FrameSize | None = None,
        alpha: bool = False,
        on_frame: Callable[[int], None] = _nothing,
    ) -> Tensor:
        """See VideoReader.read."""
        chosen = self.indices(selection)
        on_frame(0)
        result = None
        for done, frame in enumerate(self.frames(chosen, size=size, alpha=alpha), 1):
            result = frame.new_empty(len(chosen), *frame.shape) if result is None else result
            result[done - 1] = frame
            on_frame(done)
        assert result is not None
        return result

    def read_images(self, selection: Selection, **options: Any) -> tuple[Tensor, Tensor | None]:
        """See VideoReader.read_images."""
        if self._alpha is None:
            return self.read(selection, **options), None
        both = self.read(selection, alpha=True, **options)
        return both[..., :3].contiguous(), both[..., 3].contiguous()

    def audio(
        self, start: Fraction | float | None = None, end: Fraction | float | None = None
    ) -> dict[str, Any] | None:
        """See VideoReader.audio."""
        if self._audio is None:
            return None
        rate, waveform = int(self._audio["sample_rate"]), self._audio["waveform"][:1]
        first = round(Fraction(start or 0) * rate)
        whole = max(round(self.info.duration * rate), waveform.shape[2])
        last = whole if end is None else round(Fraction(end) * rate)
        part = waveform[..., first:last].float()
        return {"waveform": pad(part, (0, max(0, last - first - part.shape[2]))), "sample_rate": rate}


def _audio_info(audio: dict[str, Any] | None) -> AudioInfo | None:
    if audio is None:
        return None
    _, channels, samples = audio["waveform"].shape
    rate = int(audio["sample_rate"])
    return AudioInfo("", rate, channels, {1: "mono", 2: "stereo"}.get(channels, ""), Fraction(samples, rate))


def placed(frame: Tensor, size: FrameSize) -> Tensor:
    """A frame [H, W, C] scaled, cropped or padded."""
    place = size.place(frame.shape[1], frame.shape[0])
    picture = frame.permute(2, 0, 1)[None]
    if (place.scaled_height, place.scaled_width) != tuple(frame.shape[:2]):
        picture = interpolate(picture, (place.scaled_height, place.scaled_width), mode="bicubic", antialias=True)
    right = place.width - place.left - place.scaled_width
    bottom = place.height - place.top - place.scaled_height
    picture = pad(picture, (place.left, right, place.top, bottom))
    return picture[0].permute(1, 2, 0).clamp(0, 1).contiguous()
