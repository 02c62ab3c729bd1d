"""The index of a video stream: one pass over its packets gives every frame's exact presentation time.

Nothing but the first frame is decoded, except in streams whose packets do not tell their frames (no timestamps, as in
AVI with B-frames; hidden frames, as in VP8): those are decoded once to count. Packets that an edit list hides are
flagged by FFmpeg's demuxer and dropped by its decoders, so they are no frames here. Pictures before the first one
that can be decoded (an open GOP at the start of a cut file) are none either.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from threading import Lock
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from .errors import VideoError
from .media_info import code_point

log = logging.getLogger(__name__)

Source = Path | BytesIO
PROTOCOLS = "file,crypto,data"  # a playlist or reference file may not reach the network
LIST_FORMATS = {"hls", "concat", "dash", "tty", "ffmetadata", "sdp", "rtsp"}  # formats that hold no video themselves
COUNTED_CODECS = {"vp8", "cinepak", "webp"}  # whose packets may hold no frame, or several
ONE_FRAME_RATE = Fraction(25)
ATTACHED_PICTURE = 0x400  # AV_DISPOSITION_ATTACHED_PIC
OPEN_ERRORS = {
    FileNotFoundError: "does not exist; check the name",
    IsADirectoryError: "is a folder; choose a video file",
    PermissionError: "may not be read; change its permissions",
    av.InvalidDataError: "cannot be read: it is damaged, cut off or not a video; choose another file",
}


def name_of(source: Source) -> str:
    """How messages call a source."""
    return source.name if isinstance(source, Path) else "The video in memory"


@contextmanager
def reading(source: Source) -> Iterator[None]:
    """Turn an error of the system or of FFmpeg into a VideoError that names the source."""
    try:
        yield
    except VideoError:
        raise
    except (OSError, av.FFmpegError, ValueError, UnicodeError) as error:
        for kind, reason in OPEN_ERRORS.items():
            if isinstance(error, kind):
                raise VideoError(f"{name_of(source)} {reason}.") from error
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise VideoError(f"{name_of(source)} cannot be read ({reason}); choose another file.") from error


def open_container(source: Source) -> av.container.InputContainer:
    """Open a file by its content, whatever its name; a BytesIO is left as it is. Raises VideoError."""
    with reading(source):
        if isinstance(source, Path):
            if source.is_dir():
                raise IsADirectoryError
            if source.stat().st_size == 0:
                raise VideoError(f"{name_of(source)} is empty; choose another file.")
        file: Any = f"file:{source}" if isinstance(source, Path) else BytesIO(source.getvalue())
        options = {"protocol_whitelist": PROTOCOLS} if isinstance(source, Path) else {}
        container = av.open(file, options=options, metadata_errors="replace")
    assert isinstance(container, av.container.InputContainer)
    if LIST_FORMATS & set(container.format.name.split(",")):
        container.close()
        raise VideoError(f"{name_of(source)} is not a video but a text or a list; choose a video file.")
    return container


def video_stream(container: av.container.InputContainer, source: Source) -> av.VideoStream:
    """The stream to show: the first one that is no cover picture. Raises VideoError where there is none."""
    streams = [s for s in container.streams.video if s.codec_context is not None]
    moving = [s for s in streams if not code_point(getattr(s, "disposition", 0)) & ATTACHED_PICTURE]
    if moving:
        return moving[0]
    kind = "holds only sound, no video" if container.streams.audio else "holds no video that FFmpeg can decode"
    raise VideoError(f"{name_of(source)} {kind}; choose another file.")


def decoder(stream: av.VideoStream, threads: int = 1) -> av.VideoCodecContext:
    """The codec context to decode a stream with: its own, or libvpx for VP8 and VP9 with alpha in Matroska."""
    context = stream.codec_context
    if stream.metadata.get("alpha_mode", stream.metadata.get("ALPHA_MODE")) == "1" and context.name in ("vp8", "vp9"):
        with suppress(ValueError, av.FFmpegError):
            created = av.CodecContext.create(f"libvpx-{context.name}" if context.name == "vp9" else "libvpx", "r")
            created.extradata = context.extradata
            created.thread_count = threads
            assert isinstance(created, av.VideoCodecContext)
            return created
    context.thread_count = threads
    context.thread_type = "AUTO" if threads != 1 else "SLICE"
    return context


@dataclass
class FrameIndex:
    """The frames of a stream, in presentation order.

    pts: int64 [frames], in units of time_base (counted frames where not `timed`). packets: int64 [frames], the
    number of each frame's packet in decoding order. keys: key packets as (number, pts), ascending. duration: of the
    last frame, in time_base. origin: what to subtract from pts for the clock that starts at 0. timed: whether decoded
    frames are told apart by pts; otherwise by their order from the start.
    """

    time_base: Fraction
    pts: NDArray[np.int64]
    packets: NDArray[np.int64]
    keys: list[tuple[int, int]]
    last_duration: int
    origin: int = 0
    timed: bool = True
    all_keys: bool = False
    first: Any = None
    timestamps: list[Fraction] = field(default_factory=list)
    duration: Fraction = Fraction(0)

    def __post_init__(self) -> None:
        base = self.time_base
        self.timestamps = [(pts - self.origin) * base for pts in self.pts.tolist()]
        self.duration = self.timestamps[-1] + self.last_duration * base if len(self.pts) else Fraction(0)

    def __len__(self) -> int:
        return len(self.pts)

    @property
    def has_open_groups(self) -> bool:
        """Whether frames are shown before the key frame that precedes them in the file (open groups of pictures)."""
        if not self.timed:
            return False
        keys = np.array(self.keys, np.int64)
        before = np.clip(np.searchsorted(keys[:, 0], self.packets, "right") - 1, 0, None)
        return bool((keys[before, 1] > self.pts).any())

    def find(self, pts: int) -> int | None:
        """The index of the frame with this pts."""
        position = int(np.searchsorted(self.pts, pts))
        return position if position < len(self.pts) and self.pts[position] == pts else None

    def start_for(self, frame: int) -> tuple[int, int]:
        """(number, pts) of the key packet from which the frame can be decoded."""
        packet, pts = int(self.packets[frame]), int(self.pts[frame])
        low, high = 0, len(self.keys)
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if self.keys[middle][0] <= packet else (low, middle)
        while low > 1 and self.keys[low - 1][1] > pts:  # a leading picture needs the group before
            low -= 1
        return self.keys[low - 1] if low else self.keys[0]


@dataclass
class _Packets:
    """What the pass over the packets collects."""

    pts: list[int | None] = field(default_factory=list)
    duration: list[int] = field(default_factory=list)
    shown: list[bool] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)


def build_index(source: Source, container: av.container.InputContainer, stream: av.VideoStream) -> FrameIndex:
    """Read all packets of a freshly opened container; `first` of the result is the first decoded frame.

    Raises VideoError where no frame can be decoded.
    """
    packets, context = _Packets(), decoder(stream)
    decoded: list[av.VideoFrame] = []
    for packet in _demux(container, stream):
        number = len(packets.pts)
        packets.pts.append(packet.pts)
        packets.duration.append(packet.duration or 0)
        packets.shown.append(not (getattr(packet, "is_discard", False) or (packet.is_corrupt and number > 0)))
        if packet.is_keyframe:
            packets.keys.append(number)
        if not decoded:  # the first frame to come out is the first one to be shown
            decoded = _decode(context, packet)
    if not decoded:
        decoded = _decode(context, None)
    if not packets.pts or not decoded:
        raise VideoError(f"{name_of(source)} holds no picture that can be decoded; choose another file.")
    index = None if stream.codec_context.name in COUNTED_CODECS else _index_of(packets, decoded, stream)
    if index is None:
        index = _counted(source, stream)
    index.first = decoded[0]
    return index


def _demux(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.Packet]:
    """All packets with data, up to the end or to damage that the demuxer cannot pass."""
    try:
        for packet in container.demux(stream):
            if packet.size:
                yield packet
    except (av.FFmpegError, OSError) as error:
        log.debug("reading ends early: %s", error)


def _decode(context: av.VideoCodecContext, packet: av.Packet | None) -> list[av.VideoFrame]:
    """Frames that come out; a damaged packet gives none."""
    try:
        return context.decode(packet)
    except (av.FFmpegError, EOFError):
        return []


def _index_of(packets: _Packets, decoded: list[av.VideoFrame], stream: av.VideoStream) -> FrameIndex | None:
    """The index from packets alone; None where they do not tell the frames."""
    if not packets.keys or any(pts is None for pts in packets.pts) or any(f.pts is None for f in decoded):
        return None
    pts = np.array(packets.pts, np.int64)
    numbers = np.flatnonzero(packets.shown)
    shown_pts = pts[numbers]
    if len(np.unique(shown_pts)) != len(shown_pts):
        return None
    first = min(frame.pts for frame in decoded if frame.pts is not None)
    keep = shown_pts >= first
    numbers, shown_pts = numbers[keep], shown_pts[keep]
    if not len(numbers):
        return None
    order = np.argsort(shown_pts, kind="stable")
    numbers, shown_pts = numbers[order], shown_pts[order]
    last = packets.duration[int(numbers[-1])] or _usual_step(shown_pts, stream)
    keys = [(number, int(pts[number])) for number in packets.keys]
    assert stream.time_base is not None
    return FrameIndex(
        stream.time_base, shown_pts, numbers, keys, last, _origin(stream), all_keys=len(keys) == len(packets.pts)
    )


def _counted(source: Source, stream: av.VideoStream) -> FrameIndex:
    """The index of a stream that has to be decoded for it."""
    pts: list[int | None] = []
    with open_container(source) as container:
        again = container.streams[stream.index]
        assert isinstance(again, av.VideoStream)
        context = decoder(again, 0)
        for packet in _demux(container, again):
            pts += [frame.pts for frame in _decode(context, packet)]
        pts += [frame.pts for frame in _decode(context, None)]
    if not pts:
        raise VideoError(f"{name_of(source)} holds no picture that can be decoded; choose another file.")
    known = [value for value in pts if value is not None]
    numbers = np.arange(len(pts), dtype=np.int64)
    if len(known) == len(pts) and all(a < b for a, b in pairwise(known)):
        assert stream.time_base is not None
        values = np.array(known, np.int64)
        last = _usual_step(values, stream)
        return FrameIndex(stream.time_base, values, numbers, [(0, known[0])], last, _origin(stream), timed=False)
    rate = stream.average_rate or stream.guessed_rate or ONE_FRAME_RATE
    return FrameIndex(1 / Fraction(rate), numbers, numbers, [(0, 0)], 1, 0, timed=False)


def _usual_step(pts: NDArray[np.int64], stream: av.VideoStream) -> int:
    """How long a frame without a duration lasts: as long as the one before, or by the stream's rate."""
    if len(pts) > 1:
        return int(pts[-1] - pts[-2])
    rate = stream.average_rate or stream.guessed_rate or ONE_FRAME_RATE
    assert stream.time_base is not None
    return max(1, round(1 / (Fraction(rate) * stream.time_base)))


def _origin(stream: av.VideoStream) -> int:
    """Where the clock of a stream starts: 0, or the start of the whole where it means nothing (transport streams)."""
    container: Any = stream.container
    if "mpegts" not in container.format.name and container.format.name not in ("mpeg", "vob"):
        return 0
    assert stream.time_base is not None
    return round(Fraction(container.start_time or 0, av.time_base) / stream.time_base)


class IndexCache:
    """The indices of the files read last, so that several nodes on one file read its packets once."""

    def __init__(self, size: int = 8) -> None:
        self._size, self._lock = size, Lock()
        self._entries: OrderedDict[tuple[str, int, int], Any] = OrderedDict()

    @staticmethod
    def key(path: Path) -> tuple[str, int, int]:
        """Path, size and time of the last change."""
        stat = path.stat()
        return str(path.resolve()), stat.st_size, stat.st_mtime_ns

    def get(self, key: tuple[str, int, int]) -> Any:
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
            return self._entries.get(key)

    def put(self, key: tuple[str, int, int], value: Any) -> None:
        with self._lock:
            self._entries[key] = value
            while len(self._entries) > self._size:
                self._entries.popitem(last=False)

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
