"""Pieces of video files put one after another with their compressed pictures copied as they are.

A piece can be copied if it begins with a picture that needs no earlier one and ends where no later one is needed;
pieces fit together if their pictures were encoded with the same parameters, since a file describes them once. Sound is
decoded, cut to each piece's length to the sample, joined, and encoded once (lossless codecs stay lossless): copied
audio packets would leave a gap of the encoder's priming at every seam. NAL unit types are those of ITU-T H.264
(table 7-1) and H.265 (table 7-1).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from .audio_reading import audio_info, audio_stream
from .decode_index import open_container, reading, video_stream
from .errors import VideoError
from .output_file import OutputFile, writing

FAMILIES = {"mov,mp4,m4a,3gp,3g2,mj2": (".mp4", ".mov"), "matroska,webm": (".mkv", ".webm")}
"""FFmpeg's readers whose packets are copied, and the endings of what is written from them."""

MUXERS = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska", ".webm": "webm"}
WEBM_CODECS = {"vp8", "vp9", "av1"}
KEY_UNITS = {"h264": ({5}, 0x1F, 0), "hevc": ({16, 17, 18, 19, 20}, 0x7E, 1)}
"""NAL unit types of pictures after which nothing earlier is needed, and mask and shift of the type in its header."""

WRITTEN_BY_THE_MUXER = {"major_brand", "minor_version", "compatible_brands", "encoder", "creation_time"}
SOUND_ENCODERS = {"aac": "aac", "opus": "libopus", "vorbis": "libopus", "flac": "flac", "alac": "alac"}
AAC_BIT_RATE = 192_000
MOST_CHANNELS = 8  # PyAV reads the planes of more from the wrong place
LARGEST_CLOCK = 1_000_000
SOUND_FRAME = 1024
SEEK_AHEAD = Fraction(1, 2)  # seconds before a range, in which decoders settle
LATE_SOUND = Fraction(1, 20)  # a gap above this is silence; below, it is a container's rounding


class CannotCopy(VideoError):
    """The pictures cannot be copied; the message says why, as the end of a sentence."""


@dataclass(frozen=True)
class Sample:
    """One compressed picture: seconds at which it is shown, and how long; whether decoding can begin with it."""

    pts: Fraction
    duration: Fraction
    is_key: bool
    is_hidden: bool


@dataclass(frozen=True)
class SoundTrack:
    """A file's first sound stream: FFmpeg's codec, samples a second, layout, bits a second (0: unknown)."""

    codec: str
    rate: int
    layout: str
    bit_rate: int
    start: Fraction


@dataclass(frozen=True)
class Source:
    """A file's compressed pictures, in the order in which they lie in it, and what they were encoded with."""

    path: Path
    family: str
    suffix: str
    parameters: Mapping[str, object]
    time_base: Fraction
    samples: tuple[Sample, ...]
    sound: SoundTrack | None

    @cached_property
    def shown(self) -> list[Sample]:
        """The pictures in the order in which they are shown."""
        return sorted((sample for sample in self.samples if not sample.is_hidden), key=lambda sample: sample.pts)

    @property
    def start(self) -> Fraction:
        """When the clip begins: with its first frame, or with its sound if that is earlier by a frame or more."""
        first = self.shown[0]
        early = self.sound is not None and self.sound.start <= first.pts - first.duration
        return self.sound.start if early and self.sound else first.pts

    @property
    def end(self) -> Fraction:
        """When the last frame's time is over."""
        return self.shown[-1].pts + self.shown[-1].duration


@dataclass(frozen=True)
class Piece:
    """The frames of a source that are shown from `start` up to, not including, `end` (seconds on its own clock)."""

    source: Source
    start: Fraction
    end: Fraction

    def run(self) -> tuple[int, int]:
        """First and last + 1 of the samples to copy. Raises CannotCopy where that would not be exact."""
        samples = self.source.samples
        inside = [i for i, s in enumerate(samples) if self.start <= s.pts < self.end and not s.is_hidden]
        if not inside:
            raise CannotCopy("no frame lies in the range")
        first, last = inside[0], inside[-1]
        if not samples[first].is_key or samples[first].pts != min(samples[i].pts for i in inside):
            raise CannotCopy("the range does not begin with a key frame")
        if last - first + 1 != len(inside):
            raise CannotCopy("frames inside of the range depend on frames outside of it")
        return first, last + 1


def read_source(path: Path) -> Source:
    """Read a file's packets, not its pictures. Raises CannotCopy for kinds of files that are not copied."""
    with _opened(path) as container:
        family = container.format.name
        stream = video_stream(container, path)
        if family not in FAMILIES:
            raise CannotCopy(f"{path.name} is {container.format.long_name}")
        if stream.time_base is None:
            raise CannotCopy(f"the clock of {path.name} is unknown")
        sound = _sound_track(container)
        parameters = _parameters(container, stream)
        rate = stream.average_rate or stream.guessed_rate or Fraction(25)
        container.seek(stream.start_time or 0, stream=stream)
        samples = tuple(_samples(container, stream, Fraction(rate)))
    if not any(not sample.is_hidden for sample in samples):
        raise VideoError(f"{path} holds no frames; choose another file.")
    short, long = FAMILIES[family]
    is_long = parameters["brand"] == "qt  " if short == ".mp4" else parameters["codec"] in WEBM_CODECS
    if long == ".webm" and sound is not None and sound.codec not in ("opus", "vorbis"):
        is_long = False
    return Source(path, family, long if is_long else short, parameters, stream.time_base, samples, sound)


def whole(source: Source) -> Piece:
    """All of a file. Raises CannotCopy where its edit list hides pictures that others depend on."""
    if any(sample.is_hidden for sample in source.samples):
        raise CannotCopy(f"the edit list of {source.path.name} hides frames that others depend on")
    return Piece(source, source.start, source.end)


def check_fit(pieces: Sequence[Piece]) -> None:
    """Raise CannotCopy unless the pieces' pictures can follow each other in one file."""
    first = pieces[0].source
    for piece in pieces:
        piece.run()
        if piece.source.family != first.family:
            raise CannotCopy(f"{first.path.name} and {piece.source.path.name} are different kinds of files")
        for name, value in first.parameters.items():
            if piece.source.parameters[name] != value and name != "brand":
                what = f"{name} of {first.path.name} and {piece.source.path.name}"
                raise CannotCopy(f"{what} differ" + ("" if isinstance(value, bytes) else _both(value, piece, name)))


def splice(
    pieces: Sequence[Piece],
    names: Iterable[Path],
    metadata: Mapping[str, str] | None = None,
    on_progress: Callable[[float], None] = lambda part: None,
) -> Path:
    """Write pieces one after another into one file: timestamps go on without a gap, sound stays with its pictures.

    names: candidates for its name, of which the first unused one is taken. metadata: container tags, by default the
    first file's. on_progress: called with the part that is done, 0 to 1; what it raises ends the work, and nothing is
    left behind. Returns the file's name. Raises CannotCopy, or VideoError for a folder that cannot be used.
    """
    check_fit(pieces)
    source = pieces[0].source
    total = sum((piece.end - piece.start for piece in pieces), Fraction(0))
    with OutputFile(names) as output:
        clock, options = _common_clock(pieces), {}
        if source.suffix in (".mp4", ".mov"):
            options = {"movflags": "use_metadata_tags+faststart", "video_track_timescale": str(clock.denominator)}
        with writing(output.path):
            target = av.open(str(output.partial), "w", format=MUXERS[source.suffix], options=options)
        with target, open_container(source.path) as container:
            target.metadata.update(_tags(container.metadata) if metadata is None else metadata)
            template = video_stream(container, source.path)
            video = target.add_stream_from_template(template, opaque=True)
            video.metadata.update(template.metadata)
            if source.suffix in (".mp4", ".mov"):  # QuickTime plays hvc1 and not hev1; ProRes has its depth there
                video.codec_context.codec_tag = template.codec_context.codec_tag
            with suppress(RuntimeError):  # PyAV before 15 has encoders' clocks set only; its MP4 goes by the option
                video.time_base = clock
            sound = _sound_stream(target, pieces)
            with writing(output.path):
                target.start_encoding()
            streams = [_video_packets(pieces, video, clock)]
            if sound is not None:
                streams.append(_sound_packets(pieces, sound))
            for time, _, packet in heapq.merge(*streams, key=lambda entry: entry[:2]):
                on_progress(min(1.0, max(0.0, float(time / total))))
                with writing(output.path):
                    target.mux(packet)
            with writing(output.path):
                target.close()
        return output.publish()


def _tags(metadata: Mapping[str, str]) -> dict[str, str]:
    """A file's tags without those that describe how it was written."""
    return {key: value for key, value in metadata.items() if key.lower() not in WRITTEN_BY_THE_MUXER}


def sound_of(piece: Piece, rate: int, layout: str, samples: int) -> Iterator[NDArray[np.float32]]:
    """A piece's sound from its start on: exactly `samples` samples as float32 [channels, n], else silence."""
    channels = av.AudioLayout(layout).nb_channels
    heard = 0
    if piece.source.sound is not None:
        for position, values in _decoded_sound(piece, rate, layout):
            gap = position - heard
            if gap < 0:
                values = values[:, -gap:]
            elif gap > LATE_SOUND * rate or heard == 0:
                gap = min(gap, samples - heard)
                yield np.zeros((channels, gap), np.float32)
                heard += gap
            values = values[:, : samples - heard]
            yield np.ascontiguousarray(values)
            heard += values.shape[1]
            if heard >= samples:
                break
    while heard < samples:
        count = min(rate, samples - heard)
        yield np.zeros((channels, count), np.float32)
        heard += count


def sound_format(pieces: Sequence[Piece]) -> SoundTrack | None:
    """The sound of the first piece that has any, None where none has."""
    return next((piece.source.sound for piece in pieces if piece.source.sound is not None), None)


@contextmanager
def _opened(path: Path) -> Iterator[av.container.InputContainer]:
    """An open file; errors of reading it become VideoErrors."""
    with open_container(path) as container, reading(path):
        yield container


def _parameters(container: av.container.InputContainer, stream: av.VideoStream) -> dict[str, object]:
    """What must be the same in files that are joined; keys are words for the user."""
    context = stream.codec_context
    matrix = b""
    for packet in container.demux(stream):
        frames = packet.decode()
        if frames:
            sides: Any = frames[0].side_data
            matrix = next((bytes(side) for side in sides if "DISPLAYMATRIX" in str(side.type)), b"")
            break
    return {
        "codec": context.codec.canonical_name,
        "size": f"{context.width}x{context.height}",
        "pixel format": context.pix_fmt,
        "pixel shape": str(stream.sample_aspect_ratio or 1),
        "rotation": matrix,
        "colour tags": tuple(int(getattr(context, tag)) for tag in COLOR_TAGS),
        "encoding": bytes(context.extradata or b""),
        "brand": container.metadata.get("major_brand", ""),
    }


COLOR_TAGS = ("color_range", "colorspace", "color_primaries", "color_trc")


def _both(value: object, piece: Piece, name: str) -> str:
    return f" ({value} and {piece.source.parameters[name]})"


def _samples(container: av.container.InputContainer, stream: av.VideoStream, rate: Fraction) -> Iterator[Sample]:
    codec = stream.codec_context.codec.canonical_name
    base = stream.time_base
    assert base is not None
    for packet in container.demux(stream):
        if packet.size and packet.pts is None:
            raise CannotCopy("a frame has no timestamp")
        if packet.is_corrupt:
            raise CannotCopy("a frame is damaged")
        if packet.size and packet.pts is not None:
            duration = packet.duration * base if packet.duration else 1 / rate
            duration = 1 / rate if abs(duration - 1 / rate) <= base else duration  # rounded to the clock
            is_key = packet.is_keyframe and _is_clean_key(packet, codec)
            yield Sample(packet.pts * base, duration, is_key, packet.is_discard)


def _is_clean_key(packet: av.Packet, codec: str) -> bool:
    """Whether nothing earlier counts after a key frame; those of H.264 and HEVC have units behind 4-byte lengths."""
    if codec not in KEY_UNITS:
        return True
    types, mask, shift = KEY_UNITS[codec]
    data, at = bytes(packet), 0
    while at + 4 < len(data):
        if (data[at + 4] & mask) >> shift in types:
            return True
        at += 4 + int.from_bytes(data[at : at + 4], "big")
    return False


def _common_clock(pieces: Sequence[Piece]) -> Fraction:
    """A tick in which every piece's timestamps are whole numbers, as far as containers have one so short."""
    ticks = math.lcm(*(piece.source.time_base.denominator for piece in pieces))
    return Fraction(1, ticks) if ticks <= LARGEST_CLOCK else pieces[0].source.time_base


Timed = tuple[Fraction, int, av.Packet]


def _video_packets(pieces: Sequence[Piece], stream: av.VideoStream, clock: Fraction) -> Iterator[Timed]:
    """The pieces' packets on the output's clock, with the time by which they are wanted."""
    times = _clock_times(pieces, clock)
    for piece in pieces:
        first, end = piece.run()
        wanted = piece.source.samples[first:end]
        with _opened(piece.source.path) as container:
            source = video_stream(container, piece.source.path)
            container.seek(round(wanted[0].pts / piece.source.time_base), stream=source)
            packets = (packet for packet in container.demux(source) if packet.size)
            for sample, packet in zip(wanted, _from(packets, wanted[0].pts, piece.source.time_base)):
                packet.time_base, packet.stream = clock, stream
                packet.pts, packet.dts = next(times)
                packet.duration = round(sample.duration / clock)
                yield packet.dts * clock, 0, packet


def _clock_times(pieces: Sequence[Piece], clock: Fraction) -> Iterator[tuple[int, int]]:
    """When each packet is shown and decoded, in ticks.

    Times of decoding are those of showing in rising order, so much earlier that no frame is shown before it is decoded.
    """
    shown: list[int] = []
    offset = Fraction(0)
    for piece in pieces:
        first, end = piece.run()
        shown += (round((s.pts - piece.start + offset) / clock) for s in piece.source.samples[first:end])
        offset += piece.end - piece.start
    rising = sorted(shown)
    if len(set(rising)) < len(rising):
        raise CannotCopy("two frames have the same timestamp")
    delay = max(decoded - time for decoded, time in zip(rising, shown))
    return ((time, decoded - delay) for decoded, time in zip(rising, shown))


def _from(packets: Iterator[av.Packet], pts: Fraction, base: Fraction) -> Iterator[av.Packet]:
    for packet in packets:
        if packet.pts is not None and packet.pts * base == pts:
            yield packet
            break
    yield from packets


def _sound_track(container: av.container.InputContainer) -> SoundTrack | None:
    stream, info = audio_stream(container), audio_info(container)
    if stream is None or info is None:
        return None
    if info.channels > MOST_CHANNELS or info.layout.endswith(" channels"):
        raise CannotCopy(f"the sound has {info.channels} channels")
    start = (stream.start_time or 0) * stream.time_base if stream.time_base else Fraction(0)
    context = stream.codec_context
    return SoundTrack(context.codec.canonical_name, info.sample_rate, info.layout, context.bit_rate or 0, start)


def _sound_stream(target: av.container.OutputContainer, pieces: Sequence[Piece]) -> av.AudioStream | None:
    track = sound_format(pieces)
    if track is None:
        return None
    is_pcm = track.codec.startswith("pcm_")
    encoder = track.codec if is_pcm else SOUND_ENCODERS.get(track.codec, "aac")
    rate = 48000 if encoder == "libopus" else track.rate
    stream = target.add_stream(encoder, rate=rate, layout=track.layout)
    assert isinstance(stream, av.AudioStream)
    if not is_pcm:
        stream.bit_rate = max(track.bit_rate, AAC_BIT_RATE)
    return stream


def _sound_packets(pieces: Sequence[Piece], stream: av.AudioStream) -> Iterator[Timed]:
    """The pieces' sound, encoded, with the time by which it is wanted."""
    rate, layout = stream.rate, stream.layout.name
    offset, written = Fraction(0), 0
    packets: list[av.Packet] = []
    for piece in pieces:
        offset += piece.end - piece.start
        until = round(offset * rate)
        for values in sound_of(piece, rate, layout, until - written):
            for begin in range(0, values.shape[1], SOUND_FRAME):
                part = np.ascontiguousarray(values[:, begin : begin + SOUND_FRAME])
                frame = av.AudioFrame.from_ndarray(part, format="fltp", layout=layout)
                frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), written
                written += part.shape[1]
                packets.extend(stream.encode(frame))
            while packets:
                yield Fraction(written, rate), 1, packets.pop(0)
    for packet in stream.encode(None):
        yield Fraction(written, rate), 1, packet


def _decoded_sound(piece: Piece, rate: int, layout: str) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Decoded sound around a piece with each part's place, in samples after the piece's start."""
    with _opened(piece.source.path) as container:
        stream = audio_stream(container)
        assert stream is not None and stream.time_base is not None
        base = stream.time_base
        if piece.start > SEEK_AHEAD:  # the file's very first packet, which primes the decoder, cannot be sought
            container.seek(int((piece.start - SEEK_AHEAD) / base), stream=stream)
        resampler = av.AudioResampler(format="fltp", layout=layout, rate=rate)
        first: int | None = None
        passed = 0
        for frame in _frames(container, stream):
            if first is None and frame.pts is not None:
                first = round((frame.pts * base - piece.start) * rate)
            for part in resampler.resample(frame):
                values = np.asarray(part.to_ndarray(), np.float32)
                expected = (first or 0) + passed
                if frame.pts is not None:
                    actual = round((frame.pts * base - piece.start) * rate)
                    if abs(actual - expected) > LATE_SOUND * rate:
                        passed += actual - expected
                        expected = actual
                passed += values.shape[1]
                if expected + values.shape[1] > 0:
                    yield expected, values


def _frames(container: av.container.InputContainer, stream: av.AudioStream) -> Iterator[av.AudioFrame]:
    """Sound frames; a packet that cannot be decoded is passed over."""
    for packet in container.demux(stream):
        try:
            yield from packet.decode()
        except av.FFmpegError:
            continue
