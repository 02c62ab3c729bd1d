"""Plain decoding of ggml blocks: the chains of element-wise operations that the benchmark compares the pack with.

Written from the layouts in ggml-common.h in the obvious way, as loaders of GGUF files decode today: the whole tensor at
once, one operation per step of the formula, arithmetic in the dtype that is asked for. In float32 the results equal
gguf-py's bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def _half(blocks: Tensor, offset: int, dtype: torch.dtype) -> Tensor:
    """The float16 at byte ``offset``, [n, 1]."""
    return blocks[:, offset : offset + 2].contiguous().view(torch.float16).to(dtype)


def _fields(field: Tensor, bits: int, group: int) -> Tensor:
    """Bytes [n, k] -> uint8 [n, 8 * k / bits]: per ``group`` bytes, all their lowest fields, then the next ones."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=field.device).view(-1, 1)
    fields = field.reshape(field.shape[0], -1, 1, group) >> shifts
    return (fields & ((1 << bits) - 1)).reshape(field.shape[0], -1)


def _fifth_bits(field: Tensor) -> Tensor:
    """Bytes [n, 4] -> uint8 [n, 32] of 0 or 16."""
    word = field.contiguous().view(torch.int32)
    bits = word >> torch.arange(32, dtype=torch.int32, device=field.device)
    return (bits & 1).to(torch.uint8) << 4


def _iq4(nibbles: Tensor) -> Tensor:
    return torch.tensor(IQ4_VALUES, dtype=torch.int8, device=nibbles.device)[nibbles.long()]


def _q4_0(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    return (_fields(blocks[:, 2:], 4, 16).to(torch.int8) - 8) * _half(blocks, 0, dtype)


def _q4_1(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    return _fields(blocks[:, 4:], 4, 16) * _half(blocks, 0, dtype) + _half(blocks, 2, dtype)


def _q5_0(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    quants = _fields(blocks[:, 6:], 4, 16) | _fifth_bits(blocks[:, 2:6])
    return (quants.to(torch.int8) - 16) * _half(blocks, 0, dtype)


def _q5_1(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    quants = _fields(blocks[:, 8:], 4, 16) | _fifth_bits(blocks[:, 4:8])
    return quants * _half(blocks, 0, dtype) + _half(blocks, 2, dtype)


def _q8_0(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    return blocks[:, 2:].view(torch.int8) * _half(blocks, 0, dtype)


def _q2_k(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    scales = (_half(blocks, 80, dtype) * (blocks[:, :16] & 15)).unsqueeze(-1)
    minimums = (_half(blocks, 82, dtype) * (blocks[:, :16] >> 4)).unsqueeze(-1)
    return scales * _fields(blocks[:, 16:80], 2, 32).view(-1, 16, 16) - minimums


def _q3_k(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    codes = _fields(blocks[:, 96:104], 4, 8) | (_fields(blocks[:, 104:108], 2, 4) << 4)
    scales = (_half(blocks, 108, dtype) * (codes.to(torch.int8) - 32)).unsqueeze(-1)
    low, high = _fields(blocks[:, 32:96], 2, 32), _fields(blocks[:, :32], 1, 32)
    quants = low.to(torch.int8) - ((high ^ 1) << 2).to(torch.int8)
    return scales * quants.view(-1, 16, 16)


def _scales_and_minimums(blocks: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    first, second, third = blocks[:, 4:16].split(4, dim=1)
    scales = torch.cat((first & 63, (third & 15) | ((first >> 2) & 48)), dim=1)
    minimums = torch.cat((second & 63, (third >> 4) | ((second >> 2) & 48)), dim=1)
    d, m = _half(blocks, 0, dtype) * scales, _half(blocks, 2, dtype) * minimums
    return d.unsqueeze(-1), m.unsqueeze(-1)


def _q4_k(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    scales, minimums = _scales_and_minimums(blocks, dtype)
    return scales * _fields(blocks[:, 16:], 4, 32).view(-1, 8, 32) - minimums


def _q5_k(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    scales, minimums = _scales_and_minimums(blocks, dtype)
    quants = _fields(blocks[:, 48:], 4, 32) | (_fields(blocks[:, 16:48], 1, 32) << 4)
    return scales * quants.view(-1, 8, 32) - minimums


def _q6_k(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    quants = _fields(blocks[:, :128], 4, 64) | (_fields(blocks[:, 128:192], 2, 32) << 4)
    scales = _half(blocks, 208, dtype) * blocks[:, 192:208].view(torch.int8)
    return scales.unsqueeze(-1) * (quants.to(torch.int8) - 32).view(-1, 16, 16)


def _iq4_nl(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    return _iq4(_fields(blocks[:, 2:], 4, 16)) * _half(blocks, 0, dtype)


def _iq4_xs(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    codes = _fields(blocks[:, 4:8], 4, 1) | (_fields(blocks[:, 2:4], 2, 1) << 4)
    scales = (_half(blocks, 0, dtype) * (codes.to(torch.int8) - 32)).unsqueeze(-1)
    return scales * _iq4(_fields(blocks[:, 8:], 4, 16)).view(-1, 8, 32)


DECODERS: dict[str, Callable[[Tensor, torch.dtype], Tensor]] = {
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
}


def decode(name: str, blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """Decode uint8 [n, block_bytes] of the ggml type ``name`` to [n, block_size] of a floating-point ``dtype``."""
    return DECODERS[name](blocks, dtype).reshape(blocks.shape[0], -1)
