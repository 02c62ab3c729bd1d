"""ggml's K-quants: super-blocks of 256 weights, cut into 8 or 16 sub-blocks with small integer scales.

Layouts from ggml-common.h. Q2_K, Q4_K and Q5_K give each sub-block a scale and a minimum, integers that are multiplied
by the super-block's float16 ``d`` and ``dmin``: weight = d * scale * q - dmin * minimum. Q3_K and Q6_K are symmetric:
weight = d * scale * q. The bits of 32 consecutive weights lie in one position of 32 consecutive bytes (a plane).
"""

import torch
from torch import Tensor

from .block_format import BlockFormat, HalfField
from .block_ops import bit_planes, constant, halves, write

SUPER_BLOCK = 256
PLANE = 32

# Q4_K and Q5_K begin with four words: d and dmin, then A, B, C with 6-bit scales and minimums. Scales 0-3 are the low
# six bits of A's bytes, scales 4-7 the low nibbles of C's bytes below the top two bits of A's; minimums likewise with B
# and C's high nibbles. Hence two words per result, low part and high part, each masked and multiplied into place;
# results are in the order scales 0-3, scales 4-7, minimums 0-3, minimums 4-7.
SCALE_WORDS = (1, 3, 2, 3, 1, 1, 2, 2)
SCALE_MASKS = (0x3F3F3F3F, 0x0F0F0F0F, 0x3F3F3F3F, -0x0F0F0F10, 0, -0x3F3F3F40, 0, -0x3F3F3F40)
SCALE_FACTORS = (*[1.0] * 12, *[1 / 16] * 4, *[1 / 4] * 16)

# Q3_K's last 14 bytes, read with the two before them as eight 16-bit words: sixteen scales, their low nibbles in words
# 1-4 and their top two bits in words 5 and 6; then d.
Q3_WORDS = (1, 2, 3, 4, 1, 2, 3, 4, 5, 6, 5, 6, 5, 6, 5, 6)
Q3_SHIFTS = (0, 0, 0, 0, 4, 4, 4, 4, 0, 0, 2, 2, 4, 4, 6, 6)
Q3_MASKS = (*[0x0F0F] * 8, *[0x0303] * 8)


def _scales_and_minimums(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return Q4_K's and Q5_K's d * scale and dmin * minimum, float32 [n, 8, 1] each."""
    header = blocks[:, :16].clone(memory_format=torch.contiguous_format)
    device = header.device
    words = header.view(torch.int32).index_select(1, constant(SCALE_WORDS, torch.int32, device))
    parts = words.bitwise_and_(constant(SCALE_MASKS, torch.int32, device)).view(torch.uint8)
    low, high = (parts * constant(SCALE_FACTORS, torch.float32, device)).view(-1, 2, 2, 8).unbind(1)
    scaled = (low + high) * header.view(torch.float16)[:, :2].unsqueeze(-1)
    d, m = scaled.unsqueeze(-1).unbind(1)
    return d, m


def _planes(field: Tensor) -> Tensor:
    """[n, 32 * k] bytes -> contiguous [k, n, 32]."""
    return field.unflatten(1, (-1, PLANE)).transpose(0, 1).contiguous()


def _write_nibbles(qs: Tensor, quants: Tensor) -> None:
    """Planes [4, n, 32] of two nibbles each -> the eight planes of ``quants``."""
    torch.bitwise_and(qs, 0x0F, out=quants[0::2])
    torch.bitwise_right_shift(qs, 4, out=quants[1::2])


def _q2_k(blocks: Tensor, out: Tensor) -> None:
    scaled = bit_planes(blocks[:, :16], 4) * halves(blocks, 80, 2).t().unsqueeze(-1)
    d, m = scaled.unsqueeze(-1).unbind(0)
    quants = bit_planes(_planes(blocks[:, 16:80]), 2).permute(2, 1, 0, 3).reshape(-1, 16, 16)
    write(torch.sub, quants * d, m, out.view(-1, 16, 16))


def _q3_k(blocks: Tensor, out: Tensor) -> None:
    device = blocks.device
    tail = blocks[:, 94:].clone(memory_format=torch.contiguous_format)
    words = tail.view(torch.int16).index_select(1, constant(Q3_WORDS, torch.int32, device))
    words = words.bitwise_right_shift_(constant(Q3_SHIFTS, torch.int16, device))
    low, high = words.bitwise_and_(constant(Q3_MASKS, torch.int16, device)).view(torch.uint8).split(16, dim=1)
    scales = low.add(high, alpha=16) - constant((32.0,), torch.float32, device)
    scales = (scales * tail.view(torch.float16)[:, 7:]).view(-1, 16, 1)

    planes = _planes(blocks[:, :96])
    third = bit_planes(planes[0], 1).view(2, 4, -1, PLANE).view(torch.int8)
    shifts = constant((0, 2, 4, 6), torch.uint8, device).view(4, 1, 1)
    # two bits under six ones are an int8 of q - 4; the bit of the high mask adds 4
    low_minus_four = (planes[1:].unsqueeze(1) >> shifts).bitwise_or_(0xFC).view(torch.int8)
    quants = torch.empty(blocks.shape[0], 2, 4, PLANE, dtype=torch.int8, device=device)
    torch.add(low_minus_four.permute(2, 0, 1, 3), third.permute(2, 0, 1, 3), alpha=4, out=quants)
    write(torch.mul, quants.view(-1, 16, 16), scales, out.view(-1, 16, 16))


def _q4_k(blocks: Tensor, out: Tensor) -> None:
    d, m = _scales_and_minimums(blocks)
    quants = torch.empty(8, blocks.shape[0], PLANE, dtype=torch.uint8, device=blocks.device)
    _write_nibbles(_planes(blocks[:, 16:]), quants)
    write(torch.sub, quants.transpose(0, 1) * d, m, out.view(-1, 8, PLANE))


def _q5_k(blocks: Tensor, out: Tensor) -> None:
    d, m = _scales_and_minimums(blocks)
    planes = _planes(blocks[:, 16:])
    quants = torch.empty(8, blocks.shape[0], PLANE, dtype=torch.uint8, device=blocks.device)
    _write_nibbles(planes[1:], quants)
    quants.add_(bit_planes(planes[0], 1), alpha=16)
    write(torch.sub, quants.transpose(0, 1) * d, m, out.view(-1, 8, PLANE))


def _q6_k(blocks: Tensor, out: Tensor) -> None:
    scales = (blocks[:, 192:208].view(torch.int8) * halves(blocks, 208)).view(-1, 16, 1)
    planes = _planes(blocks[:, :192])
    high = bit_planes(planes[4:], 2).transpose(0, 1)
    quants = torch.empty(2, 4, blocks.shape[0], PLANE, dtype=torch.uint8, device=blocks.device)
    low = planes[:4].view(2, 2, -1, PLANE)
    torch.bitwise_and(low, 0x0F, out=quants[:, :2])
    torch.bitwise_right_shift(low, 4, out=quants[:, 2:])
    quants = quants.add_(high, alpha=16).view(torch.int8).sub_(32)
    quants = quants.permute(2, 0, 1, 3).reshape(-1, 16, 16)
    write(torch.mul, quants, scales, out.view(-1, 16, 16))


FORMATS = (
    BlockFormat("Q2_K", 10, SUPER_BLOCK, 16 + 64 + 4, _q2_k, HalfField(80), HalfField(82)),
    BlockFormat("Q3_K", 11, SUPER_BLOCK, 32 + 64 + 12 + 2, _q3_k, HalfField(108)),
    BlockFormat("Q4_K", 12, SUPER_BLOCK, 4 + 12 + 128, _q4_k, HalfField(0), HalfField(2)),
    BlockFormat("Q5_K", 13, SUPER_BLOCK, 4 + 12 + 32 + 128, _q5_k, HalfField(0), HalfField(2)),
    BlockFormat("Q6_K", 14, SUPER_BLOCK, 128 + 64 + 16 + 2, _q6_k, HalfField(208)),
)
