"""Numbered PNG files and animated WebP, one frame in memory at a time.

PNG comes from FFmpeg's encoder, with text chunks put behind the header (PNG specification, 11.3). WebP frames come
from Pillow; the container around them is written here, as Google's WebP container specification lays it out.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from contextlib import suppress
from fractions import Fraction

import av
from PIL import Image
from torch import Tensor

from .encode_job import EncoderFailed, Job
from .errors import VideoError
from .metadata import exif
from .output_file import OutputFile, OutputFolder, writing
from .video_formats import VideoEncoder

PNG_HEADER = 33  # signature and IHDR chunk
LARGEST_WEBP_SIDE = 16383
WEBP_ANIMATION, WEBP_EXIF, WEBP_ALPHA = 0x02, 0x08, 0x10
WEBP_FRAME_REPLACES = 0x02  # the frame's alpha is stored, not blended with the frame before
SRGB = b"\0"  # rendering intent: perceptual


class PngEncoder:
    """Frames as PNG files in memory; metadata becomes text chunks in each."""

    def __init__(self, job: Job, encoder: VideoEncoder) -> None:
        self._job, self._encoder = job, encoder
        chunks = [_png_chunk(b"sRGB", SRGB), *(_text_chunk(*item) for item in job.metadata.items())]
        self._inserted = b"".join(chunks)
        try:
            context = av.CodecContext.create("png", "w")
            assert isinstance(context, av.VideoCodecContext)
            context.width, context.height = job.stored_size(encoder)
            context.pix_fmt = job.pixel_format(encoder)
            context.time_base = 1 / job.fps
            context.thread_count = 1
            context.options = job.options(encoder)
            context.open()
        except (av.FFmpegError, ValueError) as error:
            raise EncoderFailed(error, started=False) from error
        self._context = context

    def encode(self, frame: Tensor, index: int) -> bytes:
        """One frame as a whole file."""
        (packet,) = self._context.encode(self._job.picture(frame, index, self._encoder))
        data = bytes(packet)
        return data[:PNG_HEADER] + self._inserted + data[PNG_HEADER:]


class PngFolder:
    """A folder of frame_000001.png and so on."""

    def __init__(self, job: Job, output: OutputFolder, encoder: VideoEncoder) -> None:
        self._output, self._png = output, PngEncoder(job, encoder)

    def add(self, frame: Tensor, index: int) -> None:
        data = self._png.encode(frame, index)
        with writing(self._output.path), open(self._output.partial / f"frame_{index + 1:06}.png", "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> None:
        """Every frame is complete already."""

    def close(self) -> None:
        """Nothing is open."""


class WebpFile:
    """An animated WebP; each frame is whole, so a frame costs what a picture costs."""

    def __init__(self, job: Job, output: OutputFile, encoder: VideoEncoder) -> None:
        self._job, self._output, self._encoder = job, output, encoder
        self._options = _numbers(job.options(encoder))
        width, height = job.size
        if max(job.size) > LARGEST_WEBP_SIDE:
            raise VideoError(f"WebP holds at most {LARGEST_WEBP_SIDE} pixels a side, not {width}x{height}; scale it.")
        self._exif = exif(job.metadata)
        flags = WEBP_ANIMATION | WEBP_EXIF * bool(self._exif) | WEBP_ALPHA * job.alpha
        header = struct.pack("<I", flags) + _uint24(width - 1) + _uint24(height - 1)
        loops = 0 if job.loops is None else min(job.loops + 1, 0xFFFF)  # 0: for ever
        with writing(output.path):
            self._file = open(output.partial, "wb")  # noqa: SIM115
            self._file.write(b"RIFF\0\0\0\0WEBP")
            self._file.write(_riff_chunk(b"VP8X", header) + _riff_chunk(b"ANIM", struct.pack("<IH", 0, loops)))

    def add(self, frame: Tensor, index: int) -> None:
        job = self._job
        picture = job.picture(frame, index, self._encoder)
        image = Image.fromarray(picture.to_ndarray())
        memory = io.BytesIO()
        image.save(memory, "WEBP", **self._options)
        header = b"\0" * 6 + _uint24(picture.width - 1) + _uint24(picture.height - 1)
        header += _uint24(_milliseconds(index + 1, job.fps) - _milliseconds(index, job.fps))
        with writing(self._output.path):
            chunk = _riff_chunk(b"ANMF", header + bytes([WEBP_FRAME_REPLACES]) + _image_chunks(memory.getvalue()))
            self._file.write(chunk)

    def finish(self) -> None:
        with writing(self._output.path):
            if self._exif:
                self._file.write(_riff_chunk(b"EXIF", self._exif))
            size = self._file.tell() - 8
            self._file.seek(4)
            self._file.write(struct.pack("<I", size))
            self._file.close()

    def close(self) -> None:
        with suppress(Exception):  # the fragment is removed anyway
            self._file.close()


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _text_chunk(key: str, value: str) -> bytes:
    if value.isascii():
        return _png_chunk(b"tEXt", key.encode("latin-1") + b"\0" + value.encode())
    return _png_chunk(b"iTXt", key.encode("latin-1") + b"\0\0\0\0\0" + value.encode())


def _riff_chunk(kind: bytes, data: bytes) -> bytes:
    return kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)


def _image_chunks(still: bytes) -> bytes:
    """The image chunks of a WebP picture, as an animation's frame takes them: ALPH and VP8, or VP8L."""
    position, chunks = 12, b""
    while position < len(still):
        (length,) = struct.unpack_from("<I", still, position + 4)
        stop = position + 8 + length + length % 2
        if still[position : position + 4] in (b"ALPH", b"VP8 ", b"VP8L"):
            chunks += still[position:stop]
        position = stop
    return chunks


def _uint24(value: int) -> bytes:
    return struct.pack("<I", value)[:3]


def _milliseconds(frames: int, fps: Fraction) -> int:
    return round(1000 * frames / fps)


def _numbers(options: dict[str, str]) -> dict[str, int]:
    """Pillow's options; all those of its WebP writer that matter here are whole numbers."""
    for name, value in options.items():
        if not value.isdecimal():
            raise VideoError(f"The WebP option {name} is {value!r}, not a whole number; correct the encoder options.")
    return {name: int(value) for name, value in options.items()}
