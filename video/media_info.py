"""What a video file is: size, rate, colours, sound, as read from its headers, its packets and its first frame.

Names of codecs, layouts and colour tags are FFmpeg's; colour code points are those of ITU-T H.273.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any


@dataclass(frozen=True)
class AudioInfo:
    """codec: FFmpeg's decoder. sample_rate in Hz. layout: FFmpeg's name. duration in seconds, None where unknown."""

    codec: str
    sample_rate: int
    channels: int
    layout: str
    duration: Fraction | None


@dataclass(frozen=True)
class ColorTags:
    """FFmpeg's names of a stream's matrix, range, transfer function and primaries; "unspecified" where not tagged."""

    matrix: str = "unspecified"
    range: str = "unspecified"
    transfer: str = "unspecified"
    primaries: str = "unspecified"


@dataclass(frozen=True)
class VideoInfo:
    """A video file.

    width, height: pixels as displayed, rotation applied. frames: the exact number of frames that are shown. duration:
    seconds from 0 on the file's clock to the end of the last frame. fps: mean frames a second. rotation: degrees,
    clockwise, by which the stored picture is turned to be shown; mirrored: it is also flipped left to right before
    that. bit_depth: of one component. hdr: "pq", "hlg" or None.
    """

    path: str
    container: str
    codec: str
    width: int
    height: int
    frames: int
    duration: Fraction
    fps: Fraction
    variable_frame_rate: bool
    rotation: int
    pixel_format: str
    bit_depth: int
    color: ColorTags
    hdr: str | None
    has_alpha: bool
    audio: AudioInfo | None
    metadata: dict[str, str] = field(default_factory=dict)
    mirrored: bool = False


# Code points of ITU-T H.273, tables 2 to 4, with FFmpeg's names; 2 is "unspecified".
MATRICES = {
    0: "rgb", 1: "bt709", 4: "fcc", 5: "bt470bg", 6: "smpte170m", 7: "smpte240m", 8: "ycgco", 9: "bt2020nc",
    10: "bt2020c", 14: "ictcp",
}  # fmt: skip
TRANSFERS = {
    1: "bt709", 4: "gamma22", 5: "gamma28", 6: "smpte170m", 7: "smpte240m", 8: "linear", 11: "iec61966-2-4",
    13: "iec61966-2-1", 14: "bt2020-10", 15: "bt2020-12", 16: "smpte2084", 17: "smpte428", 18: "arib-std-b67",
}  # fmt: skip
PRIMARIES = {
    1: "bt709", 4: "bt470m", 5: "bt470bg", 6: "smpte170m", 7: "smpte240m", 8: "film", 9: "bt2020", 10: "smpte428",
    11: "smpte431", 12: "smpte432", 22: "ebu3213",
}  # fmt: skip
RANGES = {1: "tv", 2: "pc"}
HDR_TRANSFERS = {"smpte2084": "pq", "arib-std-b67": "hlg"}


def code_point(value: Any) -> int:
    """The number of one of PyAV's enumerations, which are integers in some versions and not in others; 0 for None."""
    return int(getattr(value, "value", value) or 0)


def color_tags(frame: Any, codec_context: Any) -> ColorTags:
    """The tags of a decoded frame, or of its codec where PyAV's frames do not carry them (before version 17)."""

    def name(attribute: str, names: dict[int, str]) -> str:
        for holder in (frame, codec_context):
            value = code_point(getattr(holder, attribute, 2 if names is not RANGES else 0))
            if value in names and not (value == 0 and holder is codec_context):
                return names[value]
        return "unspecified"

    return ColorTags(
        name("colorspace", MATRICES),
        name("color_range", RANGES),
        name("color_trc", TRANSFERS),
        name("color_primaries", PRIMARIES),
    )
