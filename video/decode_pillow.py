"""Animated WebP through Pillow: FFmpeg, up to the version in use, reads only its still pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from fractions import Fraction
from io import BytesIO
from typing import Any

import av
import numpy as np
from PIL import Image, UnidentifiedImageError

from .decode_index import FrameIndex, Source, name_of
from .errors import VideoError

HEAD = 12  # bytes: RIFF, size, WEBP
MILLISECONDS = Fraction(1, 1000)
DEFAULT_DURATION = 100  # milliseconds of a frame that says 0, as browsers show it
DAMAGED = (OSError, UnidentifiedImageError, EOFError, ValueError, SyntaxError)


def is_webp(source: Source) -> bool:
    """Whether the file begins as a WebP does."""
    head = b""
    if isinstance(source, BytesIO):
        head = bytes(source.getbuffer()[:HEAD])
    else:
        with suppress(OSError), source.open("rb") as file:
            head = file.read(HEAD)
    return head[:4] == b"RIFF" and head[8:] == b"WEBP"


def open_image(source: Source) -> Any:
    """Pillow's image of a source; raises VideoError."""
    try:
        return Image.open(BytesIO(source.getvalue()) if isinstance(source, BytesIO) else source)
    except (*DAMAGED, Image.DecompressionBombError) as error:
        raise VideoError(f"{name_of(source)} cannot be read: it is damaged or cut off; choose another file.") from error


def build_index(source: Source) -> tuple[FrameIndex, Any]:
    """The frames and their times, and the first frame as av.VideoFrame. Raises VideoError where none can be decoded."""
    durations: list[int] = []
    first = None
    with closing(open_image(source)) as image, suppress(*DAMAGED):
        for number in range(getattr(image, "n_frames", 1)):
            image.seek(number)
            image.load()
            first = first or _frame(image)
            durations.append(int(image.info.get("duration") or DEFAULT_DURATION))
    if first is None:
        raise VideoError(f"{name_of(source)} holds no picture that can be decoded; choose another file.")
    numbers = np.arange(len(durations), dtype=np.int64)
    pts = np.concatenate(([0], np.cumsum(durations)[:-1])).astype(np.int64)
    return FrameIndex(MILLISECONDS, pts, numbers, [(0, 0)], durations[-1], timed=False), first


class PillowDecoder:
    """Gives frames by index like PyAVDecoder; Pillow composes each frame on those before it."""

    backend = "pillow"

    def __init__(self, source: Source) -> None:
        self._source = source
        self.decoded_frames = 0

    def close(self) -> None:
        """Nothing stays open between reads."""

    def decode(self, wanted: Sequence[int]) -> Iterator[tuple[int, av.VideoFrame | None]]:
        """Each wanted frame (ascending, no repeats) with its index; None for one that cannot be decoded."""
        with closing(open_image(self._source)) as image:
            for index in wanted:
                frame = None
                with suppress(*DAMAGED):
                    image.seek(index)
                    frame = _frame(image)
                    self.decoded_frames += 1
                yield index, frame


def _frame(image: Any) -> av.VideoFrame:
    alpha = "A" in image.getbands() or "transparency" in image.info
    pixels = np.asarray(image.convert("RGBA" if alpha else "RGB"))
    return av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgba" if alpha else "rgb24")
