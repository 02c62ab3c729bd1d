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

# The twelve bytes of 6-bit scales and minimums of Q4_K and Q5_K, as 32-bit words A, B, C (after the word of d and dmin):
# scales 0-3 are the low six bits of A's bytes, minimums 0-3 those of B's; scales 4-7 are the low nibbles of C's bytes
# below the top two bits of A's, minimums 4-7 C's high nibbles below the top two bits of B's.
# Hence eight words to mask, in the order (low part, high part) x (scales, minimums) x (sub-blocks 0-3, 4-7).
WORDS = (1, 3, 2, 3, 1, 1, 2, 2)
WORD_SHIFTS = (0, 0, 0, 4, 0, 2, 0, 2)
WORD_MASKS = (0x3F3F3F3F, 0x0F0F0F0F, 0x3F3F3F3F, 0x0F0F0F0F, 0, 0x30303030, 0, 0x30303030)

# Q3_K's twelve bytes, as words A, B, C: the low nibbles of the 16 scales in A and B, their top two bits in C.
Q3_WORDS = (0, 1, 0, 1, 2, 2, 2, 2)
Q3_SHIFTS = (0, 0, 4, 4, 0, 2, 4, 6)
Q3_MASKS = (*[0x0F0F0F0F] * 4, *[0x03030303] * 4)


def _unpack_words(words: Tensor, order: tuple[int, ...], shifts: tuple[int, ...], masks: tuple[int, ...]) -> Tensor:
    """int32 [n, k] -> uint8 [n, 32]: the words in ``order``, each shifted and masked."""
    device = words.device
    fields = words[:, constant(order, torch.int64, device)]
    fields = fields.bitwise_right_shift_(constant(shifts, torch.int32, device))
    return fields.bitwise_and_(constant(masks, torch.int32, device)).view(torch.uint8)


def _scales_and_minimums(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """First 16 bytes of Q4_K and Q5_K -> d * scales and dmin * minimums, float32 [n, 8, 1] each."""
    header = blocks[:, :16].clone(memory_format=torch.contiguous_format)
    d_dmin = header.view(torch.float16)[:, :2].float()
    low, high = _unpack_words(header.view(torch.int32), WORDS, WORD_SHIFTS, WORD_MASKS).view(-1, 2, 16).unbind(1)
    scaled = (low | high).view(-1, 2, 8, 1) * d_dmin.view(-1, 2, 1, 1)
    return scaled[:, 0], scaled[:, 1]


def _in_order(planes: Tensor) -> Tensor:
    """Planes [8, n, 32] in the order of the weights -> [n, 256]."""
    return planes.transpose(0, 1).reshape(-1, SUPER_BLOCK)


def _quarters(qs: Tensor) -> Tensor:
    """[n, 64] bytes of 2-bit quants -> uint8 [2, 4, n, 32]."""
    return bit_planes(qs.view(-1, 2, PLANE).transpose(0, 1), 2).transpose(0, 1)


def _q2_k(blocks: Tensor, out: Tensor) -> None:
    scales = bit_planes(blocks[:, :16], 4) * halves(blocks, 80, 2).t().unsqueeze(-1)
    d, m = scales.unsqueeze(-1)
    quants = _in_order(_quarters(blocks[:, 16:80]).reshape(8, -1, PLANE)).view(-1, 16, 16)
    write(torch.sub, quants * d, m, out.view(-1, 16, 16))


def _q3_k(blocks: Tensor, out: Tensor) -> None:
    words = blocks[:, 96:108].clone(memory_format=torch.contiguous_format).view(torch.int32)
    low, high = _unpack_words(words, Q3_WORDS, Q3_SHIFTS, Q3_MASKS).view(-1, 2, 16).unbind(1)
    scales = low.add_(high, alpha=16).view(torch.int8).sub_(32) * halves(blocks, 108)
    quants = _quarters(blocks[:, 32:96]).reshape(8, -1, PLANE)
    quants = quants.add_(bit_planes(blocks[:, :32], 1), alpha=4).view(torch.int8).sub_(4)
    write(torch.mul, _in_order(quants).view(-1, 16, 16), scales.unsqueeze(-1), out.view(-1, 16, 16))


def _q4_k(blocks: Tensor, out: Tensor) -> None:
    d, m = _scales_and_minimums(blocks)
    quants = bit_planes(blocks[:, 16:].unflatten(1, (4, PLANE)), 4)
    quants = quants.permute(1, 2, 0, 3).reshape(-1, 8, PLANE)
    write(torch.sub, quants * d, m, out.view(-1, 8, PLANE))


def _q5_k(blocks: Tensor, out: Tensor) -> None:
    d, m = _scales_and_minimums(blocks)
    quants = bit_planes(blocks[:, 48:].unflatten(1, (4, PLANE)).transpose(0, 1), 4).transpose(0, 1)
    fifth = bit_planes(blocks[:, 16:48], 1)
    quants = quants.reshape(8, -1, PLANE).add_(fifth, alpha=16)
    write(torch.sub, quants.transpose(0, 1) * d, m, out.view(-1, 8, PLANE))


def _q6_k(blocks: Tensor, out: Tensor) -> None:
    scales = blocks[:, 192:208].view(torch.int8) * halves(blocks, 208)
    low = bit_planes(blocks[:, :128].unflatten(1, (2, 2, PLANE)).permute(1, 2, 0, 3), 4)
    low = low.transpose(0, 1).reshape(8, -1, PLANE)
    high = bit_planes(blocks[:, 128:192].unflatten(1, (2, PLANE)).transpose(0, 1), 2).transpose(0, 1)
    quants = low.add_(high.reshape(8, -1, PLANE), alpha=16).view(torch.int8).sub_(32)
    write(torch.mul, _in_order(quants).view(-1, 16, 16), scales.unsqueeze(-1), out.view(-1, 16, 16))


FORMATS = (
    BlockFormat("Q2_K", 10, SUPER_BLOCK, 16 + 64 + 4, _q2_k, HalfField(80), HalfField(82)),
    BlockFormat("Q3_K", 11, SUPER_BLOCK, 32 + 64 + 12 + 2, _q3_k, HalfField(108)),
    BlockFormat("Q4_K", 12, SUPER_BLOCK, 4 + 12 + 128, _q4_k, HalfField(0), HalfField(2)),
    BlockFormat("Q5_K", 13, SUPER_BLOCK, 4 + 12 + 32 + 128, _q5_k, HalfField(0), HalfField(2)),
    BlockFormat("Q6_K", 14, SUPER_BLOCK, 128 + 64 + 16 + 2, _q6_k, HalfField(208)),
)
