"""Frames, sound and metadata into one playable file, frame by frame, in constant memory.

Frames are ComfyUI's IMAGE values: floating R'G'B' in 0..1. The file is built through PyAV under a hidden name
(output_file.py); of the encoders that the format lists (video_formats.py), the first that opens and encodes is used.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
from torch import Tensor

from .audio import AudioClip, audio_clip
from .color import even_size, rgb_to_yuv420
from .errors import VideoError
from .output_file import OutputFile, writing
from .video_formats import QUALITIES, VideoEncoder, VideoFormat

log = logging.getLogger(__name__)

# Rates of SMPTE that are written rounded: 23.976 (or 23.98) means 24000/1001.
NTSC_RATES = tuple(Fraction(1000 * base, 1001) for base in (12, 15, 24, 30, 48, 60, 120, 240))
NTSC_TOLERANCE = 0.0045
LARGEST_DENOMINATOR = 1000
COARSEST_CLOCK = 10000  # ticks a second
AAC_BITS_PER_SAMPLE = 6  # 6144 bits for 1024 samples of a channel, the most that AAC allows


@dataclass(frozen=True)
class EncodedVideo:
    """What was written: size in pixels, frames, exact rate in frames a second, the encoder, and whether with sound."""

    path: Path
    width: int
    height: int
    frames: int
    fps: Fraction
    encoder: str
    has_audio: bool

    @property
    def duration(self) -> Fraction:
        """Seconds."""
        return self.frames / self.fps


class EncoderFailed(Exception):
    """An encoder cannot be opened, or gave up after it had `started` to take frames; another one may work."""

    def __init__(self, error: Exception, started: bool) -> None:
        super().__init__(str(error))
        self.started = started


@dataclass
class _Job:
    """One attempt at a file: what every step of it needs."""

    format: VideoFormat
    quality: str
    size: tuple[int, int]
    fps: Fraction
    audio: AudioClip | None
    metadata: Mapping[str, str]
    on_frame: Callable[[int], None]
    nan_frames: list[int] = field(default_factory=list)


def frame_rate(fps: float | Fraction) -> Fraction:
    """The exact rate that a written one means: 23.976 -> 24000/1001, 16.0 -> 16, 12.5 -> 25/2.

    Raises VideoError unless it is a positive number.
    """
    if not 0 < fps < float("inf"):
        raise VideoError(f"fps is {fps}; enter a number above 0.")
    nearest = min(NTSC_RATES, key=lambda rate: abs(rate - Fraction(fps)))
    if abs(float(nearest) - float(fps)) < NTSC_TOLERANCE:
        return nearest
    exact = Fraction(fps).limit_denominator(LARGEST_DENOMINATOR)
    return exact if exact > 0 else Fraction(1, LARGEST_DENOMINATOR)


def picture_size(images: Tensor) -> tuple[int, int]:
    """(width, height) of an IMAGE batch. Raises VideoError if it is not one or has no frame."""
    if not isinstance(images, Tensor) or images.ndim != 4:
        shape = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise VideoError(f"The images are {shape}, not [frames, height, width, channels]; connect an IMAGE output.")
    if images.shape[0] == 0:
        raise VideoError("There are no frames to save; check the nodes before this one.")
    return _frame_size(images[0])


def encode_video(
    names: Path | Iterable[Path],
    frames: Tensor | Iterable[Tensor],
    *,
    fps: float | Fraction,
    video_format: VideoFormat,
    quality: str = "standard",
    audio: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
    on_frame: Callable[[int], None] = lambda done: None,
) -> EncodedVideo:
    """Write one video.

    names: the file to write, replaced if it exists once the new one is complete; or candidates, of which the first
    unused one is taken and none is replaced. frames: floating [frames, H, W, C >= 3] or an iterable of [H, W, C],
    any device. fps: frames a second, see `frame_rate`. quality: one of QUALITIES. audio: AUDIO, cut to the video's
    length. metadata: container tags. on_frame: called with the number of frames done so far, before the first and
    after each; what it raises ends the encoding. Nothing is left behind when it fails.
    Raises VideoError, one sentence, for input or a folder that cannot be used.
    """
    if quality not in QUALITIES:
        raise VideoError(f"Quality {quality!r} is none of {', '.join(QUALITIES)}; choose one of them.")
    if isinstance(frames, Tensor):
        picture_size(frames)
    rate, clip = frame_rate(fps), audio_clip(audio)
    if audio is not None and clip is None:
        log.info("The audio is empty; the video is saved without sound.")
    on_frame(0)

    iterator = iter(frames)
    first = next(iterator, None)
    if first is None:
        raise VideoError("There are no frames to save; check the nodes before this one.")
    job = _Job(video_format, quality, _frame_size(first), rate, clip, metadata or {}, on_frame)
    again = None if iterator is frames else frames  # a generator cannot be started over
    candidates = [names] if isinstance(names, Path) else names
    with OutputFile(candidates, replace=isinstance(names, Path)) as output:
        encoder, count = _encode(job, output, itertools.chain([first], iterator), again)
        path = output.publish()
    _tell(job, path, first)
    return EncodedVideo(path, *even_size(*job.size), count, rate, encoder, clip is not None)


def _frame_size(frame: Tensor) -> tuple[int, int]:
    if frame.ndim != 3 or frame.shape[2] < 3 or 0 in frame.shape or not frame.dtype.is_floating_point:
        raise VideoError(
            f"A frame is {frame.dtype} of shape {list(frame.shape)}, not floating [height, width, 3 or 4 channels]; "
            "connect an IMAGE output."
        )
    return frame.shape[1], frame.shape[0]


def _tell(job: _Job, path: Path, frame: Tensor) -> None:
    """One log line for each thing that the user may not expect in the file."""
    if even_size(*job.size) != job.size:
        log.info(
            "%s: %dx%d became %dx%d by repeating the last column or row, because %s needs even sides.",
            path.name, *job.size, *even_size(*job.size), job.format.name,
        )  # fmt: skip
    if frame.shape[2] > 3:
        log.info("%s: the alpha channel is left out, because %s has none.", path.name, job.format.name)
    if job.nan_frames:
        log.warning(
            "%s: %d frames hold NaN, from frame %d on; those pixels are saved as black.",
            path.name, len(job.nan_frames), job.nan_frames[0],
        )  # fmt: skip


def _encode(job: _Job, output: OutputFile, frames: Iterator[Tensor], again: Iterable[Tensor] | None) -> tuple[str, int]:
    """Fill output.partial with the first encoder that works; returns its name and the number of frames."""
    failures: list[str] = []
    for encoder in job.format.encoders_here():
        if failures:
            log.warning("%s; trying %s.", failures[-1], encoder.name)
        try:
            return encoder.name, _encode_with(encoder, job, output, frames)
        except EncoderFailed as error:
            failures.append(f"{encoder.name} failed ({error})")
            if error.started:
                if again is None:
                    break
                frames = iter(again)
    problem = "; ".join(failures) or "no encoder is listed for this system"
    raise VideoError(f"Cannot save {output.path}: {problem}; choose another format, or update the Python package av.")


def _encode_with(encoder: VideoEncoder, job: _Job, output: OutputFile, frames: Iterable[Tensor]) -> int:
    job.nan_frames.clear()
    with _container(job, output) as container:
        video = _video_stream(container, encoder, job)
        audio = _audio_stream(container, job)
        with writing(output.path):
            container.start_encoding()

        count = heard = 0
        for index, frame in enumerate(frames):
            picture = _picture(frame, index, job)
            _mux(container, output, _packets(video, picture))
            count = index + 1
            if audio is not None and job.audio is not None:
                until = int(count * job.audio.sample_rate / job.fps)
                sound = job.audio.frame(heard, until)
                heard = until
                if sound is not None:
                    _mux(container, output, audio.encode(sound))
            job.on_frame(count)
        _mux(container, output, _packets(video, None))
        if audio is not None:
            _mux(container, output, audio.encode(None))
        with writing(output.path):
            container.close()
    return count


@contextmanager
def _container(job: _Job, output: OutputFile) -> Iterator[av.container.OutputContainer]:
    options = dict(job.format.container_options)
    if job.format.timescale_option:
        options[job.format.timescale_option] = str(job.fps.numerator * -(-COARSEST_CLOCK // job.fps.numerator))
    with writing(output.path):
        container = av.open(str(output.partial), "w", format=job.format.container, options=options)
    try:
        container.metadata.update(job.metadata)
        yield container
    except BaseException:
        with suppress(Exception):  # the fragment is removed anyway
            container.close()
        raise


def _video_stream(container: av.container.OutputContainer, encoder: VideoEncoder, job: _Job) -> av.VideoStream:
    """Add the stream and really open its encoder."""
    options = encoder.options | encoder.qualities[job.quality] | job.format.color_space.tags
    try:
        stream = container.add_stream(encoder.name, rate=job.fps)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height = even_size(*job.size)
        stream.pix_fmt = job.format.pixel_format
        stream.codec_context.time_base = 1 / job.fps
        stream.codec_context.options = options
        stream.codec_context.open()
    except (av.FFmpegError, ValueError) as error:
        raise EncoderFailed(error, started=False) from error
    return stream


def _audio_stream(container: av.container.OutputContainer, job: _Job) -> av.AudioStream | None:
    if job.audio is None:
        return None
    encoding, clip = job.format.audio, job.audio
    rate = encoding.sample_rate(clip.sample_rate)
    channels = clip.samples.shape[0]
    try:
        stream = container.add_stream(encoding.encoder, rate=rate, layout=clip.layout)
        assert isinstance(stream, av.AudioStream)
        stream.bit_rate = channels * min(encoding.bit_rate_per_channel, AAC_BITS_PER_SAMPLE * rate)
        stream.codec_context.open()
    except (av.FFmpegError, ValueError) as error:
        raise VideoError(
            f"The audio encoder {encoding.encoder} refused {channels} channels at {clip.sample_rate} Hz; "
            "mix the audio to stereo at 48000 Hz."
        ) from error
    return stream


def _picture(frame: Tensor, index: int, job: _Job) -> av.VideoFrame:
    if _frame_size(frame) != job.size:
        raise VideoError(
            f"Frame {index} is {frame.shape[1]}x{frame.shape[0]} and the first one {job.size[0]}x{job.size[1]}; "
            "resize the frames to one size."
        )
    planes, had_nan = rgb_to_yuv420(frame, job.format.color_space)
    if had_nan:
        job.nan_frames.append(index)
    picture = av.VideoFrame.from_ndarray(planes.cpu().numpy(), format="yuv420p")
    picture.pts = index
    picture.time_base = 1 / job.fps
    picture.color_range = av.video.reformatter.ColorRange.MPEG
    return picture


def _packets(stream: av.VideoStream, picture: av.VideoFrame | None) -> list[av.Packet]:
    """Encode one picture (None: the end); each packet lasts exactly one frame."""
    try:
        packets = stream.encode(picture)
    except av.FFmpegError as error:
        raise EncoderFailed(error, started=True) from error
    for packet in packets:
        packet.duration = round(1 / (stream.codec_context.framerate * packet.time_base))
    return packets


def _mux(container: av.container.OutputContainer, output: OutputFile, packets: list[av.Packet]) -> None:
    with writing(output.path):
        for packet in packets:
            container.mux(packet)
