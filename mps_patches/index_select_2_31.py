"""index_select and embedding return zeros when their source exceeds 2^31 elements.

The gather addresses its source in 32 bits (pytorch#188756, fixed in 2.14). The cure gathers from pieces of the source,
each within the limit, and keeps from every piece the rows that lie in it; nothing is read back from the device. Setting
it off takes 2 GiB, so the full Doctor does, or the first gather of that size is checked on a few rows.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import gate, probing
from .registry import Cure, Defect, FirstUse, Function, ProbeResult

ID = "index-select-2-31"
CHECKED, KEPT = 5, 64  # slices that a check gathers, and places that it looks at in each other dimension


def reference(input: Tensor, dim: int, index: Tensor) -> Tensor:
    """``torch.index_select`` with integer ``index`` [n] (or 0-dim), from pieces of the source."""
    return _select(torch.index_select, input, dim % input.dim(), index.reshape(-1))


def _select(select: Function, input: Tensor, dim: int, index: Tensor) -> Tensor:
    limit = gate.LIMITS[ID]
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
    return gate.acts_on(source) and source.numel() > gate.LIMITS[ID] and source.dim() > 0 and gate.plain(source)


def meets_index_select(input: Any = None, dim: Any = None, index: Any = None, **kwargs: Any) -> bool:
    """Whether a call of index_select is of trigger size."""
    return not kwargs and isinstance(dim, int) and isinstance(index, Tensor) and _applies(input)


def meets_embedding(input: Any = None, weight: Any = None, *args: Any, **kwargs: Any) -> bool:
    """Whether a call of embedding is a plain look-up in a table of trigger size."""
    plain_lookup = len(args) < 2 and kwargs.get("max_norm") is None and not kwargs.get("sparse")
    return plain_lookup and isinstance(input, Tensor) and _applies(weight) and weight.dim() == 2


def _make_index_select(original: Function) -> Function:
    def cured(input: Tensor, dim: int, index: Tensor, **kwargs: Any) -> Tensor:
        if meets_index_select(input, dim, index, **kwargs):
            return _select(original, input, dim % input.dim(), index.reshape(-1))
        return original(input, dim, index, **kwargs)

    return cured


def _make_embedding(original: Function) -> Function:
    def cured(input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if meets_embedding(input, weight, *args, **kwargs):
            return _select(torch.index_select, weight, 0, input.reshape(-1)).view(*input.shape, weight.size(1))
        return original(input, weight, *args, **kwargs)

    return cured


def check_index_select(original: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ProbeResult:
    """Gather a few slices of the call's own source, from the first to the last, and hold them against its slices."""
    bound = dict(zip(("input", "dim", "index"), args), **kwargs)
    source, dim = bound["input"], bound["dim"]
    return _check(partial(original, source, dim), source, dim)


def check_embedding(original: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ProbeResult:
    """As ``check_index_select``, with the rows of the table."""
    table = dict(zip(("input", "weight"), args), **kwargs)["weight"]
    return _check(lambda index: original(index, table), table, 0)


def _check(gather: Function, source: Tensor, dim: int) -> ProbeResult:
    places = probing.sampled(source.size(dim), CHECKED)
    expected = torch.cat([_trimmed(source.narrow(dim, place, 1), dim) for place in places], dim).cpu()
    index = torch.tensor(places, device=source.device)
    return probing.compare(
        lambda: _trimmed(gather(index), dim), expected, probing.EXACT, f"rows of a source of {source.numel()}"
    )


def _trimmed(rows: Tensor, dim: int) -> Tensor:
    """The last ``KEPT`` places of every other dimension, as one contiguous tensor."""
    for other in range(rows.dim()):
        if other != dim % rows.dim():
            kept = min(KEPT, rows.size(other))
            rows = rows.narrow(other, rows.size(other) - kept, kept)
    return rows.contiguous()


def probe(device: torch.device, quick: bool) -> ProbeResult:
    """Gather rows from both ends of a source of more bytes than the limit: 2 GiB, so not in the quick check."""
    limit = gate.LIMITS[ID]
    if quick and limit > probing.SCALED:
        return probing.not_applicable(f"takes {limit / probing.GIB:.0f} GiB")
    width = 1 << 14 if limit > probing.SCALED else 64
    count = limit // width + 2
    index = torch.tensor([0, 1, count // 2, count - 2, count - 1])
    expected = (index % 251 + 1).to(torch.uint8)[:, None].expand(-1, width)
    results = [
        probing.compare(partial(gather, device, count, width, index), expected, probing.EXACT, f"{name}, {count} rows")
        for name, gather in (("index_select", _gather), ("embedding", _embed))[: 1 if limit > probing.SCALED else 2]
    ]
    return probing.worst(results)


def _footprint(quick: bool) -> int:
    return 0 if quick else 2 * gate.LIMITS[ID] if gate.LIMITS[ID] <= probing.SCALED else gate.LIMITS[ID] + (1 << 27)


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
        id=ID,
        title="index_select beyond 2^31 elements gives zeros",
        symptom="Zero rows gathered from very large tables",
        trigger="torch.index_select or embedding from a source of more than 2^31 elements",
        cause="32-bit addressing of the source",
        affected="torch up to 2.13",
        upstream=("pytorch#188756",),
        seam="torch.index_select, Tensor.index_select, torch.nn.functional.embedding",
        advice="Leave the patch on auto, or update torch to 2.14.",
        probe=probe,
        cure=Cure(
            targets=(
                ("torch", "index_select"),
                ("torch.Tensor", "index_select"),
                ("torch.nn.functional", "embedding"),
            ),
            make={"index_select": _make_index_select, "embedding": _make_embedding},
            first_use={
                "index_select": FirstUse(meets_index_select, check_index_select),
                "embedding": FirstUse(meets_embedding, check_embedding),
            },
        ),
        reference="index_select_2_31.reference",
        footprint=_footprint,
    ),
)
