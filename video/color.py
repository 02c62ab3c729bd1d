"""R'G'B' to Y'CbCr as video encoders take it, in NumPy, whose loops leave the other cores to the encoder.

Luma weights and limited range are those of ITU-R BT.709-6 (sections 3.2 and 3.4); subsampled chroma is sited on the
left column of each pair, midway between two rows, which is what H.264 decoders assume (ITU-T H.264, annex E, type 0).
The colour tags are FFmpeg's encoder options; their numbers are the code points of ITU-T H.273.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.float32]


@dataclass(frozen=True)
class ColorSpace:
    """Luma weights of red and blue, and the tags that tell a player about them.

    tags: FFmpeg's encoder options; frame_tags: the same on PyAV's frames, which some encoders (ProRes) ask for.
    """

    red: float
    blue: float
    tags: dict[str, str]
    frame_tags: dict[str, int]

    def luma(self) -> list[float]:
        """Weights of R', G', B' in Y' for R'G'B' in 0..1 and Y' in 0..219."""
        return [219 * weight for weight in (self.red, 1 - self.red - self.blue, self.blue)]

    def chroma(self) -> list[list[float]]:
        """Weights of R', G', B' in Cb and Cr for R'G'B' in 0..1 and chroma in -112..112."""
        green = 1 - self.red - self.blue
        to_blue, to_red = 112 / (1 - self.blue), 112 / (1 - self.red)
        return [
            [-self.red * to_blue, -green * to_blue, 112.0],
            [112.0, -green * to_red, -self.blue * to_red],
        ]


COLOR_SPACES = {
    "bt709": ColorSpace(
        red=0.2126,
        blue=0.0722,
        tags={
            "color_primaries": "bt709",
            "color_trc": "bt709",
            "colorspace": "bt709",
            "color_range": "tv",
            "chroma_sample_location": "left",
        },
        frame_tags={"color_primaries": 1, "color_trc": 1, "colorspace": 1, "color_range": 1},
    ),
}


def rgb_to_yuv(rgb: Rows, space: ColorSpace, bits: int, columns: int, rows: int) -> dict[str, Rows]:
    """Limited-range Y', Cb and Cr ("Y", "U", "V") of some whole rows, moved up by the 0.5 that makes truncation round.

    rgb: float32 [H, W, 3] in 0..1, H a multiple of `rows` and W of `columns`, the numbers (1 or 2) that share a chroma
    sample. bits: 8 and more, of one component. Returns float32 [H, W] and [H / rows, W / columns].
    """
    scale = 1 << (bits - 8)
    luma = rgb @ np.array(space.luma(), np.float32) * np.float32(scale)
    luma += 16 * scale + 0.5
    sited, weight = rgb, float(scale)
    if rows == 2:
        sited, weight = rgb[0::2] + rgb[1::2], weight / 2
    if columns == 2:
        pair, odd = sited, sited[:, 1::2]
        sited, weight = pair[:, 0::2] * 2, weight / 4  # [1, 2, 1] around the left column
        sited += odd
        sited[:, 1:] += odd[:, :-1]
        sited[:, 0] += pair[:, 0]
    blue, red = (sited @ (np.array(row, np.float32) * np.float32(weight)) for row in space.chroma())
    blue += 128 * scale + 0.5
    red += 128 * scale + 0.5
    return {"Y": luma, "U": blue, "V": red}


def clean(values: Rows) -> tuple[Rows, bool]:
    """Copy clamped to 0..1 with NaN as 0, and whether there was any."""
    values = np.clip(values, 0, 1)
    if np.isfinite(values.sum()):
        return values, False
    return np.nan_to_num(values, copy=False, nan=0.0), True


def repeat_last(values: Rows, axis: int, times: int) -> Rows:
    """The array with its last slice along `axis` repeated so many more times."""
    if times <= 0:
        return values
    return np.concatenate((values, *[values.take([-1], axis)] * times), axis)
