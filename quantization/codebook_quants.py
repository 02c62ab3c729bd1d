"""ggml's types with 4-bit indices into 16 values: IQ4_NL, IQ4_XS, and the block floating-point MXFP4 and NVFP4.

Layouts and values from ggml-common.h; E8M0 and E2M1 from the OCP microscaling specification. A byte of ``qs`` holds
weight i of its group in the low nibble and weight i + half a group in the high one.
"""

import torch
from torch import Tensor

from .block_format import BlockFormat, CodeField, HalfField
from .block_ops import bit_planes, constant, halves, write

IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
E2M1_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)

# Halved, since the values above are doubled. E8M0 codes 0 and 1 give float32 subnormals.
E8M0_HALVED = tuple(2.0 ** (code - 128) for code in range(256))
UE4M3_NAN = 0x7F
UE4M3_HALVED = tuple(
    0.0 if code == UE4M3_NAN
    else (code & 7) * 2.0**-10 if (code >> 3) & 15 == 0
    else (1 + (code & 7) / 8) * 2.0 ** (((code >> 3) & 15) - 8)
    for code in range(256)
)  # fmt: skip


PAIRS = 0x0F0F + 1


def _pairs(values: tuple[int, ...]) -> tuple[int, ...]:
    """For two nibbles in two bytes (0xF0F masked), their values as the two int8 of one little-endian int16."""
    return tuple((values[word & 15] & 0xFF) + (values[word >> 8 & 15] << 8) for word in range(PAIRS))


IQ4_PAIRS = _pairs(IQ4_VALUES)
E2M1_PAIRS = _pairs(E2M1_DOUBLED)


def _lookup(qs: Tensor, pairs: tuple[int, ...], group: int) -> Tensor:
    """Bytes [n, k] -> int8 [n, 2 * k / group, group], each group's low nibbles before its high ones."""
    words = qs.clone(memory_format=torch.contiguous_format).view(torch.int16).view(-1, group // 4)
    index = torch.empty(words.shape[0], 2, group // 4, dtype=torch.int16, device=qs.device)
    index[:, 0] = words
    torch.bitwise_right_shift(words, 4, out=index[:, 1])
    table = constant(pairs, torch.int16, qs.device)
    values = table.index_select(0, index.bitwise_and_(0x0F0F).view(-1).int())
    return values.view(torch.int8).view(qs.shape[0], -1, group)


def _table_scales(codes: Tensor, values: tuple[float, ...]) -> Tensor:
    """Codes uint8 [n, k] -> float32 [n, k, 1]."""
    table = constant(values, torch.float32, codes.device)
    return table.index_select(0, codes.reshape(-1).int()).view(-1, codes.shape[1], 1)


def _iq4_nl(blocks: Tensor, out: Tensor) -> None:
    quants = _lookup(blocks[:, 2:], IQ4_PAIRS, 32)
    write(torch.mul, quants, halves(blocks, 0).unsqueeze(-1), out.view(-1, 1, 32))


def _iq4_xs(blocks: Tensor, out: Tensor) -> None:
    low = bit_planes(blocks[:, 4:8], 4).permute(1, 2, 0).reshape(-1, 8)
    high = bit_planes(blocks[:, 2:4], 2).permute(1, 2, 0).reshape(-1, 8)
    scales = low.add_(high, alpha=16).view(torch.int8).sub_(32) * halves(blocks, 0)
    write(torch.mul, _lookup(blocks[:, 8:], IQ4_PAIRS, 32), scales.unsqueeze(-1), out.view(-1, 8, 32))


def _mxfp4(blocks: Tensor, out: Tensor) -> None:
    scales = _table_scales(blocks[:, :1], E8M0_HALVED)
    write(torch.mul, _lookup(blocks[:, 1:], E2M1_PAIRS, 32), scales, out.view(-1, 1, 32))


def _nvfp4(blocks: Tensor, out: Tensor) -> None:
    scales = _table_scales(blocks[:, :4], UE4M3_HALVED)
    write(torch.mul, _lookup(blocks[:, 4:], E2M1_PAIRS, 16), scales, out.view(-1, 4, 16))


FORMATS = (
    BlockFormat("IQ4_NL", 20, 32, 2 + 16, _iq4_nl, HalfField(0)),
    BlockFormat("IQ4_XS", 23, 256, 2 + 2 + 4 + 128, _iq4_xs, HalfField(0)),
    BlockFormat("MXFP4", 39, 32, 1 + 16, _mxfp4, CodeField(0, 1, E8M0_HALVED, usable=255)),
    BlockFormat("NVFP4", 40, 64, 4 + 32, _nvfp4, CodeField(0, 4, UE4M3_HALVED, usable=UE4M3_NAN)),
)
