"""ComfyUI's VIDEO values: as files, as open videos, and made from a part of a file.

A VIDEO is a path or a file in memory, perhaps cut to a range of time, or frames that are not encoded yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

from .concatenate import Encoding
from .errors import VideoError
from .reader import FrameSelection, VideoReader, open_video
from .reader_views import TensorVideo, VideoSection
from .trim import trim


def video_file(video: Any, names_for: Callable[[str], Iterable[Path]], encoding: Encoding) -> Path:
    """The file of a VIDEO: its own where it is a whole file on disk, else a new one under one of the names.

    names_for and encoding: as for `trim`, which cuts a VIDEO that is a range of its file. Raises VideoError.
    """
    source = video.get_stream_source()
    path = Path(source) if isinstance(source, str) else _write(source.getbuffer(), names_for(".mp4"))
    if not any(_range(video)):
        return path
    with open_video(path) as reader:
        start, length = trim_window(video, reader)
    selection = FrameSelection(start_time=start, length=length or None)
    return trim(path, names_for, encoding, selection).path


def open_input(video: Any) -> VideoReader | VideoSection | TensorVideo:
    """An open video for a path or a VIDEO of ComfyUI, whole or cut, of a file or of frames. Raises VideoError."""
    from comfy_api.latest import InputImpl

    if isinstance(video, (str, Path)):
        return open_video(video)
    if isinstance(video, InputImpl.VideoFromComponents):
        parts = video.get_components()
        return TensorVideo(parts.images, Fraction(parts.frame_rate), parts.audio, getattr(parts, "alpha", None))
    reader = open_video(video.get_stream_source())
    if not any(_range(video)):
        return reader
    try:
        return VideoSection(reader, *trim_window(video, reader))
    except VideoError:
        reader.close()
        raise


def video_of(reader: VideoReader | VideoSection | TensorVideo, video: Any, selection: FrameSelection) -> Any:
    """A VIDEO of the chosen frames' range, which reads the file only when it is used.

    video: the path or VIDEO that `reader` was opened for. The range has the file's own rate and size.
    """
    from comfy_api.latest import InputImpl

    begin, end = reader.section(selection)
    whole = begin <= reader.timestamps()[0] and end >= reader.info.duration
    if isinstance(video, (str, Path)):
        assert isinstance(reader, VideoReader)
        if whole:
            return InputImpl.VideoFromFile(str(video))
        start = float(begin + reader.clock_origin)
        return InputImpl.VideoFromFile(str(video), start_time=start, duration=float(end - begin))
    if whole:
        return video
    if isinstance(reader, TensorVideo):
        return _components(reader, selection)
    start, _ = _range(video)
    if start < 0 and isinstance(reader, VideoSection):
        start = float(reader.begin)
    origin = float(reader.clock_origin) if isinstance(reader, VideoReader) else 0.0
    return InputImpl.VideoFromFile(
        video.get_stream_source(), start_time=start + origin + float(begin), duration=float(end - begin)
    )


def trim_window(video: Any, reader: VideoReader) -> tuple[float, float]:
    """Start and length in seconds of a VIDEO that was cut, 0 where it was not, by the clock of the file's reader.

    That clock begins with the first frame; ComfyUI's begins with the container's zero, negative starts at the end.
    """
    start, length = _range(video)
    return max(0.0, start - float(reader.clock_origin)) if start > 0 else start, length


def _range(video: Any) -> tuple[float, float]:
    """Start and length in seconds of a VIDEO that was cut, 0 where it was not; ComfyUI before 0.24 does not tell."""
    if hasattr(video, "get_active_trim_window"):
        return video.get_active_trim_window()
    fields = vars(video)
    return fields.get("_VideoFromFile__start_time", 0) or 0, fields.get("_VideoFromFile__duration", 0) or 0


def _components(reader: TensorVideo, selection: FrameSelection) -> Any:
    """A VIDEO of a part of frames in memory."""
    from comfy_api.latest import InputImpl, Types

    begin, end = reader.section(selection)
    chosen = reader.indices(FrameSelection(start_time=begin, end_time=end))
    images = reader.read(chosen)
    parts = Types.VideoComponents(images=images, audio=reader.audio(begin, end), frame_rate=reader.info.fps)
    return InputImpl.VideoFromComponents(parts)


def _write(content: memoryview, names: Iterable[Path]) -> Path:
    for path in names:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            return path
    raise VideoError("The video in memory cannot be written to a file; save it with a node first.")
