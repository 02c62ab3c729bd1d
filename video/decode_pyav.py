"""Frames of a video through PyAV, by index: each wanted frame is decoded from the key frame before it and no further.

A selection falls into runs, one for each stretch that is decoded without a seek; a run feeds the decoder from its key
packet to the last packet it needs and then drains it, so that threads and reordering cost no packet too many.
"""

from __future__ import annotations

import logging
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import av

from .decode_index import FrameIndex, Source, decoder, name_of, open_container
from .errors import VideoError

log = logging.getLogger(__name__)

MOST_THREADS = 8  # each holds a frame or more
SHORT_GAP = 4  # packets that are decoded rather than sought past
NEAR = 256  # packets that are read past rather than sought past


@dataclass
class _Run:
    """Wanted frames that one stretch of packets, from `start` to `last`, gives."""

    start: int
    start_pts: int
    last: int
    frames: list[int] = field(default_factory=list)


class PyAVDecoder:
    """Decodes frames of one stream; `decoded_frames` counts what came out of the decoder, wanted or not."""

    backend = "pyav"

    def __init__(self, source: Source, index: FrameIndex, stream_number: int) -> None:
        self._source, self._index, self._stream_number = source, index, stream_number
        self._container: av.container.InputContainer | None = None
        self._packets: Iterator[av.Packet] = iter(())
        self._position = 0  # number of the next packet that _packets gives
        self._keys = {pts: number for number, pts in index.keys}
        self.decoded_frames = 0

    def close(self) -> None:
        if self._container is not None:
            self._container.close()
            self._container = None

    def decode(self, wanted: Sequence[int]) -> Iterator[tuple[int, av.VideoFrame | None]]:
        """Each wanted frame (ascending, no repeats) with its index; None for one that cannot be decoded."""
        for run in self._runs(wanted):
            yield from self._decode_run(run)

    def _runs(self, wanted: Sequence[int]) -> Iterator[_Run]:
        index, run = self._index, None
        for frame in wanted:
            packet = int(index.packets[frame])
            number, pts = index.start_for(frame) if index.timed else (0, 0)
            if run is None or (number > run.last + SHORT_GAP and not index.all_keys):
                if run is not None:
                    yield run
                run = _Run(number, pts, packet)
            run.frames.append(frame)
            run.last = max(run.last, packet)
        if run is not None:
            yield run

    def _decode_run(self, run: _Run) -> Iterator[tuple[int, av.VideoFrame | None]]:
        """Feed the run's packets; frames come out in presentation order."""
        self._go_to(run)
        context = self._context
        index, pending = self._index, list(reversed(run.frames))
        needed = set(index.packets[run.frames].tolist()) if index.all_keys else None
        counted = -1
        while pending:
            packet = None
            if self._position <= run.last or not index.timed:
                packet = next(self._packets, None)
                self._position += packet is not None
            if packet is not None and needed is not None and self._position - 1 not in needed:
                continue
            for decoded in self._frames(context, packet):
                counted += 1
                frame = counted if not index.timed else index.find(decoded.pts) if decoded.pts is not None else None
                while frame is not None and pending and pending[-1] < frame:
                    yield pending.pop(), None
                if pending and pending[-1] == frame:
                    yield pending.pop(), decoded
                    if not pending:
                        break
            if packet is None:
                break
        while pending:
            yield pending.pop(), None
        self._drain(context)

    def _frames(self, context: av.VideoCodecContext, packet: av.Packet | None) -> list[av.VideoFrame]:
        try:
            frames = context.decode(packet)
        except (av.FFmpegError, EOFError) as error:
            log.debug("%s: %s", name_of(self._source), error)
            return []
        self.decoded_frames += len(frames)
        return frames

    def _drain(self, context: av.VideoCodecContext) -> None:
        """Take what is left out of the decoder, so that the next run starts clean."""
        with suppress(av.FFmpegError, EOFError):
            self.decoded_frames += len(context.decode(None))
        context.flush_buffers()

    def _go_to(self, run: _Run) -> None:
        """Let the run's first packet be the next one."""
        if self._container is None or self._position > run.start or run.start - self._position > NEAR:
            self._seek(run)
        while self._position < run.start:
            if next(self._packets, None) is None:
                raise VideoError(f"{name_of(self._source)} has changed or ends too early; load it again.")
            self._position += 1
        self._context.flush_buffers()  # a read that was given up may have left frames, or the end, in the decoder

    def _seek(self, run: _Run) -> None:
        """To the run's key packet where the container finds it, else to one before, else to the start."""
        keys = self._index.keys
        last = bisect_right(keys, run.start, key=lambda key: key[0]) - 1
        for number, pts in (keys[last], keys[max(0, last - 1)], keys[last // 2]):
            if self._index.timed and number > 0 and self._seek_key(pts, run.start):
                return
        self._open()

    def _seek_key(self, pts: int, limit: int) -> bool:
        """Seek to a time; whether the next key packet is one at or before the packet `limit`."""
        if self._container is None:
            self._open()
        assert self._container is not None
        stream = self._container.streams[self._stream_number]
        try:
            self._container.seek(pts, stream=stream, backward=True)
            self._context.flush_buffers()
            packets = (packet for packet in self._container.demux(stream) if packet.size)
            for packet in packets:
                number = self._keys.get(packet.pts) if packet.is_keyframe and packet.pts is not None else None
                if number is not None:
                    if number > limit:
                        return False
                    self._packets, self._position = _chain(packet, packets), number
                    return True
        except av.FFmpegError as error:
            log.debug("%s: seeking to %d failed: %s", name_of(self._source), pts, error)
        return False

    def _open(self) -> None:
        """Start from the first packet, in a container of our own."""
        self.close()
        self._container = container = open_container(self._source)
        stream = container.streams[self._stream_number]
        assert isinstance(stream, av.VideoStream)
        self._context = decoder(stream, min(MOST_THREADS, os.cpu_count() or 1))
        self._packets = _whole(container, stream)
        self._position = 0


def _whole(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.Packet]:
    """All packets with data, up to the end or to damage that the demuxer cannot pass."""
    with suppress(av.FFmpegError, OSError):
        for packet in container.demux(stream):
            if packet.size:
                yield packet


def _chain(first: av.Packet, rest: Iterator[av.Packet]) -> Iterator[av.Packet]:
    yield first
    with suppress(av.FFmpegError, OSError):
        yield from rest
