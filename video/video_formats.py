"""Video formats as data: each formats/*.json says which container, encoders and settings one choice in the node means.

A format is added by dropping a file there or into a folder of the user's; hevc-10bit-mp4.json shows every field but
`alpha_pixel_format` and `max_fps`. Option names and values are FFmpeg's (`ffmpeg -h encoder=NAME`), given as strings.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from .color import COLOR_SPACES, ColorSpace
from .errors import VideoError
from .pixel_formats import PIXEL_FORMATS

log = logging.getLogger(__name__)

FOLDER = Path(__file__).parent / "formats"
QUALITIES = ("small", "standard", "high", "best")
WRITERS = ("container", "gif", "webp", "png")
PREVIEWS = ("file", "image", "copy")
COARSEST_CLOCK = 10000  # ticks a second


@dataclass(frozen=True)
class VideoEncoder:
    """One way to encode: an FFmpeg encoder (or Pillow's, for WebP) with its options.

    platform: sys.platform, where it is limited to a system. qualities: QUALITIES -> options. The pixel formats are
    names in PIXEL_FORMATS, the one for frames with alpha None where there is none. label: what the log calls it.
    """

    name: str
    platform: str | None
    options: dict[str, str]
    qualities: dict[str, dict[str, str]]
    pixel_format: str
    alpha_pixel_format: str | None = None
    label: str = ""


@dataclass(frozen=True)
class AudioEncoding:
    """An FFmpeg audio encoder and what the node calls it, the sample rates in Hz that it takes (none listed: any),
    and bits a second for each channel where it has a choice."""

    name: str
    encoder: str
    sample_rates: tuple[int, ...]
    bit_rate_per_channel: int | None

    def sample_rate(self, wanted: int) -> int:
        """The supported rate in Hz that loses least of `wanted`."""
        if not self.sample_rates:
            return wanted
        return min((rate for rate in self.sample_rates if rate >= wanted), default=max(self.sample_rates))


@dataclass(frozen=True)
class VideoFormat:
    """A kind of file with its encoders, the preferred one first.

    writer: what makes the file, one of WRITERS. timescale_option names the container's option for its clock in ticks a
    second, if it has one: the length of a video is exact only on a clock that its frame rate divides. codec: FFmpeg's
    name of what the encoders produce. odd_sizes: whether odd sides are stored as they are. max_fps: the highest rate
    that players keep. preview: what shows it in a browser: the file itself as a video or an image, or a small copy.
    audio: the preferred encoding first; none where the file has no sound.
    """

    name: str
    writer: str
    container: str
    suffix: str
    container_options: dict[str, str]
    timescale_option: str | None
    codec: str | None
    codec_tag: str | None
    odd_sizes: bool
    max_fps: Fraction | None
    preview: str
    color_space: ColorSpace
    video_encoders: tuple[VideoEncoder, ...]
    audio: tuple[AudioEncoding, ...]

    def encoders_here(self, software_only: bool = False) -> list[VideoEncoder]:
        """The encoders meant for this system, in order of preference, or those meant for every system."""
        systems = (None,) if software_only else (None, sys.platform)
        return [encoder for encoder in self.video_encoders if encoder.platform in systems]

    def muxer_options(self, fps: Fraction) -> dict[str, str]:
        """The container's options, with a clock that this frame rate divides."""
        clock = {}
        if self.timescale_option:
            clock[self.timescale_option] = str(fps.numerator * -(-COARSEST_CLOCK // fps.numerator))
        return self.container_options | clock

    def audio_encoding(self, name: str | None = None) -> AudioEncoding | None:
        """The encoding called `name`, the preferred one without a name, None in a format without sound.

        Raises VideoError if the format has sound but not in this encoding.
        """
        if not self.audio:
            return None
        for encoding in self.audio:
            if name in (None, encoding.name):
                return encoding
        known = ", ".join(encoding.name for encoding in self.audio)
        raise VideoError(f"{self.name} cannot hold {name} sound; choose one of {known}, or another format.")


def load_format(path: Path) -> VideoFormat:
    """Read one format file. Raises VideoError with the file's name and the field that is wrong."""
    try:
        return _parse(path.stem, json.loads(path.read_text(encoding="utf-8")))
    except KeyError as error:
        problem = f"it has no field {error}"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        problem = str(error)
    raise VideoError(f"The video format {path.name} cannot be used: {problem}; compare it with h264-mp4.json.")


def load_formats(*folders: Path) -> dict[str, VideoFormat]:
    """All formats of the folders, by default the pack's own, by name; of two with one name the later folder's counts.

    A file that cannot be used is named in the log and left out.
    """
    formats = {}
    for path in format_files(folders or (FOLDER,)):
        try:
            formats[path.stem] = load_format(path)
        except VideoError as error:
            log.warning("%s", error)
    return formats


def format_files(folders: Iterable[Path]) -> list[Path]:
    """The format files of some folders, h264-mp4 first, which plays everywhere; a missing folder has none."""
    paths = [path for folder in folders for path in sorted(folder.glob("*.json"))]
    return sorted(paths, key=lambda path: path.stem != "h264-mp4")


def _parse(name: str, fields: dict[str, Any]) -> VideoFormat:
    video = fields["video"]
    return VideoFormat(
        name=name,
        writer=_one_of(fields.get("writer", "container"), WRITERS),
        container=fields["container"],
        suffix=fields["suffix"],
        container_options=_strings(fields.get("container_options", {})),
        timescale_option=fields.get("timescale_option"),
        codec=fields.get("codec"),
        codec_tag=fields.get("codec_tag"),
        odd_sizes=bool(video.get("odd_sizes", False)),
        max_fps=Fraction(fields["max_fps"]) if "max_fps" in fields else None,
        preview=_one_of(fields.get("preview", "file"), PREVIEWS),
        color_space=COLOR_SPACES[_one_of(video["color_space"], tuple(COLOR_SPACES))],
        video_encoders=tuple(
            encoder for encoder_fields in video["encoders"] for encoder in _encoders(encoder_fields, video)
        ),
        audio=tuple(_audio(audio) for audio in fields.get("audio", [])),
    )


def _encoders(fields: dict[str, Any], video: dict[str, Any]) -> list[VideoEncoder]:
    """An encoder once for each of its "attempts", which are options added in turn."""
    encoders = []
    for added in fields.get("attempts", [{}]):
        label = " ".join([fields["name"], *(f"{key}={value}" for key, value in added.items())])
        alpha = fields.get("alpha_pixel_format", video.get("alpha_pixel_format"))
        encoders.append(
            VideoEncoder(
                name=fields["name"],
                platform=fields.get("platform"),
                options=_strings(fields.get("options", {}) | added),
                qualities={quality: _strings(fields["qualities"][quality]) for quality in QUALITIES},
                pixel_format=_one_of(fields.get("pixel_format", video["pixel_format"]), tuple(PIXEL_FORMATS)),
                alpha_pixel_format=alpha and _one_of(alpha, tuple(PIXEL_FORMATS)),
                label=label,
            )
        )
    return encoders


def _audio(fields: dict[str, Any]) -> AudioEncoding:
    bit_rate = fields.get("bit_rate_per_channel")
    return AudioEncoding(
        name=fields["name"],
        encoder=fields["encoder"],
        sample_rates=tuple(int(rate) for rate in fields.get("sample_rates", [])),
        bit_rate_per_channel=None if bit_rate is None else int(bit_rate),
    )


def _strings(options: dict[str, Any]) -> dict[str, str]:
    return {str(key): str(value) for key, value in options.items()}


def _one_of(value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise ValueError(f"{value!r} is none of {', '.join(known)}")
    return value
