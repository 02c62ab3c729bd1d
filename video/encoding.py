"""Frames, sound and metadata into one file of any video format, frame by frame, in constant memory.

Frames are ComfyUI's IMAGE values: floating R'G'B' in 0..1, all at once, as an iterable, or pushed chunk by chunk. The
file is built under a hidden name (output_file.py); of the encoders that the format lists (video_formats.py), the first
that opens and encodes is used.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Any

from torch import Tensor

from .audio import audio_clip
from .container_file import ContainerFile
from .encode_job import EncodedVideo, EncoderFailed, FrameWriter, Job, frame_size
from .errors import VideoError
from .gif_file import GifFile, common_palette
from .image_files import PngEncoder, PngFolder, WebpFile
from .output_file import OutputFile, OutputFolder, writing
from .video_formats import FOLDER, QUALITIES, VideoEncoder, VideoFormat, load_format

__all__ = ["EncodedVideo", "VideoWriter", "encode_video", "frame_rate", "picture_size", "save_picture"]

log = logging.getLogger(__name__)

# Rates of SMPTE that are written rounded: 23.976 (or 23.98) means 24000/1001.
NTSC_RATES = tuple(Fraction(1000 * base, 1001) for base in (12, 15, 24, 30, 48, 60, 120, 240))
NTSC_TOLERANCE = 0.0045
LARGEST_DENOMINATOR = 1000
WRITERS: dict[str, Callable[..., FrameWriter]] = {
    "container": ContainerFile,
    "gif": GifFile,
    "webp": WebpFile,
    "png": PngFolder,
}


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
    return frame_size(images[0])


class VideoWriter:
    """One video to which frames are pushed: ``with VideoWriter(path, fps=16, video_format=f) as writer:``, any number
    of ``writer.write(frames)``, then ``writer.finish()``; without that nothing is left behind.

    names: the file to write, replaced if it exists once the new one is complete; or candidates, of which the first
    unused one is taken and none is replaced; for an image sequence the folder, which is never replaced. fps: frames a
    second, see `frame_rate`. quality: one of QUALITIES. audio: AUDIO, cut to the video's length. audio_codec: one that
    the format lists, by default its first. metadata: tags. encoder_options: FFmpeg options that outdo the format's.
    software_only: leave out encoders of one system, such as VideoToolbox. loops: how often the player of a GIF or WebP
    repeats it, None for ever. on_frame: called with the number of frames done so far, before the first and after each;
    what it raises ends the encoding.
    Raises VideoError, one sentence, for input or a folder that cannot be used.
    """

    def __init__(
        self,
        names: Path | Iterable[Path],
        *,
        fps: float | Fraction,
        video_format: VideoFormat,
        quality: str = "standard",
        audio: Mapping[str, Any] | None = None,
        audio_codec: str | None = None,
        metadata: Mapping[str, str] | None = None,
        encoder_options: Mapping[str, str] | None = None,
        software_only: bool = False,
        loops: int | None = None,
        on_frame: Callable[[int], None] = lambda done: None,
    ) -> None:
        if quality not in QUALITIES:
            raise VideoError(f"Quality {quality!r} is none of {', '.join(QUALITIES)}; choose one of them.")
        clip, rate = audio_clip(audio), frame_rate(fps)
        self._kept = min(Fraction(1), (video_format.max_fps or rate) / rate)
        self.job = Job(
            video_format,
            quality,
            rate * self._kept,
            clip,
            video_format.audio_encoding(audio_codec) if clip is not None else None,
            metadata or {},
            encoder_options or {},
            loops,
        )
        if audio is not None and clip is None:
            log.info("The audio is empty; the video is saved without sound.")
        candidates = [names] if isinstance(names, Path) else names
        if video_format.writer == "png":
            self._output: Any = OutputFolder(candidates)
        else:
            self._output = OutputFile(candidates, replace=isinstance(names, Path))
        self._encoders: Iterator[VideoEncoder] = iter(video_format.encoders_here(software_only))
        self._encoder: VideoEncoder | None = None
        self._writer: FrameWriter | None = None
        self._failures: list[str] = []
        self._on_frame = on_frame
        self._taken = self._written = 0

    def __enter__(self) -> VideoWriter:
        self._output.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._abandon()
        self._output.__exit__(*exception)

    def write(self, frames: Tensor | Iterable[Tensor]) -> None:
        """Add frames: floating [frames, H, W, C >= 3], one of [H, W, C], or an iterable of those; any device."""
        try:
            for frame in [frames] if isinstance(frames, Tensor) and frames.ndim == 3 else frames:
                self._add(frame)
        except EncoderFailed as error:
            raise self._hopeless(error) from error

    def finish(self) -> EncodedVideo:
        """Complete the file and move it into place."""
        try:
            return self._finish()
        except EncoderFailed as error:
            raise self._hopeless(error) from error

    def write_all(self, frames: Tensor | Iterable[Tensor]) -> EncodedVideo:
        """Write and finish. Frames that can be read again start over with the next encoder when one gives up."""
        again = iter(frames) is not frames  # an iterator or a generator cannot be started over
        if again and self.job.format.writer == "gif":
            self.job.palette = common_palette(frames, self.job, lambda: self._on_frame(0))
        while True:
            try:
                for frame in frames:
                    self._add(frame)
                return self._finish()
            except EncoderFailed as error:
                if not again:
                    raise self._hopeless(error) from error
                self._start_over(error)

    def _add(self, frame: Tensor) -> None:
        """Add one frame. Raises EncoderFailed if the encoder gave up after its first one."""
        if self._taken == 0:
            self._on_frame(0)
        while ceil((self._taken + 1) * self._kept) > self._written:
            if self._written == 0:
                self.job.begin(frame)
            try:
                (self._writer or self._start()).add(frame, self._written)
                self._written += 1
            except EncoderFailed as error:
                if self._written > 0:
                    raise
                self._start_over(error)
        self._taken += 1
        self._on_frame(self._taken)

    def _finish(self) -> EncodedVideo:
        job, encoder = self.job, self._encoder
        if self._writer is None or encoder is None:
            raise VideoError("There are no frames to save; check the nodes before this one.")
        self._writer.finish()
        self._writer = None
        path = self._output.publish()
        job.tell(path, encoder)
        if self._kept < 1:
            log.info("%s: %d of %d frames are kept, because %s shows at most %s a second.",
                     path.name, self._written, self._taken, job.format.name, job.format.max_fps)  # fmt: skip
        has_audio = job.audio is not None and job.audio_encoding is not None
        return EncodedVideo(path, *job.stored_size(encoder), self._written, job.fps, encoder.name, has_audio)

    def _start(self) -> FrameWriter:
        """Open the next encoder that opens."""
        for encoder in self._encoders:
            if self._failures:
                log.warning("%s; trying %s.", self._failures[-1], encoder.label)
            self._encoder = encoder
            try:
                self._writer = WRITERS[self.job.format.writer](self.job, self._output, encoder)
                return self._writer
            except EncoderFailed as error:
                self._failures.append(f"{encoder.label} failed ({error})")
        raise self._hopeless()

    def _start_over(self, error: EncoderFailed) -> None:
        """Give up what was written, and the encoder: the frames must come again, from the first."""
        self._abandon()
        self._blame(error)
        self._taken = self._written = 0

    def _abandon(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _blame(self, error: EncoderFailed) -> None:
        assert self._encoder is not None
        self._failures.append(f"{self._encoder.label} failed ({error})")

    def _hopeless(self, error: EncoderFailed | None = None) -> VideoError:
        if error is not None:
            self._blame(error)
        problem = "; ".join(self._failures) or "no encoder is listed for this system"
        return VideoError(
            f"Cannot save {self._output.path}: {problem}; choose another format, or update the Python package av."
        )


def encode_video(names: Path | Iterable[Path], frames: Tensor | Iterable[Tensor], **options: Any) -> EncodedVideo:
    """Write one video. names and options: as for VideoWriter; frames: as for its `write_all`.

    Nothing is left behind when it fails. Raises VideoError, one sentence, for input or a folder that cannot be used.
    """
    if isinstance(frames, Tensor):
        picture_size(frames)
    with VideoWriter(names, **options) as writer:
        return writer.write_all(frames)


def save_picture(names: Iterable[Path], frame: Tensor, metadata: Mapping[str, str] | None = None) -> Path:
    """Write one frame, floating [H, W, 3 or 4], as a PNG file with text chunks under the first unused name."""
    png = load_format(FOLDER / "png-8bit.json")
    job = Job(png, "standard", Fraction(1), metadata=metadata or {})
    job.begin(frame)
    with OutputFile(names) as output:
        with writing(output.path):
            output.partial.write_bytes(PngEncoder(job, png.video_encoders[0]).encode(frame, 0))
        return output.publish()
