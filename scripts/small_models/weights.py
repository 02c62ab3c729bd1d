"""Seeded random weights in any ggml type, with the statistics that keep a forward pass well-behaved.

A weight matrix has standard deviation 1/sqrt(fan-in), so that activations keep their size from layer to layer.
Every tensor has its own seed, made of the model's seed and the tensor's name: the same weights come out whichever
other tensors the model has.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod, sqrt
from pathlib import Path

import torch
from apple_silicon_video.quantization.formats import FORMATS, dequantize, random_blocks
from safetensors.torch import save_file

FLOAT_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation of a tensor's elements."""

    mean: float
    std: float


@dataclass(frozen=True)
class Weight:
    """One tensor as stored in a file: ``data`` is uint8, one-dimensional, of blocks of ggml's ``type_name``."""

    name: str
    shape: tuple[int, ...]
    type_name: str
    data: torch.Tensor

    def decoded(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The dense tensor of ``shape`` that a loader must see."""
        if self.type_name in FLOAT_DTYPES:
            return self.data.view(FLOAT_DTYPES[self.type_name]).reshape(self.shape).to(dtype)
        fmt = FORMATS[self.type_name]
        blocks = (self.data.numel() // fmt.block_bytes, fmt.block_size)
        return dequantize(self.data, fmt, blocks, dtype).reshape(self.shape)


def tensor_seed(seed: int, name: str) -> int:
    """Seed of one tensor, below 2**31 and the same on every machine."""
    return zlib.crc32(f"{seed}:{name}".encode()) & 0x7FFFFFFF


def random_weight(name: str, shape: tuple[int, ...], type_name: str, statistics: Statistics, seed: int) -> Weight:
    """A random tensor of the given type; block types have zero mean whatever ``statistics`` ask for."""
    own_seed = tensor_seed(seed, name)
    if type_name in FLOAT_DTYPES:
        generator = torch.Generator().manual_seed(own_seed)
        dense = torch.randn(shape, generator=generator) * statistics.std + statistics.mean
        return Weight(name, shape, type_name, dense.to(FLOAT_DTYPES[type_name]).reshape(-1).view(torch.uint8))
    fmt = FORMATS[type_name]
    std = max(statistics.std, statistics.mean)
    blocks = random_blocks(fmt, prod(shape) // fmt.block_size, own_seed, std=std)
    return Weight(name, shape, type_name, blocks.reshape(-1))


def linear_statistics(shape: tuple[int, ...], gain: float = 1.0) -> Statistics:
    """Zero mean and gain/sqrt(fan-in); the fan-in is the product of all dimensions but the first."""
    return Statistics(0.0, gain / sqrt(prod(shape[1:])))


_NEAR_ONE = Statistics(1.0, 0.05)
_SMALL = Statistics(0.0, 0.02)
_WAN_RULES: tuple[tuple[re.Pattern[str], Statistics | float], ...] = (
    (re.compile(r"norm\w*\.weight$|img_emb\.proj\.[04]\.weight$"), _NEAR_ONE),
    (re.compile(r"\.bias$|emb_pos$"), _SMALL),
    (re.compile(r"modulation$"), Statistics(0.0, 0.2)),
    (re.compile(r"time_projection"), 0.3),
)
_T5_RULES: tuple[tuple[re.Pattern[str], Statistics | float], ...] = (
    (re.compile(r"norm\.weight$"), _NEAR_ONE),
    (re.compile(r"attn_rel_b|token_embd"), Statistics(0.0, 1.0)),
    # T5 does not divide attention scores by sqrt(head dim), so its queries are that much smaller.
    (re.compile(r"attn_q"), 0.125),
)


def wan_statistics(name: str, shape: tuple[int, ...]) -> Statistics:
    """Statistics of a Wan tensor by its name."""
    return _by_rules(_WAN_RULES, name, shape)


def t5_statistics(name: str, shape: tuple[int, ...]) -> Statistics:
    """Statistics of a T5 or UMT5 tensor by its name in llama.cpp."""
    return _by_rules(_T5_RULES, name, shape)


def _by_rules(
    rules: tuple[tuple[re.Pattern[str], Statistics | float], ...], name: str, shape: tuple[int, ...]
) -> Statistics:
    rule = next((rule for pattern, rule in rules if pattern.search(name)), 1.0)
    return rule if isinstance(rule, Statistics) else linear_statistics(shape, rule)


def decoded_state_dict(weights: Iterable[Weight], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Dense state dict of the given weights."""
    return {weight.name: weight.decoded(dtype) for weight in weights}


def write_safetensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> Path:
    """Write beside the name and move into place; the same tensors give the same bytes. ``metadata`` is the header's."""
    beside = path.with_name(f".{path.name}.part")
    try:
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, beside, metadata={"format": "pt", **(metadata or {})})
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    return path
