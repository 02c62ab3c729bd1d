"""index_select and embedding return zeros when their source exceeds 2^31 elements.

The gather addresses its source in 32 bits (pytorch#188756, fixed in 2.14). The cure gathers from pieces of the source,
each within the limit, and keeps from every piece the rows that lie in it; nothing is read back from the device.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import gate, probing
from .registry import Cure, Defect, Function, ProbeResult


def reference(input: Tensor, dim: int, index: Tensor) -> Tensor:
    """``torch.index_select`` with integer ``index`` [n] (or 0-dim), from pieces of the source."""
    return _select(torch.index_select, input, dim % input.dim(), index.reshape(-1))


def _select(select: Function, input: Tensor, dim: int, index: Tensor) -> Tensor:
    limit = gate.LIMITS["index-select-2-31"]
    if input.numel() <= limit:
        return select(input, dim, index)
    if dim > 0:
        pieces = gate.ranges(input.size(0), max(1, limit * input.size(0) // input.numel()))
        if input.size(0) == 1:
            return _select(select, input[0], dim - 1, index).unsqueeze(0)
        return torch.cat([_select(select, input.narrow(0, *piece), dim, index) for piece in pieces])
    output = input.new_zeros((index.numel(), *input.shape[1:]))
    shape = (-1, *[1] * (input.dim() - 1))
    for start, length in gate.ranges(input.size(0), max(1, limit // max(1, math.prod(input.shape[1:])))):
        inside = (index >= start) & (index < start + length)
        rows = select(input.narrow(0, start, length), 0, (index - start).clamp(0, length - 1))
        output = torch.where(inside.view(shape), rows, output)
    return output


def _applies(source: Any) -> bool:
    return (
        gate.acts_on(source)
        and source.numel() > gate.LIMITS["index-select-2-31"]
        and source.dim() > 0
        and gate.plain(source)
    )


def _make_index_select(original: Function) -> Function:
    def cured(input: Tensor, dim: int, index: Tensor, **kwargs: Any) -> Tensor:
        if not kwargs and _applies(input):
            return _select(original, input, dim % input.dim(), index.reshape(-1))
        return original(input, dim, index, **kwargs)

    return cured


def _make_embedding(original: Function) -> Function:
    def cured(input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        plain_lookup = len(args) < 2 and kwargs.get("max_norm") is None and not kwargs.get("sparse")
        if plain_lookup and _applies(weight) and weight.dim() == 2:
            return _select(torch.index_select, weight, 0, input.reshape(-1)).view(*input.shape, weight.size(1))
        return original(input, weight, *args, **kwargs)

    return cured


def probe(device: torch.device, quick: bool) -> ProbeResult:
    """Gather rows from both ends of a source of more bytes than the limit: 2 GiB, so not at start."""
    limit = gate.LIMITS["index-select-2-31"]
    width = 1 << 14 if limit > 1 << 24 else 64
    count = limit // width + 2
    if quick and limit > 1 << 24:
        return probing.not_applicable(f"checked by the Doctor only: takes {limit / probing.GIB:.0f} GiB")
    if reason := probing.lacks_memory(device, count * width + (1 << 29)):
        return probing.not_applicable(reason)
    index = torch.tensor([0, 1, count // 2, count - 2, count - 1])
    expected = (index % 251 + 1).to(torch.uint8)[:, None].expand(-1, width)
    results = [
        probing.compare(partial(gather, device, count, width, index), expected, probing.EXACT, f"{name}, {count} rows")
        for name, gather in (("index_select", _gather), ("embedding", _embed))[: 1 if limit > 1 << 24 else 2]
    ]
    return probing.worst(results)


def _source(device: torch.device, count: int, width: int, dtype: torch.dtype) -> Tensor:
    """Rows filled with their own number, modulo 251, plus one."""
    numbers = (torch.arange(count) % 251 + 1).to(dtype).to(device)
    return numbers[:, None].expand(-1, width).contiguous()


def _gather(device: torch.device, count: int, width: int, index: Tensor) -> Tensor:
    return torch.index_select(_source(device, count, width, torch.uint8), 0, index.to(device))


def _embed(device: torch.device, count: int, width: int, index: Tensor) -> Tensor:
    table = _source(device, count, width, torch.float16)
    return torch.nn.functional.embedding(index.to(device), table).to(torch.uint8)


DEFECTS = (
    Defect(
        id="index-select-2-31",
        title="index_select beyond 2^31 elements gives zeros",
        symptom="Zero rows gathered from very large tables",
        trigger="torch.index_select or embedding from a source of more than 2^31 elements",
        cause="32-bit addressing of the source",
        affected="torch up to 2.13",
        upstream=("pytorch#188756",),
        seam="torch.index_select, Tensor.index_select, torch.nn.functional.embedding",
        advice="Leave the patch on, or update torch to 2.14.",
        probe=probe,
        cure=Cure(
            targets=(
                ("torch", "index_select"),
                ("torch.Tensor", "index_select"),
                ("torch.nn.functional", "embedding"),
            ),
            make={"index_select": _make_index_select, "embedding": _make_embedding},
            preventive=gate.torch_before(2, 14),
        ),
        reference="index_select_2_31.reference",
    ),
)
