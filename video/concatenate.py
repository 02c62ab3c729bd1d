"""Videos one after another in one file: copied as they are where their streams allow it, else encoded anew.

Pictures are copied if every file is MP4, QuickTime, Matroska or WebM of the same family, was encoded with the same
parameters, begins with a key frame and hides none of its frames behind an edit list (remux.py). Otherwise all files
are decoded, brought to the size and the rate of the first one, and encoded: a variable rate becomes the constant one
that its closest two frames ask for, at most 60 a second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor

from .encoding import encode_video, frame_rate
from .errors import VideoError
from .extend import join_audio
from .reader import FrameSelection, FrameSize, VideoReader, open_video
from .remux import CannotCopy, read_source, splice, whole
from .video_formats import VideoFormat

MODES = ("auto", "copy", "encode")
HIGHEST_RATE = Fraction(60)
LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1"}

NamesFor = Callable[[str], Iterable[Path]]
"""Gives candidates for the output's name, of which the first unused one is taken, for an ending such as ".mp4"."""


@dataclass(frozen=True)
class Encoding:
    """How to encode where copying is impossible or unwanted."""

    video_format: VideoFormat
    quality: str = "high"


@dataclass(frozen=True)
class Edited:
    """The file that was written, and why it was encoded anew; "" where its pictures were copied."""

    path: Path
    reason: str

    @property
    def report(self) -> str:
        """One sentence for the user."""
        return f"Encoded anew, because {self.reason}." if self.reason else "Copied without encoding the pictures."


@dataclass(frozen=True)
class Part:
    """Frames of a file, with the sound that belongs to them."""

    path: Path
    selection: FrameSelection = field(default_factory=FrameSelection)


def concatenate(
    sources: Sequence[Path],
    names_for: NamesFor,
    encoding: Encoding,
    *,
    mode: str = "auto",
    metadata: Mapping[str, str] | None = None,
    on_progress: Callable[[float], None] = lambda part: None,
) -> Edited:
    """Write videos one after another into one file; timestamps go on without a gap, sound stays with its pictures.

    mode: "auto" copies where that is exact and encodes otherwise, "copy" refuses instead, "encode" always encodes.
    metadata: container tags, by default those of the first file. on_progress: called with the part that is done, 0
    to 1; what it raises ends the work, and nothing is left behind. Raises VideoError.
    """
    if not sources:
        raise VideoError("There are no videos to join; connect one or more.")
    reason = check_mode(mode, MODES)
    if mode != "encode":
        try:
            pieces = [whole(read_source(source)) for source in sources]
            path = splice(pieces, names_for(pieces[0].source.suffix), metadata, on_progress)
            return Edited(path, "")
        except CannotCopy as error:
            reason = str(error)
            if mode == "copy":
                raise VideoError(f'The videos cannot be joined by copying, because {reason}; choose "auto".') from error
    names = names_for(encoding.video_format.suffix)
    return Edited(encode_parts([Part(path) for path in sources], names, encoding, metadata, on_progress), reason)


def check_mode(mode: str, modes: Sequence[str]) -> str:
    """The reason for encoding if that is the mode; raises VideoError if it is none of `modes`."""
    if mode not in modes:
        raise VideoError(f"The mode {mode!r} is none of {', '.join(modes)}; choose one of them.")
    return "that was asked for"


def encode_parts(
    parts: Sequence[Part],
    names: Iterable[Path],
    encoding: Encoding,
    metadata: Mapping[str, str] | None = None,
    on_progress: Callable[[float], None] = lambda part: None,
) -> Path:
    """Decode parts of files and encode them as one, in the size and at the rate of the first, padded where they differ.

    Frames are streamed; the sound, if there is any, is held as a whole. Arguments are those of `concatenate`.
    """
    with open_video(parts[0].path) as reader:
        info, rate = reader.info, constant_rate(reader)
    frames = _Frames(parts, rate, info.width, info.height, info.has_alpha)
    counts, sounds = frames.counts(), _sounds(parts, frames)
    total = sum(counts)
    video = encode_video(
        names,
        frames,
        fps=rate,
        video_format=encoding.video_format,
        quality=encoding.quality,
        audio=join_audio(sounds, counts, 0, rate, "cut") if sounds else None,
        metadata=info.metadata if metadata is None else metadata,
        on_frame=lambda done: on_progress(min(1.0, done / total)),
    )
    return video.path


def constant_rate(reader: VideoReader) -> Fraction:
    """Frames a second of a video; for a variable rate those that its closest two frames ask for, at most 60."""
    if not reader.info.variable_frame_rate:
        return frame_rate(reader.info.fps)
    times = reader.timestamps()
    closest = min(later - earlier for earlier, later in pairwise(times))
    return min(HIGHEST_RATE, frame_rate(1 / closest)) if closest else HIGHEST_RATE


@dataclass(frozen=True)
class _Frames:
    """The frames of all parts, which can be read more than once."""

    parts: Sequence[Part]
    rate: Fraction
    width: int
    height: int
    alpha: bool

    def __iter__(self) -> Iterator[Tensor]:
        size = FrameSize(self.width, self.height, mode="pad")
        for part in self.parts:
            with open_video(part.path) as reader:
                yield from reader.frames(self.selection(part, reader), size=size, alpha=self.alpha)

    def selection(self, part: Part, reader: VideoReader) -> FrameSelection:
        """A part's frames at the common rate."""
        same = not reader.info.variable_frame_rate and frame_rate(reader.info.fps) == self.rate
        return part.selection if same else replace(part.selection, fps=self.rate)

    def counts(self) -> list[int]:
        """Frames of each part."""
        found = []
        for part in self.parts:
            with open_video(part.path) as reader:
                found.append(len(reader.indices(self.selection(part, reader))))
        return found


def _sounds(parts: Sequence[Part], frames: _Frames) -> list[dict[str, Any]]:
    """The parts' sound at the first one's sample rate and with its channels; empty where none has any."""
    found: list[dict[str, Any] | None] = []
    for part in parts:
        with open_video(part.path) as reader:
            found.append(reader.audio(*reader.section(frames.selection(part, reader))))
    first = next((audio for audio in found if audio is not None), None)
    if first is None:
        return []
    rate, channels = first["sample_rate"], first["waveform"].shape[1]
    silence = {"waveform": torch.zeros(1, channels, 0), "sample_rate": rate}
    return [silence if audio is None else _resampled(audio, rate, channels) for audio in found]


def _resampled(audio: dict[str, Any], rate: int, channels: int) -> dict[str, Any]:
    """AUDIO at another sample rate, mixed to another number of channels, as FFmpeg does it."""
    waveform, source_rate = audio["waveform"], audio["sample_rate"]
    if (source_rate, waveform.shape[1]) == (rate, channels) or waveform.shape[-1] == 0:
        return audio
    resampler = av.AudioResampler(format="fltp", layout=LAYOUTS.get(channels, "stereo"), rate=rate)
    layout = LAYOUTS.get(waveform.shape[1], "stereo")
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(waveform[0].numpy()), format="fltp", layout=layout)
    frame.sample_rate, frame.time_base, frame.pts = source_rate, Fraction(1, source_rate), 0
    parts = [part.to_ndarray() for given in (frame, None) for part in resampler.resample(given)]
    return {"waveform": torch.from_numpy(np.concatenate(parts, 1))[None], "sample_rate": rate}
