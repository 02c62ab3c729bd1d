"""Numbered frames and a rising tone, encoded by PyAV as one fixture's file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray
from PIL import Image

from .numbered_picture import picture
from .sound import Sound, wave

Turn = Callable[[NDArray[Any]], NDArray[Any]]


@dataclass(frozen=True)
class Clip:
    """What is encoded: `frames` pictures that show first, first + 1, ..., at `times` or at a constant rate."""

    encoder: str = "libx264"
    pixel_format: str = "yuv420p"
    frames: int = 24
    size: tuple[int, int] = (64, 64)
    fps: Fraction = Fraction(24)
    first: int = 0
    times: tuple[Fraction, ...] | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    container: str | None = None
    container_options: Mapping[str, str] = field(default_factory=dict)
    sound: Sound | None = None
    matrix: str = "bt709"
    primaries: str = "bt709"
    transfer: str = "bt709"
    full_range: bool = False
    alpha: bool = False
    turn: Turn | None = None
    tag: str | None = None

    @property
    def moments(self) -> tuple[Fraction, ...]:
        """Seconds at which frames are shown."""
        return self.times or tuple(index / self.fps for index in range(self.frames))

    @property
    def deep(self) -> bool:
        return any(digits in self.pixel_format for digits in ("p10", "p12", "16"))


def mask(width: int, height: int) -> NDArray[np.float32]:
    """The alpha of every picture of a clip that has one: 1 in the upper half, 0.5 in the lower."""
    alpha = np.ones((height, width), np.float32)
    alpha[height // 2 :] = 0.5
    return alpha


def pictures(clip: Clip) -> Iterator[NDArray[np.float32]]:
    """R'G'B' or R'G'B'A as stored, in presentation order."""
    for number in range(clip.first, clip.first + clip.frames):
        shown = picture(number, *clip.size)
        if clip.transfer == "smpte2084":
            shown = shown * 0.58  # reference white of ITU-R BT.2408: 203 cd/m2
        if clip.transfer == "arib-std-b67":
            shown = shown * 0.75
        if clip.alpha:
            shown = np.concatenate((shown, mask(*clip.size)[..., None]), -1)
        yield np.ascontiguousarray(clip.turn(shown) if clip.turn else shown)


def write(clip: Clip, path: Path) -> None:
    """Encode a clip; the file's ending names the container unless the clip does."""
    os.environ.setdefault("SVT_LOG", "1")  # errors only: SVT-AV1 tells its settings otherwise
    with av.open(str(path), "w", format=clip.container, options=dict(clip.container_options)) as container:
        stream = _video_stream(container, clip)
        sound = _sound_stream(container, clip.sound) if clip.sound else None
        reformatter = VideoReformatter()
        for moment, shown in zip(clip.moments, pictures(clip)):
            frame = _frame(shown, clip, reformatter)
            frame.time_base = stream.codec_context.time_base
            frame.pts = round(moment / frame.time_base)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if sound is not None and clip.sound is not None:
            write_sound(container, sound, clip.sound)


def _video_stream(container: av.container.OutputContainer, clip: Clip) -> av.VideoStream:
    width, height = clip.size
    if clip.turn:
        height, width = clip.turn(np.empty((height, width))).shape
    tags = {"color_primaries": clip.primaries, "color_trc": clip.transfer, "colorspace": clip.matrix}
    tags["color_range"] = "pc" if clip.full_range else "tv"
    tags = {} if clip.pixel_format in NO_TAGS else tags
    stream = container.add_stream(clip.encoder, rate=clip.fps, options={**tags, **clip.options})
    assert isinstance(stream, av.VideoStream)
    stream.width, stream.height = width, height
    stream.pix_fmt = clip.pixel_format
    stream.codec_context.time_base = 1 / clip.fps
    if clip.tag:
        stream.codec_context.codec_tag = clip.tag
    stream.codec_context.thread_count = 1
    return stream


NO_TAGS = ("rgb8", "pal8", "rgb24", "rgba", "bgr0", "bgra", "gbrp")
CODE_POINTS = {"bt709": 1, "smpte170m": 6, "bt2020nc": 9, "bt2020": 9, "smpte2084": 16, "arib-std-b67": 18}
"""Of matrices, primaries and transfer functions in ITU-T H.273."""

MATRICES = {"bt709": 1, "smpte170m": 5, "bt2020nc": 9}
"""libswscale's numbers."""


def _frame(shown: NDArray[np.float32], clip: Clip, reformatter: VideoReformatter) -> av.VideoFrame:
    channels = "rgba" if clip.alpha else "rgb"
    if clip.deep:
        pixels, layout = np.round(shown * 65535).astype(np.uint16), f"{channels}{16 * len(channels)}le"
    else:
        pixels, layout = np.round(shown * 255).astype(np.uint8), "rgba" if clip.alpha else "rgb24"
    frame = av.VideoFrame.from_ndarray(pixels, format=layout)
    if clip.pixel_format in NO_TAGS:
        return frame.reformat(format=clip.pixel_format)
    converted = reformatter.reformat(
        frame,
        format=clip.pixel_format,
        dst_colorspace=MATRICES[clip.matrix],
        dst_color_range="JPEG" if clip.full_range else "MPEG",
    )
    tags = {"colorspace": clip.matrix, "color_primaries": clip.primaries, "color_trc": clip.transfer}
    for name, value in tags.items():
        with suppress(AttributeError):  # PyAV before 16 has some of them on streams only
            setattr(converted, name, CODE_POINTS[value])
    return converted


def _sound_stream(container: av.container.OutputContainer, sound: Sound) -> av.AudioStream:
    stream = container.add_stream(sound.encoder, rate=sound.rate)
    assert isinstance(stream, av.AudioStream)
    stream.layout = sound.layout
    if sound.encoder == "aac":
        stream.bit_rate = 96000 * sound.channels
    return stream


def write_sound(container: av.container.OutputContainer, stream: av.AudioStream, sound: Sound) -> None:
    """Encode the whole of a sound into its stream."""
    samples = wave(sound)
    for begin in range(0, samples.shape[1], 1024):
        piece = np.ascontiguousarray(samples[:, begin : begin + 1024])
        frame = av.AudioFrame.from_ndarray(piece, format="fltp", layout=sound.layout)
        frame.sample_rate = sound.rate
        frame.time_base = Fraction(1, sound.rate)
        frame.pts = begin + int(sound.start * sound.rate)
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def write_sound_only(sound: Sound, path: Path) -> None:
    with av.open(str(path), "w") as container:
        write_sound(container, _sound_stream(container, sound), sound)


def write_webp(clip: Clip, path: Path) -> None:
    """An animated WebP, without loss; FFmpeg's own reader has none."""
    images = [Image.fromarray(np.round(shown * 255).astype(np.uint8)) for shown in pictures(clip)]
    images[0].save(
        path, "WEBP", save_all=True, append_images=images[1:], duration=round(1000 / clip.fps), lossless=True, loop=0
    )
