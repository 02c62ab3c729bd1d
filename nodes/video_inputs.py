"""Inputs that several video nodes have, with the same meaning in each, and the Settings that some of them ask for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io

from ..video.video_formats import QUALITIES, VideoFormat

if TYPE_CHECKING:
    from ..video.comfy_saving import Settings

AUTOMATIC = "automatic"
ENCODERS = (AUTOMATIC, "software only")
AUDIO_CODECS = (AUTOMATIC, "aac", "opus", "pcm")


def fps_input(tooltip: str) -> io.Float.Input:
    """Frames a second of frames that carry no rate."""
    return io.Float.Input("fps", default=16.0, min=0.01, max=240.0, step=0.001, round=0.001, tooltip=tooltip)


def time_input(name: str, tooltip: str, least: float = -1e6) -> io.Float.Input:
    """A moment, or with ``least`` 0 a length, to the microsecond."""
    return io.Float.Input(name, default=0.0, min=least, max=1e6, step=0.001, round=0.000001, tooltip=tooltip)


def prefix_input(tooltip: str) -> io.String.Input:
    """Where a new file goes inside the output folder."""
    return io.String.Input("filename_prefix", default="video/ComfyUI", tooltip=tooltip)


def format_input(known: Mapping[str, VideoFormat], tooltip: str) -> io.Combo.Input:
    """One of the formats ``known``."""
    return io.Combo.Input("format", options=list(known), default="h264-mp4", tooltip=tooltip)


def containers(known: Mapping[str, VideoFormat]) -> dict[str, VideoFormat]:
    """Those of the formats that are video files, not pictures."""
    return {name: video_format for name, video_format in known.items() if video_format.writer == "container"}


def quality_input(tooltip: str, default: str = "standard") -> io.Combo.Input:
    """How much of the picture is kept."""
    return io.Combo.Input("quality", options=list(QUALITIES), default=default, tooltip=tooltip)


def encoder_inputs() -> list[Any]:
    """The advanced inputs ``encoder``, ``audio_codec`` and ``encoder_options``."""
    return [
        io.Combo.Input(
            "encoder",
            options=list(ENCODERS),
            default=AUTOMATIC,
            optional=True,
            advanced=True,
            tooltip="automatic: the Mac's hardware first; software only: slower, smaller at the same quality.",
        ),
        io.Combo.Input(
            "audio_codec",
            options=list(AUDIO_CODECS),
            default=AUTOMATIC,
            optional=True,
            advanced=True,
            tooltip="automatic: AAC in mp4, uncompressed PCM in mov, Opus in webm.",
        ),
        io.String.Input(
            "encoder_options",
            default="",
            optional=True,
            advanced=True,
            tooltip="FFmpeg options for the encoder, such as: preset=slow crf=17. They outdo the quality.",
        ),
    ]


def settings(
    filename_prefix: str,
    format: str,
    quality: str,
    *,
    encoder: str = AUTOMATIC,
    audio_codec: str = AUTOMATIC,
    encoder_options: str = "",
    **playing: Any,
) -> Settings:
    """What the values of these inputs ask for; ``playing``: further fields of Settings, where the node has them."""
    from ..video.comfy_saving import Settings

    return Settings(
        filename_prefix,
        format,
        quality,
        software_only=encoder != AUTOMATIC,
        audio_codec=None if audio_codec == AUTOMATIC else audio_codec,
        encoder_options=encoder_options,
        **playing,
    )
