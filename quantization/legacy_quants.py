"""ggml's plain types: bfloat16, and blocks of 32 weights with one scale (and, in the _1 types, one offset).

Layouts from ggml-common.h: a float16 scale ``d``, a float16 offset ``m`` (_1 types), the fifth bits ``qh`` (Q5 types),
then the quants ``qs``; a byte of ``qs`` holds weight i in its low nibble and weight i + 16 in its high nibble.
"""

import torch
from torch import Tensor

from .block_format import BFloat16Field, BlockFormat, HalfField
from .block_ops import constant, halves, write

BLOCK = 32
FIFTH_BITS = tuple((byte >> bit & 1) << 4 for byte in range(256) for bit in range(8))


def _nibbles(qs: Tensor) -> Tensor:
    """[n, 16] bytes -> uint8 [n, 32] values of four bits."""
    values = torch.empty(qs.shape[0], BLOCK, dtype=torch.uint8, device=qs.device)
    torch.bitwise_and(qs, 0x0F, out=values[:, :16])
    torch.bitwise_right_shift(qs, 4, out=values[:, 16:])
    return values


def _five_bits(qh: Tensor, qs: Tensor) -> Tensor:
    """[n, 4] bytes of fifth bits and [n, 16] bytes of nibbles -> uint8 [n, 32] values of five bits."""
    table = constant(FIFTH_BITS, torch.uint8, qh.device).view(256, 8)
    fifth = table.index_select(0, qh.reshape(-1).int())
    return _nibbles(qs).add_(fifth.view(-1, BLOCK))


def _bf16(blocks: Tensor, out: Tensor) -> None:
    bits = blocks.clone(memory_format=torch.contiguous_format).view(torch.int16).int()
    out.copy_(bits.bitwise_left_shift_(16).view(torch.float32))


def _q4_0(blocks: Tensor, out: Tensor) -> None:
    quants = _nibbles(blocks[:, 2:]).view(torch.int8).sub_(8)
    write(torch.mul, quants, halves(blocks, 0), out)


def _q4_1(blocks: Tensor, out: Tensor) -> None:
    d, m = halves(blocks, 0, 2).split(1, dim=1)
    write(torch.add, _nibbles(blocks[:, 4:]) * d, m, out)


def _q5_0(blocks: Tensor, out: Tensor) -> None:
    quants = _five_bits(blocks[:, 2:6], blocks[:, 6:]).view(torch.int8).sub_(16)
    write(torch.mul, quants, halves(blocks, 0), out)


def _q5_1(blocks: Tensor, out: Tensor) -> None:
    d, m = halves(blocks, 0, 2).split(1, dim=1)
    write(torch.add, _five_bits(blocks[:, 4:8], blocks[:, 8:]) * d, m, out)


def _q8_0(blocks: Tensor, out: Tensor) -> None:
    write(torch.mul, blocks[:, 2:].view(torch.int8), halves(blocks, 0), out)


FORMATS = (
    BlockFormat("BF16", 30, 1, 2, _bf16, BFloat16Field()),
    BlockFormat("Q4_0", 2, BLOCK, 2 + 16, _q4_0, HalfField(0)),
    BlockFormat("Q4_1", 3, BLOCK, 4 + 16, _q4_1, HalfField(0), HalfField(2)),
    BlockFormat("Q5_0", 6, BLOCK, 2 + 4 + 16, _q5_0, HalfField(0)),
    BlockFormat("Q5_1", 7, BLOCK, 4 + 4 + 16, _q5_1, HalfField(0), HalfField(2)),
    BlockFormat("Q8_0", 8, BLOCK, 2 + 32, _q8_0, HalfField(0)),
)
