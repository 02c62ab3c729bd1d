"""ggml's IQ1, IQ2 and IQ3 types: super-blocks of 256 weights, stored as indices into fixed grids of 4 or 8 weights.

Layouts from ggml-common.h. The grids lie in data/iq_grids.npz, which scripts/make_iq_grids.py writes from gguf-py's
tables. IQ2 and IQ3 keep the signs apart, either as eight bits per eight weights or as a 7-bit index (an eighth sign
makes the number of negative ones even); IQ1 adds or subtracts an eighth instead.
"""

from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .block_format import BlockFormat, HalfField, SplitHalfField
from .block_ops import bit_planes, constant, halves, integers, write

SUPER_BLOCK = 256
GRIDS = Path(__file__).with_name("data") / "iq_grids.npz"
DELTA = 0.125
SIGN_SHIFTS = (0, 7, 14, 21)
HIGH_BIT_SHIFTS = (0, 3, 6, 9)


@cache
def _grid(name: str, device: torch.device) -> Tensor:
    """Return the grid of a type as float32 [entries, 4 or 8]."""
    with torch.inference_mode(False), np.load(GRIDS) as grids:
        return torch.from_numpy(grids[name]).to(device=device, dtype=torch.float32)


@cache
def _signs(device: torch.device) -> Tensor:
    """Return +1 and -1 for the bits of every byte, float32 [256, 8]."""
    with torch.inference_mode(False):
        bits = torch.arange(256, dtype=torch.int32)[:, None] >> torch.arange(8, dtype=torch.int32) & 1
        return (1 - 2 * bits).to(device=device, dtype=torch.float32)


@cache
def _even_signs(device: torch.device) -> Tensor:
    """Return the signs for the 7-bit indices, float32 [128, 8]: the eighth makes the product positive."""
    with torch.inference_mode(False):
        seven = _signs(torch.device("cpu"))[:128, :7]
        return torch.cat((seven, seven.prod(dim=1, keepdim=True)), dim=1).to(device)


def _shifted(values: Tensor, shifts: tuple[int, ...], mask: int) -> Tensor:
    """int32 [n, k] -> int32 [n, k * len(shifts)]: ``mask`` bits from each of ``shifts``."""
    fields = values.unsqueeze(-1) >> constant(shifts, torch.int32, values.device)
    return fields.bitwise_and_(mask).flatten(1)


def _nibble_scales(field: Tensor) -> Tensor:
    """Bytes [n, k] -> uint8 [n, 2 * k], low nibble first."""
    return bit_planes(field, 4).permute(1, 2, 0).flatten(1)


def _write_signed(out: Tensor, scales: Tensor, table: Tensor, index: Tensor, signs: Tensor, sign_index: Tensor) -> None:
    """Write scales * grid * signs; ``scales`` is float32 [n, sub-blocks], the indices are integers [n, any]."""
    values = table.index_select(0, index.reshape(-1).int()).view(-1, 8)
    values.mul_(signs.index_select(0, sign_index.reshape(-1).int()))
    shape = (*scales.shape, SUPER_BLOCK // scales.shape[1])
    write(torch.mul, values.view(shape), scales.unsqueeze(-1), out.view(shape))


def _iq2_xxs(blocks: Tensor, out: Tensor) -> None:
    words = integers(blocks, 2, 16, torch.int32)
    high = words[:, 1::2]
    scales = ((high >> 28) & 15).float().add_(0.5) * halves(blocks, 0) * 0.25
    index = words.view(torch.uint8).view(-1, 8, 8)[:, :, :4]
    device = blocks.device
    _write_signed(out, scales, _grid("IQ2_XXS", device), index, _even_signs(device), _shifted(high, SIGN_SHIFTS, 127))


def _iq2_xs(blocks: Tensor, out: Tensor) -> None:
    words = integers(blocks, 2, 32, torch.int16).int()
    scales = _nibble_scales(blocks[:, 66:]).float().add_(0.5) * halves(blocks, 0) * 0.25
    device = blocks.device
    _write_signed(out, scales, _grid("IQ2_XS", device), words & 511, _even_signs(device), (words >> 9) & 127)


def _iq2_s(blocks: Tensor, out: Tensor) -> None:
    scales = _nibble_scales(blocks[:, 74:]).float().add_(0.5) * halves(blocks, 0) * 0.25
    high = bit_planes(blocks[:, 66:74], 2).permute(1, 2, 0).flatten(1)
    index = blocks[:, 2:34].int().add_(high, alpha=256)
    device = blocks.device
    _write_signed(out, scales, _grid("IQ2_S", device), index, _signs(device), blocks[:, 34:66])


def _iq3_xxs(blocks: Tensor, out: Tensor) -> None:
    words = integers(blocks, 66, 8, torch.int32)
    scales = ((words >> 28) & 15).float().add_(0.5) * halves(blocks, 0) * 0.5
    index, device = blocks[:, 2:66], blocks.device
    _write_signed(out, scales, _grid("IQ3_XXS", device), index, _even_signs(device), _shifted(words, SIGN_SHIFTS, 127))


def _iq3_s(blocks: Tensor, out: Tensor) -> None:
    scales = _nibble_scales(blocks[:, 106:]).mul_(2).add_(1) * halves(blocks, 0)
    high = bit_planes(blocks[:, 66:74], 1).permute(1, 2, 0).flatten(1)
    index = blocks[:, 2:66].int().add_(high, alpha=256)
    device = blocks.device
    _write_signed(out, scales, _grid("IQ3_S", device), index, _signs(device), blocks[:, 74:106])


def _write_shifted(out: Tensor, scales: Tensor, index: Tensor, negative: Tensor) -> None:
    """Write scales * (grid +- an eighth); ``scales`` and ``negative`` (0 or 1) are [n, k] with k dividing 256 / 8."""
    values = _grid("IQ1_S", out.device).index_select(0, index.reshape(-1)).view(*negative.shape, -1)
    values.add_(negative.float().mul_(-2 * DELTA).add_(DELTA).unsqueeze(-1))
    shape = (*scales.shape, SUPER_BLOCK // scales.shape[1])
    write(torch.mul, values.view(shape), scales.unsqueeze(-1), out.view(shape))


def _iq1_s(blocks: Tensor, out: Tensor) -> None:
    words = integers(blocks, 34, 8, torch.int16).int()
    scales = ((words >> 12) & 7).mul_(2).add_(1) * halves(blocks, 0)
    index = blocks[:, 2:34].int().add_(_shifted(words, HIGH_BIT_SHIFTS, 7), alpha=256)
    _write_shifted(out, scales, index, (words >> 15) & 1)


def _iq1_m(blocks: Tensor, out: Tensor) -> None:
    words = integers(blocks, 48, 4, torch.int16).int()
    nibbles = (words >> 12) & 15
    bits = nibbles[:, 0] | nibbles[:, 1] << 4 | nibbles[:, 2] << 8 | nibbles[:, 3] << 12
    d = bits.to(torch.int16).view(torch.float16).float().unsqueeze(-1)
    scales = _shifted(words, HIGH_BIT_SHIFTS, 7).mul_(2).add_(1) * d
    high = _nibble_scales(blocks[:, 32:48])
    index = blocks[:, :32].int().add_(high & 7, alpha=256)
    _write_shifted(out, scales, index, high >> 3)


FORMATS = (
    BlockFormat("IQ2_XXS", 16, SUPER_BLOCK, 2 + 64, _iq2_xxs, HalfField(0)),
    BlockFormat("IQ2_XS", 17, SUPER_BLOCK, 2 + 64 + 8, _iq2_xs, HalfField(0)),
    BlockFormat("IQ3_XXS", 18, SUPER_BLOCK, 2 + 64 + 32, _iq3_xxs, HalfField(0)),
    BlockFormat("IQ1_S", 19, SUPER_BLOCK, 2 + 32 + 16, _iq1_s, HalfField(0)),
    BlockFormat("IQ3_S", 21, SUPER_BLOCK, 2 + 64 + 8 + 32 + 4, _iq3_s, HalfField(0)),
    BlockFormat("IQ2_S", 22, SUPER_BLOCK, 2 + 32 + 32 + 8 + 8, _iq2_s, HalfField(0)),
    BlockFormat("IQ1_M", 29, SUPER_BLOCK, 32 + 16 + 8, _iq1_m, SplitHalfField(48)),
)
