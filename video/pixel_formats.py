"""FFmpeg's pixel formats as a table, and ComfyUI's frames written straight into a picture of any of them.

Names, planes and bit positions are those of FFmpeg's libavutil/pixfmt.h. A frame is converted a few rows at a time
into the picture's own memory, so nothing of the frame's size is allocated on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import av
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .color import ColorSpace, Rows, clean, repeat_last, rgb_to_yuv

ROWS_AT_ONCE = 72  # keeps a stripe's temporaries in the processor's cache; even, so that no chroma row is split


@dataclass(frozen=True)
class PixelFormat:
    """One layout: `planes` lists each plane's interleaved components, `chroma` how many columns and rows share one.

    bits: of a component; shift: how far to the left they lie in their 16-bit word.
    """

    bits: int
    planes: tuple[str, ...]
    chroma: tuple[int, int] = (1, 1)
    shift: int = 0
    big_endian: bool = False

    @property
    def alpha(self) -> bool:
        """Whether it has an alpha component."""
        return any("A" in plane for plane in self.planes)

    @property
    def rgb(self) -> bool:
        """Whether its components are R'G'B', and not Y'CbCr."""
        return "R" in "".join(self.planes)

    @property
    def dtype(self) -> np.dtype:
        """Of a component in memory."""
        return np.dtype(np.uint8) if self.bits == 8 else np.dtype(">u2" if self.big_endian else "<u2")


PIXEL_FORMATS = {
    "yuv420p": PixelFormat(8, ("Y", "U", "V"), (2, 2)),
    "yuv422p": PixelFormat(8, ("Y", "U", "V"), (2, 1)),
    "yuv444p": PixelFormat(8, ("Y", "U", "V")),
    "nv12": PixelFormat(8, ("Y", "UV"), (2, 2)),
    "yuv420p10le": PixelFormat(10, ("Y", "U", "V"), (2, 2)),
    "yuv422p10le": PixelFormat(10, ("Y", "U", "V"), (2, 1)),
    "yuv444p10le": PixelFormat(10, ("Y", "U", "V")),
    "p010le": PixelFormat(10, ("Y", "UV"), (2, 2), shift=6),
    "p210le": PixelFormat(10, ("Y", "UV"), (2, 1), shift=6),
    "p410le": PixelFormat(10, ("Y", "UV"), shift=6),
    "yuva420p": PixelFormat(8, ("Y", "U", "V", "A"), (2, 2)),
    "yuva444p": PixelFormat(8, ("Y", "U", "V", "A")),
    "yuva444p10le": PixelFormat(10, ("Y", "U", "V", "A")),
    "ayuv64le": PixelFormat(16, ("AYUV",)),
    "rgb24": PixelFormat(8, ("RGB",)),
    "rgba": PixelFormat(8, ("RGBA",)),
    "bgra": PixelFormat(8, ("BGRA",)),
    "rgb48be": PixelFormat(16, ("RGB",), big_endian=True),
    "rgba64be": PixelFormat(16, ("RGBA",), big_endian=True),
}


def padded_size(width: int, height: int, name: str, odd_sizes: bool) -> tuple[int, int]:
    """The size that is stored: where the encoder takes no odd sides, subsampled ones are rounded up."""
    columns, rows = (1, 1) if odd_sizes else PIXEL_FORMATS[name].chroma
    return -(-width // columns) * columns, -(-height // rows) * rows


def fill(picture: av.VideoFrame, frame: Tensor, space: ColorSpace) -> bool:
    """Convert one frame into a picture's memory, rounding each component once; returns whether the frame held NaN.

    picture: of a format in PIXEL_FORMATS and at most one column and row larger than the frame, which then repeats its
    last ones. frame: floating [H, W, 3 or 4] on any device, clamped to 0..1, NaN counting as 0; its fourth channel is
    alpha, full range and not premultiplied, 1 where there is none. Temporaries are bounded by a stripe of rows for a
    frame on the CPU; from elsewhere it is fetched first.
    """
    layout = PIXEL_FORMATS[picture.format.name]
    targets = _component_views(picture, layout)
    had_nan = False
    frame = frame.detach().to("cpu")
    for top in range(0, picture.height, ROWS_AT_ONCE):
        rows = min(ROWS_AT_ONCE, picture.height - top)
        stripe, stripe_had_nan = clean(frame[top : top + rows, :, :4].to(torch.float32).numpy())
        had_nan |= stripe_had_nan
        for name, values in _components(_padded(stripe, rows, picture.width, layout), layout, space).items():
            row = top // layout.chroma[1] if name in "UV" else top
            part = targets[name][row : row + values.shape[0]]
            part[...] = _stored(values[: part.shape[0], : part.shape[1]], layout)
    return had_nan


def _component_views(picture: av.VideoFrame, layout: PixelFormat) -> dict[str, NDArray[Any]]:
    """Each component's samples in the picture's memory as [rows, columns]."""
    views: dict[str, NDArray[Any]] = {}
    for plane, components in zip(picture.planes, layout.planes):
        memory = np.frombuffer(memoryview(plane), dtype=layout.dtype)
        memory = memory.reshape(plane.height, plane.line_size // layout.dtype.itemsize)
        used = memory[:, : plane.width * len(components)].reshape(plane.height, plane.width, len(components))
        views |= {name: used[:, :, index] for index, name in enumerate(components)}
    return views


def _padded(stripe: Rows, height: int, width: int, layout: PixelFormat) -> Rows:
    """The stripe with its last column and row repeated as far as the picture and whole chroma samples need."""
    columns, rows = (-(-side // share) * share for side, share in zip((width, height), layout.chroma))
    return repeat_last(repeat_last(stripe, 1, columns - stripe.shape[1]), 0, rows - stripe.shape[0])


def _components(stripe: Rows, layout: PixelFormat, space: ColorSpace) -> dict[str, Rows]:
    """Components of [rows, columns, 3 or 4] in 0..1, scaled to their bits and moved up by the 0.5 that rounds."""
    full = np.float32((1 << layout.bits) - 1)
    if layout.rgb:
        values = {name: stripe[:, :, index] * full + np.float32(0.5) for index, name in enumerate("RGB")}
    else:
        values = rgb_to_yuv(stripe[:, :, :3], space, layout.bits, *layout.chroma)
    if layout.alpha:
        alpha = stripe[:, :, 3] if stripe.shape[2] > 3 else np.ones_like(stripe[:, :, 0])
        values["A"] = alpha * full + np.float32(0.5)
    return values


def _stored(values: Rows, layout: PixelFormat) -> NDArray[Any]:
    if layout.bits == 8:
        return values.astype(np.uint8)
    return values.astype(np.uint16) << layout.shift
