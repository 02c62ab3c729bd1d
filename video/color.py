"""R'G'B' to Y'CbCr as video encoders take it, on the device where the frame lies.

Luma weights and limited range are those of ITU-R BT.709-6 (sections 3.2 and 3.4); chroma is sited on the left column
of each pair, midway between two rows, which is what H.264 decoders assume (ITU-T H.264, annex E, type 0). The colour
tags are FFmpeg's encoder options; their numbers are the code points of ITU-T H.273.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ROWS_AT_ONCE = 72  # keeps a stripe's temporaries in the processor's cache; even, so that no chroma row is split


@dataclass(frozen=True)
class ColorSpace:
    """Luma weights of red and blue, and the tags that tell a player about them (FFmpeg encoder options)."""

    red: float
    blue: float
    tags: dict[str, str]

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
    ),
}


def even_size(width: int, height: int) -> tuple[int, int]:
    """The size after repeating the last column or row of an odd side, as 4:2:0 needs."""
    return width + width % 2, height + height % 2


def rgb_to_yuv420(frame: Tensor, space: ColorSpace) -> tuple[Tensor, bool]:
    """Convert one frame to 8-bit limited-range 4:2:0, rounding once.

    frame: floating [H, W, C], C >= 3, any device; channels after the third are ignored, values are clamped to 0..1,
    NaN counts as 0, an odd side repeats its last column or row. Returns uint8 [H * 3 / 2, W] on the same device (the
    Y' plane, then Cb, then Cr, each row after row: FFmpeg's yuv420p) and whether the frame held NaN. Temporaries are
    bounded by a stripe of rows on the CPU and by the frame on other devices.
    """
    height, width = frame.shape[:2]
    even_width, even_height = even_size(width, height)
    planes = torch.empty(even_height * 3 // 2, even_width, dtype=torch.uint8, device=frame.device)
    luma, chroma = planes[:even_height], planes[even_height:].view(2, even_height // 2, even_width // 2)
    luma_weights = torch.tensor(space.luma(), device=frame.device)
    chroma_weights = torch.tensor(space.chroma(), device=frame.device).T / 8  # the 2 x [1, 2, 1] filter adds up to 8

    had_nan = False
    rows = ROWS_AT_ONCE if frame.device.type == "cpu" else even_height
    for top in range(0, even_height, rows):
        rgb, stripe_had_nan = _clean(frame[top : top + rows, :, :3])
        had_nan |= stripe_had_nan
        rgb = _repeat_last(_repeat_last(rgb, 1), 0)
        luma[top : top + rows] = (rgb @ luma_weights).add_(16.5)

        pair = rgb[0::2] + rgb[1::2]
        odd = pair[:, 1::2]
        sited = pair[:, 0::2] * 2 + odd
        sited[:, 1:] += odd[:, :-1]
        sited[:, 0] += pair[:, 0]
        chroma[:, top // 2 : (top + rows) // 2] = (sited @ chroma_weights).add_(128.5).permute(2, 0, 1)
    return planes, had_nan


def _clean(rgb: Tensor) -> tuple[Tensor, bool]:
    """float32 copy clamped to 0..1 with NaN as 0, and whether there was any."""
    rgb = rgb.to(torch.float32).clamp(0, 1)
    if torch.isfinite(rgb.sum()):
        return rgb, False
    return rgb.nan_to_num_(nan=0.0), True


def _repeat_last(rgb: Tensor, dim: int) -> Tensor:
    if rgb.shape[dim] % 2 == 0:
        return rgb
    return torch.cat((rgb, rgb.narrow(dim, -1, 1)), dim)
