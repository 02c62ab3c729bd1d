"""Video formats as data: each formats/*.json says which container, encoders and settings one choice in the node means.

A format is added by dropping a file there; h264-mp4.json shows every field. Option names and values are FFmpeg's
(`ffmpeg -h encoder=NAME`), given as strings.
"""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .color import COLOR_SPACES, ColorSpace
from .errors import VideoError

log = logging.getLogger(__name__)

FOLDER = Path(__file__).parent / "formats"
QUALITIES = ("small", "standard", "high", "best")
PIXEL_FORMATS = ("yuv420p",)


@dataclass(frozen=True)
class VideoEncoder:
    """One FFmpeg encoder; `platform` (sys.platform) limits it to a system, `qualities` maps QUALITIES to options."""

    name: str
    platform: str | None
    options: dict[str, str]
    qualities: dict[str, dict[str, str]]


@dataclass(frozen=True)
class AudioEncoding:
    """An FFmpeg audio encoder, the sample rates in Hz that it takes, and bits a second for each channel."""

    encoder: str
    sample_rates: tuple[int, ...]
    bit_rate_per_channel: int

    def sample_rate(self, wanted: int) -> int:
        """The supported rate in Hz that loses least of `wanted`."""
        return min((rate for rate in self.sample_rates if rate >= wanted), default=max(self.sample_rates))


@dataclass(frozen=True)
class VideoFormat:
    """A container with its encoders, the preferred one first.

    timescale_option names the container's option for its clock in ticks a second, if it has one: the length of a video
    is exact only on a clock that its frame rate divides.
    """

    name: str
    container: str
    suffix: str
    container_options: dict[str, str]
    timescale_option: str | None
    pixel_format: str
    color_space: ColorSpace
    video_encoders: tuple[VideoEncoder, ...]
    audio: AudioEncoding

    def encoders_here(self) -> list[VideoEncoder]:
        """The encoders meant for this system, in order of preference."""
        return [encoder for encoder in self.video_encoders if encoder.platform in (None, sys.platform)]


def load_format(path: Path) -> VideoFormat:
    """Read one format file. Raises VideoError with the file's name and the field that is wrong."""
    try:
        return _parse(path.stem, json.loads(path.read_text(encoding="utf-8")))
    except KeyError as error:
        problem = f"it has no field {error}"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        problem = str(error)
    raise VideoError(f"The video format {path.name} cannot be used: {problem}; compare it with h264-mp4.json.")


def load_formats(folder: Path = FOLDER) -> dict[str, VideoFormat]:
    """All formats of a folder by name; a file that cannot be used is named in the log and left out."""
    formats = {}
    for path in sorted(folder.glob("*.json")):
        try:
            formats[path.stem] = load_format(path)
        except VideoError as error:
            log.warning("%s", error)
    return formats


def _parse(name: str, fields: dict[str, Any]) -> VideoFormat:
    video, audio = fields["video"], fields["audio"]
    return VideoFormat(
        name=name,
        container=fields["container"],
        suffix=fields["suffix"],
        container_options=_strings(fields["container_options"]),
        timescale_option=fields.get("timescale_option"),
        pixel_format=_one_of(video["pixel_format"], PIXEL_FORMATS),
        color_space=COLOR_SPACES[_one_of(video["color_space"], tuple(COLOR_SPACES))],
        video_encoders=tuple(
            VideoEncoder(
                name=encoder["name"],
                platform=encoder.get("platform"),
                options=_strings(encoder["options"]),
                qualities={quality: _strings(encoder["qualities"][quality]) for quality in QUALITIES},
            )
            for encoder in video["encoders"]
        ),
        audio=AudioEncoding(
            encoder=audio["encoder"],
            sample_rates=tuple(int(rate) for rate in audio["sample_rates"]),
            bit_rate_per_channel=int(audio["bit_rate_per_channel"]),
        ),
    )


def _strings(options: dict[str, Any]) -> dict[str, str]:
    return {str(key): str(value) for key, value in options.items()}


def _one_of(value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise ValueError(f"{value!r} is none of {', '.join(known)}")
    return value
