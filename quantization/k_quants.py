"""ggml's K-quants: super-blocks of 256 weights, cut into 8 or 16 sub-blocks with small integer scales.

Layouts from ggml-common.h. Q2_K, Q4_K and Q5_K give each sub-block a scale and a minimum, integers that are multiplied
by the super-block's float16 ``d`` and ``dmin``: weight = d * scale * q - dmin * minimum. Q3_K and Q6_K are symmetric:
weight = d * scale * q. The bits of 32 consecutive weights lie in one position of 32 consecutive bytes (a plane).

To move few bytes, quants stay uint8 or int8 until one operation multiplies them and writes the weights; fields are left
where they lie in their byte when a factor can make up for it.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .block_format import BlockFormat, HalfField
from .block_ops import along, constant, half_field, halves, write, write_multiply_add

SUPER_BLOCK = 256
PLANE = 32
SIGNS = (1.0, -1.0)  # of d and dmin

# Q4_K's and Q5_K's twelve bytes of 6-bit scales and minimums, in groups of four called A, B and C: scales 0-3 are the
# low six bits of A, scales 4-7 the low nibbles of C below the top two bits of A; minimums likewise from B and C's high
# nibbles. The rows below are scales 0-3, the low bits of scales 4-7, minimums 0-3, the low bits of minimums 4-7, then
# the high bits of scales 4-7 and of minimums 4-7.
SCALE_BYTES = (*range(4), *range(8, 12), *range(4, 8), *range(8, 12), *range(4), *range(4, 8))
SCALE_SHIFTS = (*[0] * 12, *[4] * 4, *[2] * 8)
SCALE_MASKS = (*[0x3F] * 4, *[0x0F] * 4, *[0x3F] * 4, *[0x0F] * 4, *[0x30] * 8)

Q2_FACTORS = (1.0, -1 / 16)  # of d and dmin: a minimum stays in its high nibble

# Q3_K's quants stay at their plane's factor and get their third bits, which are at bit ``plane``, times 4 or 8. Scales
# are a nibble, the low ones first, and two bits, left at 2 * (sub-block // 4); the sum is taken minus 32.
Q3_SHIFTS = (0, 2)
Q3_MASKS = (0x03, 0x0C, 0x0C, 0x30)
Q3_PLANE_FACTORS = (1, 4, 4, 16)
Q3_SCALE_FACTORS = tuple(1 / factor for factor in Q3_PLANE_FACTORS for _ in range(2)) * 2
Q3_LOW_FACTORS = tuple(factor / (1, 16)[block // 8] for block, factor in enumerate(Q3_SCALE_FACTORS))
Q3_HIGH_FACTORS = tuple(factor * 16 / 4 ** (block // 4) for block, factor in enumerate(Q3_SCALE_FACTORS))
Q3_OFFSETS = tuple(-32 * factor for factor in Q3_SCALE_FACTORS)


def _masked_rows(field: Tensor, masks: tuple[int, ...]) -> Tensor:
    """Bytes [n, k] -> uint8 [len(masks) * k, n]: arithmetic on few bytes of a block is to run along the blocks."""
    n, k = field.shape
    rows = torch.empty(len(masks), k, n, dtype=torch.uint8, device=field.device)
    torch.bitwise_and(field.t(), along(masks, 3, torch.uint8, field.device), out=rows)
    return rows.view(-1, n)


def _products(codes: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [2, k, n] and ``factors`` [n, 2] of scales and minimums -> their products, float32 [n, k, 1] each."""
    out = torch.empty(2, codes.shape[2], codes.shape[1], dtype=torch.float32, device=codes.device)
    torch.mul(codes.transpose(1, 2), factors.t().unsqueeze(2), out=out)
    d, m = out.unsqueeze(-1).unbind(0)
    return d, m


def _scales_and_minimums(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return Q4_K's and Q5_K's d * scale and -dmin * minimum, float32 [n, 8, 1] each."""
    device = blocks.device
    parts = blocks[:, 4:16].t().index_select(0, constant(SCALE_BYTES, torch.int32, device))
    parts.bitwise_right_shift_(along(SCALE_SHIFTS, 2, torch.uint8, device))
    parts.bitwise_and_(along(SCALE_MASKS, 2, torch.uint8, device))
    codes, high = parts[:16].view(2, 2, 4, -1), parts[16:].view(2, 4, -1)
    codes[:, 1].bitwise_or_(high)
    factors = half_field(blocks, 0, 2) * constant(SIGNS, torch.float32, device)
    return _products(codes.view(2, 8, -1), factors)


def _fields(shift: Callable[[Tensor, Tensor], Tensor], field: Tensor, shifts: tuple[int, ...]) -> Tensor:
    """[..., 32] -> [..., len(shifts), 32], shifted by each of ``shifts``; the bits around a field stay."""
    table = constant(tuple(bits for bits in shifts for _ in range(PLANE)), field.dtype, field.device)
    return shift(field.unsqueeze(-2), table.view(-1, PLANE))


def _q2_k(blocks: Tensor, out: Tensor) -> None:
    factors = half_field(blocks, 80, 2) * constant(Q2_FACTORS, torch.float32, blocks.device)
    d, m = _products(_masked_rows(blocks[:, :16], (0x0F, 0xF0)).view(2, 16, -1), factors)
    quants = _fields(torch.bitwise_right_shift, blocks[:, 16:80].unflatten(1, (2, PLANE)), (0, 2, 4, 6))
    write_multiply_add(d, quants.bitwise_and_(3).view(-1, 16, 16), m, out.view(-1, 16, 16))


def _q3_k_scales(blocks: Tensor) -> Tensor:
    """Return d * (scale - 32) / plane factor, float32 [n, 16]."""
    low = _masked_rows(blocks[:, 96:104], (0x0F, 0xF0))
    high = _masked_rows(blocks[:, 104:108], (0x03, 0x0C, 0x30, 0xC0))
    low_factors, high_factors, offsets = (
        along(row, 2, torch.float32, blocks.device) for row in (Q3_LOW_FACTORS, Q3_HIGH_FACTORS, Q3_OFFSETS)
    )
    scales = torch.addcmul(offsets, low, low_factors).addcmul_(high, high_factors)
    out = torch.empty(blocks.shape[0], 16, dtype=torch.float32, device=blocks.device)
    return torch.mul(scales.t(), half_field(blocks, 108), out=out)


def _q3_k(blocks: Tensor, out: Tensor) -> None:
    device = blocks.device
    pairs = blocks[:, 32:96] >> along(Q3_SHIFTS, 3, torch.uint8, device)
    low = pairs.unsqueeze(1) & along(Q3_MASKS, 3, torch.uint8, device).view(2, 2, 1, 1)
    unset = _fields(torch.bitwise_right_shift, blocks[:, :32].bitwise_not(), (0, 4)).view(-1, 64)
    unset = unset & along((1, 2, 4, 8), 3, torch.uint8, device)
    low, unset = (part.view(torch.int8).view(2, 2, -1, 2, PLANE).permute(1, 2, 3, 0, 4) for part in (low, unset))
    quants = torch.empty(blocks.shape[0], 2, 2, 2, PLANE, dtype=torch.int8, device=device)
    torch.sub(low[0], unset[0], alpha=4, out=quants[:, :, :, 0])
    torch.sub(low[1], unset[1], alpha=8, out=quants[:, :, :, 1])
    write(torch.mul, quants.view(-1, 16, 16), _q3_k_scales(blocks).unsqueeze(-1), out.view(-1, 16, 16))


def _q4_k(blocks: Tensor, out: Tensor) -> None:
    d, m = (scaled.unflatten(1, (4, 2)).unbind(2) for scaled in _scales_and_minimums(blocks))
    qs, out = blocks[:, 16:].unflatten(1, (4, PLANE)), out.view(-1, 4, 2, PLANE)
    write_multiply_add(d[0], qs & 0x0F, m[0], out[:, :, 0])
    write_multiply_add(d[1], qs >> 4, m[1], out[:, :, 1])


def _q5_k(blocks: Tensor, out: Tensor) -> None:
    device = blocks.device
    d, m = _scales_and_minimums(blocks)
    planes = blocks[:, 16:].unflatten(1, (5, PLANE)).transpose(0, 1).contiguous()
    quants = torch.empty(8, blocks.shape[0], PLANE, dtype=torch.uint8, device=device)
    torch.bitwise_and(planes[1:], 0x0F, out=quants[0::2])
    torch.bitwise_right_shift(planes[1:], 4, out=quants[1::2])
    fifth = planes[0] >> along((0, 4), 3, torch.uint8, device)
    fifth = fifth.unsqueeze(1) & along((1, 2, 4, 8), 3, torch.uint8, device)
    quants.addcmul_(fifth.view(quants.shape), along((16, 8, 4, 2) * 2, 3, torch.uint8, device))
    write_multiply_add(d, quants.transpose(0, 1), m, out.view(-1, 8, PLANE))


def _q6_k(blocks: Tensor, out: Tensor) -> None:
    scales = blocks[:, 192:208].view(torch.int8) * halves(blocks, 208)
    quants = torch.empty(blocks.shape[0], 2, 2, 64, dtype=torch.int8, device=blocks.device)
    qs = blocks[:, :128].unflatten(1, (2, 64))
    torch.bitwise_and(qs, 0x0F, out=quants.view(torch.uint8)[:, :, 0])
    torch.bitwise_right_shift(qs, 4, out=quants.view(torch.uint8)[:, :, 1])
    # with its upper bit flipped, a 2-bit field moved to the top of an int8 and back is its value minus 2
    high = blocks[:, 128:192].bitwise_xor(0xAA).view(torch.int8).view(-1, PLANE)
    high = _fields(torch.bitwise_left_shift, high, (6, 4, 2, 0)).bitwise_right_shift_(6)
    quants.view(-1, 256).add_(high.view(-1, 256), alpha=16)
    write(torch.mul, quants.view(-1, 16, 16), scales.unsqueeze(-1), out.view(-1, 16, 16))


FORMATS = (
    BlockFormat("Q2_K", 10, SUPER_BLOCK, 16 + 64 + 4, _q2_k, HalfField(80), HalfField(82)),
    BlockFormat("Q3_K", 11, SUPER_BLOCK, 32 + 64 + 12 + 2, _q3_k, HalfField(108)),
    BlockFormat("Q4_K", 12, SUPER_BLOCK, 4 + 12 + 128, _q4_k, HalfField(0), HalfField(2)),
    BlockFormat("Q5_K", 13, SUPER_BLOCK, 4 + 12 + 32 + 128, _q5_k, HalfField(0), HalfField(2)),
    BlockFormat("Q6_K", 14, SUPER_BLOCK, 128 + 64 + 16 + 2, _q6_k, HalfField(208)),
)
