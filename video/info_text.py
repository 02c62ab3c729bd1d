"""What a video file is, as text that people read and as data for scripts."""

from __future__ import annotations

from dataclasses import asdict
from fractions import Fraction
from typing import Any

from .media_info import VideoInfo

HDR_NAMES = {"pq": "HDR (PQ), tone-mapped when loaded", "hlg": "HDR (HLG), tone-mapped when loaded"}


def info_text(info: VideoInfo) -> str:
    """One line for each thing worth knowing."""
    rate = f"{float(info.fps):.6g} fps" + (" on average (variable)" if info.variable_frame_rate else "")
    color = info.color
    lines = [
        f"{info.width}x{info.height}, {info.frames} frames, {float(info.duration):.3f} s, {rate}",
        f"{info.codec or 'frames in memory'} {info.pixel_format} {info.bit_depth} bit {info.container}".rstrip(),
        f"colour: matrix {color.matrix}, range {color.range}, transfer {color.transfer}, primaries {color.primaries}",
    ]
    if info.hdr:
        lines.append(HDR_NAMES[info.hdr])
    if info.rotation or info.mirrored:
        lines.append(f"turned by {info.rotation} degrees{', mirrored' if info.mirrored else ''} when shown")
    if info.has_alpha:
        lines.append("with transparency")
    audio = info.audio
    if audio is None:
        lines.append("no sound")
    else:
        length = f", {float(audio.duration):.3f} s" if audio.duration is not None else ""
        lines.append(f"sound: {audio.codec} {audio.sample_rate} Hz {audio.layout or audio.channels}{length}")
    return "\n".join(lines)


def info_data(info: VideoInfo) -> dict[str, Any]:
    """Everything, ready for JSON: fractions as text."""
    return _plain(asdict(info))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return str(value) if isinstance(value, Fraction) else value
