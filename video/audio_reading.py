"""The sound of a video, of exactly a range of time, as ComfyUI's AUDIO.

Samples are placed by their timestamps, so that the delay of an encoder, a sound that starts late and gaps come out as
they play; FFmpeg decodes and, where a stream changes its format, resamples.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

from .decode_index import Source, name_of, open_container, reading
from .errors import VideoError
from .media_info import AudioInfo, VideoInfo

log = logging.getLogger(__name__)

USUAL_LAYOUTS = {1: "mono", 2: "stereo", 3: "2.1", 4: "4.0", 5: "5.0", 6: "5.1", 8: "7.1"}
PREROLL = Fraction(1, 2)  # seconds decoded before the range, so that codecs with overlap have settled
COARSE_SECONDS = 600  # up to here samples are counted from the start where timestamps are coarser (Matroska)
LONGEST_SECONDS = 24 * 3600
DRIFT = Fraction(1, 500)  # seconds by which timestamps may stray from the count of samples before they are believed


def audio_stream(container: av.container.InputContainer) -> av.AudioStream | None:
    """The first stream of sound that FFmpeg has a decoder for."""
    return next((s for s in container.streams.audio if s.codec_context is not None), None)


def audio_info(container: av.container.InputContainer) -> AudioInfo | None:
    """What the sound of an open container is; None without."""
    stream = audio_stream(container)
    if stream is None or not stream.sample_rate:
        return None
    length = None
    if stream.duration is not None and stream.time_base is not None:
        length = stream.duration * stream.time_base
    elif container.duration is not None:
        length = Fraction(container.duration, av.time_base)
    context, channels = stream.codec_context, stream.codec_context.layout.nb_channels
    layout = context.layout.name
    if layout.endswith(" channels"):  # a file that tells only how many, as WAV and AVI do
        layout = USUAL_LAYOUTS.get(channels, layout)
    return AudioInfo(context.name, stream.sample_rate, channels, layout, length)


def read_audio(
    source: Source,
    info: VideoInfo,
    start: Fraction | float | None,
    end: Fraction | float | None,
    origin: Fraction = Fraction(0),
) -> dict[str, Any] | None:
    """AUDIO of the seconds from start to end; see VideoReader.audio. origin: where the video's clock starts."""
    if info.audio is None:
        return None
    begin = Fraction(start or 0)
    with open_container(source) as container, reading(source):
        stream = audio_stream(container)
        assert stream is not None
        rate, channels = info.audio.sample_rate, info.audio.channels
        finish = Fraction(end) if end is not None else max(info.duration, _end_of(stream, origin))
        finish = min(finish, begin + LONGEST_SECONDS)
        first, last = round(begin * rate), round(finish * rate)
        samples = _silence(source, channels, max(0, last - first), rate)
        assert stream.time_base is not None
        coarse = stream.time_base * rate > 1 and begin < COARSE_SECONDS
        if begin > PREROLL and not coarse:
            container.seek(int((begin - PREROLL + origin) / stream.time_base), stream=stream, backward=True)
        for position, block in _blocks(container, stream, rate, info.audio.layout, origin):
            offset = position - first
            if offset >= samples.shape[1]:
                break
            low, high = max(0, offset), min(samples.shape[1], offset + block.shape[1])
            if high > low:
                samples[:, low:high] = block[:, low - offset : high - offset]
    return {"waveform": torch.from_numpy(samples)[None], "sample_rate": rate}


def read_all(source: str | Source, sample_rate: int, mono: bool) -> tuple[np.ndarray[Any, Any], int]:
    """All samples of a file's sound, float32 [channels, n], and their rate in Hz.

    sample_rate: to resample to, -1 to keep. mono: mix all channels. Raises VideoError for a file without sound.
    """
    where = source if isinstance(source, BytesIO) else Path(source)
    with open_container(where) as container, reading(where):
        stream, info = audio_stream(container), audio_info(container)
        if stream is None or info is None:
            raise VideoError(f"{name_of(where)} has no sound; choose another file.")
        rate = sample_rate if sample_rate > 0 else info.sample_rate
        blocks = [block for _, block in _blocks(container, stream, rate, "mono" if mono else info.layout, Fraction(0))]
    if not blocks:
        raise VideoError(f"{name_of(where)} has no sound that can be decoded; choose another file.")
    return np.concatenate(blocks, 1), rate


def _end_of(stream: av.AudioStream, origin: Fraction) -> Fraction:
    if stream.duration is None or stream.time_base is None:
        container: Any = stream.container
        return Fraction(container.duration or 0, av.time_base)
    return ((stream.start_time or 0) + stream.duration) * stream.time_base - origin


def _blocks(
    container: av.container.InputContainer, stream: av.AudioStream, rate: int, layout: str, origin: Fraction
) -> Iterator[tuple[int, np.ndarray[Any, Any]]]:
    """Decoded samples, float32 [channels, n], with the number of the first one on the video's clock."""
    # Packed samples: PyAV reads past the planes of planar sound with more than 8 channels, which damage can tell.
    resampler = av.AudioResampler(format="flt", layout=layout, rate=rate)
    expected: int | None = None
    for frame in _decoded(container, stream):
        position = expected or 0
        if frame.pts is not None and frame.time_base is not None:
            told = (frame.pts * frame.time_base - origin) * rate
            position = round(told)
            if expected is not None and abs(told - expected) < DRIFT * rate:
                position = expected
        frame.pts = None
        for block in resampler.resample(frame):
            values = _by_channel(block)
            yield position, values
            position += values.shape[1]
        expected = position
    for block in resampler.resample(None):
        if block is not None and expected is not None:
            yield expected, _by_channel(block)
            expected += block.samples


def _by_channel(block: av.AudioFrame) -> np.ndarray[Any, Any]:
    """float32 [channels, n] of packed samples."""
    return block.to_ndarray().reshape(-1, block.layout.nb_channels).T


def _silence(source: Source, channels: int, samples: int, rate: int) -> np.ndarray[Any, Any]:
    try:
        return np.zeros((channels, samples), np.float32)
    except MemoryError:
        raise VideoError(
            f"The sound of {name_of(source)} is said to last {samples / rate / 3600:.1f} hours, more than memory "
            "holds; choose a shorter part of it."
        ) from None


def _decoded(container: av.container.InputContainer, stream: av.AudioStream) -> Iterator[av.AudioFrame]:
    """Frames up to the end or to damage that the demuxer cannot pass; damaged packets are left out."""
    try:
        for packet in container.demux(stream):
            try:
                yield from packet.decode()
            except (av.InvalidDataError, EOFError) as error:
                log.debug("sound: %s", error)
    except (av.FFmpegError, OSError) as error:
        log.debug("sound ends early: %s", error)
