"""Videos as frames and sound: exact, by index or by time, in flat memory.

PyAV reads every file. eva-decord reads the same frames on request where it can be trusted with them (see
decode_decord.py); "auto" means PyAV, which is the faster of the two wherever both were measured (README, benchmarks/
video_read.py) and the only one that interpolates chroma.
"""

from __future__ import annotations

import logging
import os
import struct
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from fractions import Fraction
from io import BytesIO
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import audio_reading
from .decode_color import PictureColor, is_rgb, picture_color
from .decode_convert import FrameConverter, Orientation, PictureFormat
from .decode_index import FrameIndex, IndexCache, Source, build_index, name_of, open_container, reading, video_stream
from .decode_pillow import PillowDecoder, is_webp
from .decode_pillow import build_index as build_webp_index
from .decode_pyav import PyAVDecoder
from .errors import VideoError
from .geometry import FrameSize, Placement
from .media_info import HDR_TRANSFERS, AudioInfo, ColorTags, VideoInfo, color_tags
from .selection import FrameSelection

__all__ = ["AudioInfo", "ColorTags", "FrameSelection", "FrameSize", "VideoInfo", "VideoReader", "open_video"]

log = logging.getLogger(__name__)

Backend = Literal["auto", "pyav", "decord"]
Selection = FrameSelection | Sequence[int]
MOST_WORKERS = 3  # each holds the temporaries of one frame
_cache = IndexCache()


@dataclass
class _Opened:
    """What the pass over a file's packets gave."""

    info: VideoInfo
    index: FrameIndex
    picture: PictureFormat
    stream: int
    pillow: bool = False


def open_video(source: str | Path | BytesIO, *, backend: Backend = "auto") -> VideoReader:
    """Open a video by its content, whatever its name.

    source: a path, or the whole file in memory, which is left where it stands. backend: "auto" and "pyav" read
    everything; "decord" needs eva-decord and a file that it reads exactly. Raises VideoError, one sentence, for what
    is no video or cannot be read.
    """
    where: Source = source if isinstance(source, BytesIO) else Path(source)
    with reading(where):
        key = _cache.key(where) if isinstance(where, Path) and where.is_file() else None
    opened = _cache.get(key) if key is not None else None
    if opened is None:
        opened = _open(where)
        if key is not None:
            _cache.put(key, opened)
    return VideoReader(where, opened, backend)


def forget_indices() -> None:
    """Let the next `open_video` of a file read its packets again."""
    _cache.clear()


class FrameTable:
    """Frames with times, and what a selection means for them. `info`: VideoInfo; `name`: how messages call it."""

    def __init__(self, info: VideoInfo, name: str, timestamps: list[Fraction]) -> None:
        self.info, self.name, self._timestamps = info, name, timestamps

    def timestamps(self) -> list[Fraction]:
        """When each frame is shown, in exact seconds, by index."""
        return list(self._timestamps)

    def indices(self, selection: Selection) -> list[int]:
        """Frames that a selection means; raises VideoError where there is none or one is out of range."""
        if isinstance(selection, FrameSelection):
            chosen = selection.indices(self._timestamps, self.info.duration)
            if not chosen:
                raise VideoError(
                    f"{self.name} has no frame in the chosen range; it has {self.info.frames} frames in "
                    f"{float(self.info.duration):.3f} seconds."
                )
            return chosen
        count = self.info.frames
        chosen = [int(i) + count if int(i) < 0 else int(i) for i in selection]
        wrong = next((i for i, c in zip(selection, chosen) if not 0 <= c < count), None)
        if wrong is not None:
            raise VideoError(
                f"{self.name} has no frame {wrong}; it has {count}, numbered 0 to {count - 1} or from -{count} to -1."
            )
        return chosen

    def section(self, selection: FrameSelection) -> tuple[Fraction, Fraction]:
        """Begin and end of the chosen frames in seconds, for `audio`."""
        return selection.section(self._timestamps, self.info.duration)


class VideoReader(FrameTable):
    """An open video; a context manager. `info` tells what it is, `backend` who decodes it ("pyav" or "decord")."""

    def __init__(self, source: Source, opened: _Opened, backend: Backend) -> None:
        super().__init__(opened.info, name_of(source), opened.index.timestamps)
        self._source, self._index, self._picture = source, opened.index, opened.picture
        self._decoder: PyAVDecoder | PillowDecoder
        self._decoder = PillowDecoder(source) if opened.pillow else PyAVDecoder(source, opened.index, opened.stream)
        self._decord: Any = None
        if backend == "decord":
            from .decode_decord import DecordFrames

            self._decord = DecordFrames(source, opened.info, opened.index)
        self.backend = "pyav" if self._decord is None else "decord"

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; may be called twice."""
        self._decoder.close()

    @property
    def decoded_frames(self) -> int:
        """How many frames have been decoded so far, wanted or not."""
        return self._decoder.decoded_frames

    @property
    def key_frames(self) -> list[int]:
        """Indices of the frames that can be decoded by themselves."""
        packets = {int(packet): frame for frame, packet in enumerate(self._index.packets.tolist())}
        return sorted(packets[number] for number, _ in self._index.keys if number in packets)

    def frames(self, selection: Selection, *, size: FrameSize | None = None, alpha: bool = False) -> Iterator[Tensor]:
        """The chosen frames one by one, each float32 [H, W, 3 or 4] in 0..1 of its own memory.

        A few frames are decoded ahead; memory does not grow with their number. alpha: a fourth channel, 1 where the
        video has none.
        """
        place = self._place(size)
        shape = (place.height, place.width, 4 if alpha else 3)

        def new(position: int) -> _Buffer:
            return _Buffer.of(np.empty(shape, np.float32))

        for _, repeats, buffer in self._good(self.indices(selection), place, alpha, new):
            frame = torch.from_numpy(buffer.whole)
            for repeat in range(repeats):
                yield frame if repeat == 0 else frame.clone()

    def read(
        self,
        selection: Selection,
        *,
        size: FrameSize | None = None,
        alpha: bool = False,
        on_frame: Callable[[int], None] = lambda done: None,
    ) -> Tensor:
        """The chosen frames, float32 [N, H, W, 3 or 4] in 0..1, decoded straight into the result.

        on_frame: called with the number of frames done so far, before the first and after each; what it raises ends
        the reading.
        """
        chosen, place = self.indices(selection), self._place(size)
        result = self._room(len(chosen), place, 4 if alpha else 3)
        rows = result.numpy()
        self._fill(chosen, place, alpha, lambda at: _Buffer.of(rows[at]), on_frame)
        return result

    def read_images(
        self,
        selection: Selection,
        *,
        size: FrameSize | None = None,
        on_frame: Callable[[int], None] = lambda done: None,
    ) -> tuple[Tensor, Tensor | None]:
        """The chosen frames, float32 [N, H, W, 3], and their alpha, [N, H, W], None for a video without; see `read`."""
        chosen, place = self.indices(selection), self._place(size)
        images = self._room(len(chosen), place, 3)
        alpha = self._room(len(chosen), place, 1)[..., 0] if self.info.has_alpha else None
        rows, masks = images.numpy(), None if alpha is None else alpha.numpy()

        def row(at: int) -> _Buffer:
            return _Buffer(rows[at], None if masks is None else masks[at], rows[at])

        self._fill(chosen, place, alpha is not None, row, on_frame)
        return images, alpha

    def audio(
        self, start: Fraction | float | None = None, end: Fraction | float | None = None
    ) -> dict[str, Any] | None:
        """The sound from `start` to `end` seconds as AUDIO, waveform float32 [1, C, T] and sample_rate; None without.

        T is round(end x rate) - round(start x rate), silence where the file has none; without an end, up to that of
        the longer of video and sound.
        """
        return audio_reading.read_audio(self._source, self.info, start, end, self._origin)

    @property
    def _origin(self) -> Fraction:
        return self._index.origin * self._index.time_base

    @property
    def clock_origin(self) -> Fraction:
        """What ComfyUI's own VIDEO calls the moment 0, in seconds; not 0 in transport streams."""
        return self._origin

    def _place(self, size: FrameSize | None) -> Placement:
        return (size or FrameSize()).place(self.info.width, self.info.height)

    def _room(self, count: int, place: Placement, channels: int) -> Tensor:
        """Room for frames, float32 [count, H, W, channels], not initialised."""
        try:
            return torch.empty(count, place.height, place.width, channels)
        except RuntimeError as error:
            raise VideoError(
                f"{count} frames of {place.width}x{place.height} do not fit into memory; choose fewer or smaller ones."
            ) from error

    def _fill(
        self,
        chosen: list[int],
        place: Placement,
        alpha: bool,
        row: Callable[[int], _Buffer],
        on_frame: Callable[[int], None],
    ) -> None:
        """Write each chosen frame, in whatever order, into its row."""
        on_frame(0)
        order = sorted(range(len(chosen)), key=chosen.__getitem__)
        done = 0
        ordered = [chosen[at] for at in order]
        for position, repeats, buffer in self._good(ordered, place, alpha, lambda at: row(order[at])):
            for at in range(position + 1, position + repeats):
                row(order[at]).copy(buffer)
            done += repeats
            on_frame(done)

    def _good(
        self, chosen: list[int], place: Placement, alpha: bool, target: Callable[[int], _Buffer]
    ) -> Iterator[tuple[int, int, _Buffer]]:
        """(position of the first of equal indices, how many, frame) in order; damaged frames are mended."""
        items = self._converted(chosen, place, alpha, target)
        try:
            yield from _mended(items, target, self.name)
        finally:
            items.close()

    def _converted(
        self, chosen: list[int], place: Placement, alpha: bool, target: Callable[[int], _Buffer]
    ) -> Generator[tuple[int, int, _Buffer | None], None, None]:
        """The same with None for damaged frames; conversion runs beside decoding."""
        picture_format = self._picture if self._decord is None else PictureFormat(PictureColor("rgb", True))
        converter = FrameConverter(picture_format, place, alpha)
        groups = [(index, len(list(same))) for index, same in groupby(chosen)]
        wanted = [index for index, _ in groups]
        if sorted(set(wanted)) != wanted:
            raise VideoError("Frames can be streamed in ascending order only; use read() for another order.")
        decoder: Any = self._decoder if self._decord is None else self._decord
        workers = max(1, min(MOST_WORKERS, os.cpu_count() or 1))
        waiting: deque[tuple[int, int, Future[_Buffer] | None]] = deque()
        position = 0
        pool = ThreadPoolExecutor(workers, "video")
        try:
            for (_, repeats), (_, picture) in zip(groups, decoder.decode(wanted)):
                future = None if picture is None else pool.submit(_convert, converter, picture, target(position))
                del picture
                waiting.append((position, repeats, future))
                position += repeats
                if len(waiting) > workers:
                    yield _finished(waiting.popleft())
            while waiting:
                yield _finished(waiting.popleft())
        finally:
            for _, _, future in waiting:
                if future is not None:
                    future.cancel()
            pool.shutdown(wait=True)


@dataclass
class _Buffer:
    """Where one frame goes: rgb [H, W, 3], alpha [H, W] or None, and the array that holds both or the first."""

    rgb: NDArray[np.float32]
    alpha: NDArray[np.float32] | None
    whole: NDArray[np.float32]

    @classmethod
    def of(cls, whole: NDArray[np.float32]) -> _Buffer:
        """Of one array [H, W, 3 or 4]."""
        return cls(whole[..., :3], whole[..., 3] if whole.shape[2] > 3 else None, whole)

    def copy(self, other: _Buffer) -> _Buffer:
        self.rgb[:] = other.rgb
        if self.alpha is not None and other.alpha is not None:
            self.alpha[:] = other.alpha
        return self


def _convert(converter: FrameConverter, picture: Any, buffer: _Buffer) -> _Buffer:
    converter.convert(picture, buffer.rgb, buffer.alpha)
    return buffer


def _finished(item: tuple[int, int, Future[_Buffer] | None]) -> tuple[int, int, _Buffer | None]:
    position, repeats, future = item
    return position, repeats, None if future is None else future.result()


def _mended(
    items: Iterator[tuple[int, int, _Buffer | None]], target: Callable[[int], _Buffer], name: str
) -> Iterator[tuple[int, int, _Buffer]]:
    """The same with a good frame in the place of each damaged one: the one before, or the first good one."""
    last: _Buffer | None = None
    damaged = 0
    owed: list[tuple[int, int]] = []
    for position, repeats, frame in items:
        damaged += frame is None
        if frame is None:
            owed.append((position, repeats))
        last = frame or last
        if last is None:
            continue
        for at, times in owed:
            yield at, times, target(at).copy(last)
        owed.clear()
        if frame is not None:
            yield position, repeats, frame
    if owed:
        raise VideoError(f"{name} is damaged: none of the chosen frames can be decoded; choose others or another file.")
    if damaged:
        log.warning("%s: %d frames are damaged; each shows the frame before it.", name, damaged)


def _open(source: Source) -> _Opened:
    """Read headers, packets and the first frame."""
    if is_webp(source):
        index, frame = build_webp_index(source)
        info = _describe(source, index, frame, "webp", "webp", ColorTags("rgb", "pc"), Fraction(0))
        return _Opened(info, index, PictureFormat(PictureColor("rgb", True), info.has_alpha), 0, pillow=True)
    with open_container(source) as container, reading(source):
        stream = video_stream(container, source)
        index = build_index(source, container, stream)
        frame, index.first = index.first, None
        codec = CODEC_NAMES.get(stream.codec_context.name, stream.codec_context.name)
        tags = color_tags(frame, stream.codec_context)
        tags = replace(tags, matrix=_matrix_name(tags.matrix, frame.format.name))
        rate = _named_rate(index, stream)
        info = _describe(source, index, frame, container.format.name, codec, tags, rate)
        info = replace(info, audio=audio_reading.audio_info(container), metadata=dict(container.metadata))
        picture = PictureFormat(
            picture_color(tags, frame.format.name, codec, frame.width, frame.height),
            info.has_alpha,
            info.hdr,
            tags.primaries in ("bt2020", "unspecified"),
            _orientation(frame),
        )
        return _Opened(info, index, picture, stream.index)


def _describe(
    source: Source, index: FrameIndex, frame: Any, container: str, codec: str, tags: ColorTags, rate: Fraction
) -> VideoInfo:
    """What index and first frame tell; sound and metadata are filled in by the caller."""
    orientation = _orientation(frame)
    width, height = (frame.height, frame.width) if orientation.swaps else (frame.width, frame.height)
    return VideoInfo(
        path=str(source) if isinstance(source, Path) else "",
        container=container,
        codec=codec,
        width=width,
        height=height,
        frames=len(index),
        duration=index.duration,
        fps=rate or _mean_rate(index),
        variable_frame_rate=_variable(index),
        rotation=orientation.quarter_turns * 90,
        pixel_format=frame.format.name,
        bit_depth=max(component.bits for component in frame.format.components),
        color=tags,
        hdr=HDR_TRANSFERS.get(tags.transfer),
        has_alpha=has_alpha(frame.format),
        audio=None,
        mirrored=orientation.mirrored,
    )


CODEC_NAMES = {"libvpx-vp9": "vp9", "libvpx": "vp8", "libdav1d": "av1", "libaom-av1": "av1"}


def _matrix_name(matrix: str, pixel_format: str) -> str:
    """The tag, unless it contradicts the pixel format."""
    if is_rgb(pixel_format):
        return "rgb"
    return "unspecified" if matrix == "rgb" else matrix


def has_alpha(pixel_format: Any) -> bool:
    """Whether FFmpeg's pixel format has an alpha component (or a palette, which may)."""
    return pixel_format.name.startswith(ALPHA_PREFIXES) or any(c.is_alpha for c in pixel_format.components)


ALPHA_PREFIXES = ("yuva", "rgba", "bgra", "argb", "abgr", "gbrap", "ya8", "ya16", "pal8")


def _orientation(frame: Any) -> Orientation:
    """From the display matrix: which stored axis is shown along which, a, b, c and d of ISO/IEC 14496-12, 8.3.2."""
    data = next((side for side in frame.side_data if "DISPLAYMATRIX" in str(side.type)), None)
    if data is None:
        return Orientation()
    a, b, _, c, d = struct.unpack("<5i", bytes(data)[:20])
    horizontal = abs(a) >= abs(b)
    mirrored = (a * d - b * c) < 0
    turns = (0 if (a < 0) == mirrored else 2) if horizontal else 1 if (b > 0) != mirrored else 3
    return Orientation(turns, mirrored)


def _named_rate(index: FrameIndex, stream: Any) -> Fraction:
    """The stream's own figure in frames a second where the frames agree with it, else 0."""
    length = index.duration - index.timestamps[0]
    for rate in (stream.average_rate, stream.guessed_rate):
        if rate and abs(rate * length - len(index)) < Fraction(1, 2):
            return Fraction(rate)
    return Fraction(0)


def _mean_rate(index: FrameIndex) -> Fraction:
    """Frames a second over the whole clip."""
    length = index.duration - index.timestamps[0]
    return (len(index) / length).limit_denominator(100_000) if length > 0 else Fraction(1)


def _variable(index: FrameIndex) -> bool:
    """Whether frames last differently long, by more than the rounding of the file's clock."""
    if len(index) < 3:
        return False
    steps = np.diff(index.pts)
    return bool(steps.max() - steps.min() > 1 + 0.01 * float(np.median(steps)))
