"""Frames and sound into a container (MP4, QuickTime, WebM) through FFmpeg's encoders, in constant memory."""

from __future__ import annotations

import os
from contextlib import suppress

import av
from torch import Tensor

from .encode_job import EncoderFailed, Job
from .errors import VideoError
from .output_file import OutputFile, writing
from .video_formats import VideoEncoder

AAC_BITS_PER_SAMPLE = 6  # 6144 bits for 1024 samples of a channel, the most that AAC allows
MOST_REORDERED = 64  # frames between the decoding and the showing of one; H.264 and HEVC allow 16
QUIET = {"SVT_LOG": "1"}  # SVT-AV1 tells its settings on every start unless this says: errors only


class ContainerFile:
    """One attempt at a file with one encoder. Raises EncoderFailed when the encoder cannot be opened."""

    def __init__(self, job: Job, output: OutputFile, encoder: VideoEncoder) -> None:
        self._job, self._output, self._encoder = job, output, encoder
        self._heard = 0
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        with writing(output.path):
            self._container = av.open(
                str(output.partial), "w", format=job.format.container, options=job.format.muxer_options(job.fps)
            )
        try:
            self._container.metadata.update(job.metadata)
            self._video = self._video_stream()
            self._audio = self._audio_stream()
            with writing(output.path):
                self._container.start_encoding()
        except BaseException:
            self.close()
            raise

    def add(self, frame: Tensor, index: int) -> None:
        job = self._job
        picture = job.picture(frame, index, self._encoder)
        for name, value in job.format.color_space.frame_tags.items():
            with suppress(AttributeError):  # PyAV before 17 sets some of them on streams only
                setattr(picture, name, value)
        self._mux(encoded(self._video, picture, started=index > 0))
        if self._audio is not None and job.audio is not None:
            until = int((index + 1) * job.audio.sample_rate / job.fps)
            sound = job.audio.frame(self._heard, until)
            self._heard = until
            if sound is not None:
                self._mux(self._audio.encode(sound))

    def finish(self) -> None:
        self._mux(encoded(self._video, None, started=True))
        if self._audio is not None:
            self._mux(self._audio.encode(None))
        with writing(self._output.path):
            self._container.close()

    def close(self) -> None:
        with suppress(Exception):  # the fragment is removed anyway
            self._container.close()

    def _video_stream(self) -> av.VideoStream:
        """Add the stream and really open its encoder."""
        job, encoder = self._job, self._encoder
        try:
            stream = self._container.add_stream(encoder.name, rate=job.fps)
            assert isinstance(stream, av.VideoStream)
            context = stream.codec_context
            stream.width, stream.height = job.stored_size(encoder)
            stream.pix_fmt = job.pixel_format(encoder)
            context.time_base = 1 / job.fps
            context.options = job.options(encoder) | job.format.color_space.tags
            if job.format.codec_tag:
                context.codec_tag = job.format.codec_tag
            context.open()
        except (av.FFmpegError, ValueError) as error:
            raise EncoderFailed(error, started=False) from error
        unknown = sorted(context.options.keys() & job.encoder_options.keys())
        if unknown:
            raise VideoError(f"{encoder.name} has no option {unknown[0]!r}; correct or clear the encoder options.")
        return stream

    def _audio_stream(self) -> av.AudioStream | None:
        encoding, clip = self._job.audio_encoding, self._job.audio
        if clip is None or encoding is None:
            return None
        rate = encoding.sample_rate(clip.sample_rate)
        channels = clip.samples.shape[0]
        try:
            stream = self._container.add_stream(encoding.encoder, rate=rate, layout=clip.layout)
            assert isinstance(stream, av.AudioStream)
            if encoding.bit_rate_per_channel is not None:
                stream.bit_rate = channels * min(encoding.bit_rate_per_channel, AAC_BITS_PER_SAMPLE * rate)
            stream.codec_context.open()
        except (av.FFmpegError, ValueError) as error:
            raise VideoError(
                f"The audio encoder {encoding.encoder} refused {channels} channels at {clip.sample_rate} Hz; "
                "mix the audio to stereo at 48000 Hz."
            ) from error
        return stream

    def _mux(self, packets: list[av.Packet]) -> None:
        with writing(self._output.path):
            for packet in packets:
                self._container.mux(packet)


def encoded(stream: av.VideoStream, picture: av.VideoFrame | None, started: bool) -> list[av.Packet]:
    """Encode one picture (None: the end); each packet lasts exactly one frame.

    x265 leaves the decoding time of clips that are shorter than its reordering to chance; nothing is reordered there.
    """
    try:
        packets = stream.encode(picture)
    except av.FFmpegError as error:
        raise EncoderFailed(error, started) from error
    for packet in packets:
        packet.duration = round(1 / (stream.codec_context.framerate * packet.time_base))
        late = None if packet.pts is None or packet.dts is None else packet.pts - packet.dts
        if late is None or not 0 <= late <= MOST_REORDERED * packet.duration:
            packet.dts = packet.pts
    return packets
