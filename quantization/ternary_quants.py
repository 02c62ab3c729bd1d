"""ggml's ternary types for weights of -1, 0 and 1: super-blocks of 256 with one float16 scale at their end.

TQ1_0 packs five base-3 digits (four in its last four bytes) into a byte as a fixed-point fraction, the first weight's
digit the most significant; TQ2_0 packs four 2-bit digits. Layouts from ggml-common.h.
"""

import torch
from torch import Tensor

from .block_format import BlockFormat, HalfField
from .block_ops import bit_planes, constant, halves, write

SUPER_BLOCK = 256
POWERS_OF_3 = (1, 3, 9, 27, 81)


def _digits(qs: Tensor, count: int) -> Tensor:
    """Bytes [n, k] -> int16 [n, count * k] digits 0 to 2, all first digits before the second ones."""
    powers = constant(POWERS_OF_3[:count], torch.int16, qs.device).view(-1, 1)
    fractions = (qs.unsqueeze(1) * powers).bitwise_and_(0xFF)
    return fractions.mul_(3).bitwise_right_shift_(8).flatten(1)


def _tq1_0(blocks: Tensor, out: Tensor) -> None:
    parts = ((blocks[:, :32], 5), (blocks[:, 32:48], 5), (blocks[:, 48:52], 4))
    digits = torch.cat([_digits(qs, count) for qs, count in parts], dim=1)
    write(torch.mul, digits.sub_(1), halves(blocks, 52), out)


def _tq2_0(blocks: Tensor, out: Tensor) -> None:
    digits = bit_planes(blocks[:, :64].unflatten(1, (2, 32)), 2).permute(1, 2, 0, 3).reshape(-1, SUPER_BLOCK)
    write(torch.mul, digits.view(torch.int8).sub_(1), halves(blocks, 64), out)


FORMATS = (
    BlockFormat("TQ1_0", 34, SUPER_BLOCK, 48 + 4 + 2, _tq1_0, HalfField(52)),
    BlockFormat("TQ2_0", 35, SUPER_BLOCK, 64 + 2, _tq2_0, HalfField(64)),
)
