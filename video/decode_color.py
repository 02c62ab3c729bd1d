"""Y'CbCr to R'G'B': which matrix and range a frame has, and the plain conversion that the fast one is checked against.

Luma weights are those of ITU-R BT.601-7, BT.709-6 and BT.2020-2, the ranges those of BT.2100-2 table 9. A stream
without a matrix tag is taken as players take it (mpv, libplacebo): BT.709 from 1280 columns or more than 576 rows on,
BT.601 below, and JPEG pictures always BT.601 full range. Chroma samples lie on the left column of each pair, midway
between two rows (ITU-T H.264, annex E, type 0), those of JPEG in the middle, and are interpolated linearly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .media_info import ColorTags

# Weights of red and blue in luma, by FFmpeg's name of the matrix.
LUMA_WEIGHTS = {
    "bt709": (0.2126, 0.0722),
    "fcc": (0.30, 0.11),
    "smpte170m": (0.299, 0.114),
    "smpte240m": (0.212, 0.087),
    "bt2020nc": (0.2627, 0.0593),
}
# What is decoded like another matrix: constant luminance and the rest are met too rarely for a path of their own.
# BT.470 has the weights of BT.601, and FFmpeg's scaler does not know its name in every version.
ALIKE = {"bt470bg": "smpte170m", "bt2020c": "bt2020nc", "ictcp": "bt2020nc", "ycgco": "bt709"}
HD_COLUMNS, SD_ROWS = 1280, 576
JPEG_CODECS = {"mjpeg", "mjpegb", "ljpeg", "jpeg2000", "webp"}
RGB_PREFIXES = ("rgb", "bgr", "gbr", "argb", "abgr", "pal8", "0rgb", "0bgr", "x2rgb", "x2bgr")


@dataclass(frozen=True)
class PictureColor:
    """How the numbers of a stream's pictures are meant.

    matrix: a key of LUMA_WEIGHTS, or "rgb". full_range: 0..2^bits - 1 instead of 16..235 times 2^(bits - 8).
    centered: chroma lies in the middle of its pixels, not on the left one.
    """

    matrix: str
    full_range: bool
    centered: bool = False


def is_rgb(pixel_format: str) -> bool:
    """Whether FFmpeg's pixel format holds R'G'B'."""
    return pixel_format.startswith(RGB_PREFIXES)


def is_gray(pixel_format: str) -> bool:
    """Whether FFmpeg's pixel format holds luma alone."""
    return pixel_format.startswith(("gray", "ya8", "ya16", "mono"))


def picture_color(tags: ColorTags, pixel_format: str, codec: str, width: int, height: int) -> PictureColor:
    """What the tags mean, and what is assumed where there are none."""
    if is_rgb(pixel_format):
        return PictureColor("rgb", True)
    jpeg = codec in JPEG_CODECS
    matrix = ALIKE.get(tags.matrix, tags.matrix)
    if matrix not in LUMA_WEIGHTS:
        large = width >= HD_COLUMNS or height > SD_ROWS
        matrix = "bt709" if large and not jpeg else "smpte170m"
    untagged_full = pixel_format.startswith("yuvj") or jpeg or is_gray(pixel_format)
    full = untagged_full if tags.range == "unspecified" else tags.range == "pc"
    return PictureColor(matrix, full, centered=jpeg)


def planes_of(frame: Any) -> list[np.ndarray[Any, Any]] | None:
    """The components of a planar 8 to 16-bit frame as arrays [rows, columns]; None for another layout."""
    components = frame.format.components
    names = frame.format.name
    bits = max(c.bits for c in components)
    if not names.startswith(("yuv", "gray")) or len(frame.planes) != len(components) or names.endswith("be"):
        return None
    if bits < 8 or bits > 16 or "f32" in names or "f16" in names:
        return None
    kind = np.uint8 if bits == 8 else np.uint16
    planes = []
    for plane, component in zip(frame.planes, components):
        values = np.frombuffer(plane, kind)
        step = plane.line_size // values.itemsize
        planes.append(values[: step * component.height].reshape(component.height, step)[:, : component.width])
    return planes


def reference_rgb(
    frame: Any, color: PictureColor, dtype: torch.dtype = torch.float64, rows: int | None = None
) -> Tensor | None:
    """A planar Y'CbCr or gray frame as R'G'B' in 0..1, [3, H, W]; None for a layout that is not planar.

    The formulas of BT.601 and its successors without rounding, chroma interpolated linearly from its sites. rows:
    convert only the first ones (even); the last one of them is not exact.
    """
    planes = planes_of(frame)
    if planes is None:
        return None
    if rows is not None and rows < planes[0].shape[0]:
        planes = [plane[: -(-rows * plane.shape[0] // planes[0].shape[0])] for plane in planes]
        planes = [planes[0][:rows], *planes[1:]]
    bits = max(component.bits for component in frame.format.components)
    unit = 1 << (bits - 8)
    black, luma_scale, chroma_scale = (0, 256 * unit - 1, 256 * unit - 1)
    if not color.full_range:
        black, luma_scale, chroma_scale = 16 * unit, 219 * unit, 224 * unit
    luma = (_values(planes[0], dtype) - black) / luma_scale
    if len(planes) < 3:
        return luma.clamp(0, 1).expand(3, -1, -1)
    height, width = luma.shape
    blue, red = (
        (_upsample(_values(plane, dtype), height, width, color.centered) - 128 * unit) / chroma_scale
        for plane in planes[1:3]
    )
    red_weight, blue_weight = LUMA_WEIGHTS[color.matrix]
    r = luma + 2 * (1 - red_weight) * red
    b = luma + 2 * (1 - blue_weight) * blue
    g = (luma - red_weight * r - blue_weight * b) / (1 - red_weight - blue_weight)
    return torch.stack((r, g, b)).clamp_(0, 1)


def _values(plane: np.ndarray[Any, Any], dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(plane.astype(np.float64 if dtype == torch.float64 else np.float32))


def _upsample(chroma: Tensor, height: int, width: int, centered: bool) -> Tensor:
    """Linear interpolation to [height, width], edges repeated."""
    if chroma.shape[0] != height:
        chroma = _double(chroma, 0, True)[:height]
    if chroma.shape[1] != width:
        times = -(-width // chroma.shape[1])
        while times > 1:
            chroma, times = _double(chroma, 1, centered), times // 2
    return chroma[:, :width]


def _double(values: Tensor, dim: int, centered: bool) -> Tensor:
    """Twice as many samples along a dimension: a quarter before and after each, or on it and halfway to the next."""
    first, last = values.narrow(dim, 0, 1), values.narrow(dim, -1, 1)
    before = torch.cat((first, values.narrow(dim, 0, values.shape[dim] - 1)), dim)
    after = torch.cat((values.narrow(dim, 1, values.shape[dim] - 1), last), dim)
    pair = ((before + 3 * values) / 4, (3 * values + after) / 4) if centered else (values, (values + after) / 2)
    return torch.stack(pair, dim + 1).flatten(dim, dim + 1)
