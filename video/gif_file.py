"""GIF through FFmpeg's palettegen and paletteuse filters: 256 colours chosen from the frames, dithered.

Frames that can be read twice share one palette; of a stream, or where palettegen's option stats_mode=single says so,
each frame gets its own and nothing is kept. Options are those filters' (`ffmpeg -h filter=palettegen`). GIF counts time
in hundredths of a second and loops as its Netscape extension says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from fractions import Fraction
from typing import Any

import av
from torch import Tensor

from .encode_job import EncoderFailed, Job
from .output_file import OutputFile, writing
from .video_formats import VideoEncoder

CLOCK = 100  # ticks a second
PALETTE_PER_FRAME = "stats_mode=single"


def common_palette(frames: Iterable[Tensor], job: Job, on_frame: Callable[[], None]) -> av.VideoFrame | None:
    """The palette of all frames, found frame by frame; on_frame is called before each and may end the search.

    None where there is no frame, or each is to have its own palette.
    """
    encoder = job.format.video_encoders[0]
    if PALETTE_PER_FRAME in job.options(encoder)["palettegen"]:
        return None
    graph = av.filter.Graph()
    source: Any = None
    for index, frame in enumerate(frames):
        on_frame()
        if source is None:
            job.begin(frame)
            source = _source(graph, job, encoder)
            make = graph.add("palettegen", job.options(encoder)["palettegen"])
            source.link_to(make)
            make.link_to(graph.add("buffersink"))
            graph.configure()
        source.push(job.picture(frame, index, encoder))
        with suppress(av.BlockingIOError):
            graph.vpull()  # there is nothing yet, but only this makes the filter take the frame
    if source is None:
        return None
    source.push(None)
    return graph.vpull()


class GifFile:
    """One GIF. Loops for ever unless the job says how often."""

    def __init__(self, job: Job, output: OutputFile, encoder: VideoEncoder) -> None:
        self._job, self._output, self._encoder = job, output, encoder
        self._muxed = 0
        loops = {"loop": str({None: 0, 0: -1}.get(job.loops, job.loops))}  # FFmpeg: 0 for ever, -1 once
        options = job.format.container_options | loops
        with writing(output.path):
            self._container = av.open(str(output.partial), "w", format=job.format.container, options=options)
        try:
            stream = self._container.add_stream(encoder.name, rate=CLOCK)
            assert isinstance(stream, av.VideoStream)
            stream.width, stream.height = job.stored_size(encoder)
            stream.pix_fmt = "pal8"
            stream.codec_context.time_base = Fraction(1, CLOCK)
            self._stream = stream
            self._graph = av.filter.Graph()
            self._source = self._build(self._graph)
        except (av.FFmpegError, ValueError) as error:
            self.close()
            raise EncoderFailed(error, started=False) from error

    def add(self, frame: Tensor, index: int) -> None:
        self._source.push(self._job.picture(frame, index, self._encoder))
        self._pull()

    def finish(self) -> None:
        self._source.push(None)
        self._pull()
        self._mux(None)
        with writing(self._output.path):
            self._container.close()

    def close(self) -> None:
        with suppress(Exception):  # the fragment is removed anyway
            self._container.close()

    def _build(self, graph: av.filter.Graph) -> Any:
        options = self._job.options(self._encoder)
        source = _source(graph, self._job, self._encoder)
        use = graph.add("paletteuse", options["paletteuse"] + ":new=1" * (self._job.palette is None))
        if self._job.palette is None:
            split, make = graph.add("split"), graph.add("palettegen", f"{options['palettegen']}:{PALETTE_PER_FRAME}")
            source.link_to(split)
            split.link_to(use, 0, 0)
            split.link_to(make, 1, 0)
            make.link_to(use, 0, 1)
        else:
            palette = self._job.palette
            colors = graph.add_buffer(
                width=palette.width, height=palette.height, format=palette.format, time_base=Fraction(1, CLOCK)
            )
            source.link_to(use, 0, 0)
            colors.link_to(use, 0, 1)
        use.link_to(graph.add("buffersink"))
        graph.configure()
        if self._job.palette is not None:
            colors.push(self._job.palette)
            colors.push(None)
        return source

    def _pull(self) -> None:
        while True:
            try:
                picture: Any = self._graph.vpull()
            except (av.BlockingIOError, av.EOFError):
                return
            picture.pts = _ticks(round(picture.pts * picture.time_base * self._job.fps), self._job.fps)
            picture.time_base = Fraction(1, CLOCK)
            self._mux(picture)

    def _mux(self, picture: av.VideoFrame | None) -> None:
        try:
            packets = self._stream.encode(picture)
        except av.FFmpegError as error:
            raise EncoderFailed(error, started=True) from error
        with writing(self._output.path):
            for packet in packets:
                self._muxed += 1
                packet.duration = _ticks(self._muxed, self._job.fps) - _ticks(self._muxed - 1, self._job.fps)
                self._container.mux(packet)


def _source(graph: av.filter.Graph, job: Job, encoder: VideoEncoder) -> Any:
    width, height = job.stored_size(encoder)
    return graph.add_buffer(
        width=width, height=height, format=av.VideoFormat(job.pixel_format(encoder)), time_base=1 / job.fps
    )


def _ticks(frames: int, fps: Fraction) -> int:
    return round(frames * CLOCK / fps)
