"""A part of a video, by time or by frames: copied where it can be cut exactly, else encoded anew.

Compressed frames depend on each other, so that a copy can begin only with a key frame, and end only where no frame
inside needs one that is shown later; "fast" takes the nearest such places around the part that was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path

from .concatenate import Edited, Encoding, NamesFor, Part, check_mode, encode_parts
from .errors import VideoError
from .reader import FrameSelection, open_video
from .remux import CannotCopy, Piece, Source, read_source, splice

MODES = ("exact", "fast", "encode")


def trim(
    source: Path,
    names_for: NamesFor,
    encoding: Encoding,
    selection: FrameSelection,
    *,
    mode: str = "exact",
    metadata: Mapping[str, str] | None = None,
    on_progress: Callable[[float], None] = lambda part: None,
) -> Edited:
    """Write the selected frames of a video, which are one range, with the sound that belongs to them.

    mode: "exact" copies where the range begins and ends at places where that is exact, and encodes otherwise; "fast"
    copies from the last key frame before the range to the first clean end after it; "encode" always encodes. Other
    arguments are those of `concatenate`. Raises VideoError.
    """
    reason = check_mode(mode, MODES)
    with open_video(source) as reader:
        chosen = reader.indices(selection)
        frames = reader.info.frames
    first, last = chosen[0], chosen[-1]
    if chosen != list(range(first, last + 1)):
        raise VideoError(f"Only one range of {source.name} can be cut out; leave stride and fps at their defaults.")
    if mode != "encode":
        try:
            compressed = read_source(source)
            if len(compressed.shown) != frames:
                raise CannotCopy(f"the timestamps of {source.name} are damaged")
            piece = _around(compressed, first, last) if mode == "fast" else _exactly(compressed, first, last)
            return Edited(splice([piece], names_for(compressed.suffix), metadata, on_progress), "")
        except CannotCopy as error:
            reason = str(error)
            if mode == "fast":
                raise VideoError(f'{source.name} cannot be copied, because {reason}; choose "exact".') from error
    names = names_for(encoding.video_format.suffix)
    part = Part(source, FrameSelection(start_frame=first, end_frame=last + 1))
    return Edited(encode_parts([part], names, encoding, metadata, on_progress), reason)


def _exactly(source: Source, first: int, last: int) -> Piece:
    shown = source.shown
    end = shown[last + 1].pts if last + 1 < len(shown) else source.end
    piece = Piece(source, shown[first].pts, end)
    piece.run()
    return piece


def _around(source: Source, first: int, last: int) -> Piece:
    """The shortest range around frames that can be copied."""
    wanted, until = source.shown[first].pts, source.shown[last].pts
    samples = source.samples
    keys = [i for i, s in enumerate(samples) if s.is_key and not s.is_hidden and s.pts <= wanted]
    if not keys:
        raise CannotCopy("no key frame comes before the range")
    begin = max(keys, key=lambda i: samples[i].pts)
    shown_later: list[Fraction] = [source.end]  # per place, from the end: the earliest frame after it
    for sample in reversed(samples[begin + 1 :]):
        shown_later.append(min(shown_later[-1], sample.pts))
    latest = samples[begin].pts
    for sample, following in zip(samples[begin:], reversed(shown_later)):
        latest = max(latest, sample.pts)
        if latest >= until and following > latest:
            return Piece(source, samples[begin].pts, following)
    raise CannotCopy("no clean end comes after the range")
