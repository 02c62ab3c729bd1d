"""cat corrupts memory when its result exceeds 2^31 elements.

The Metal kernel picks 32-bit offsets by the size of single dimensions, so offsets in a larger result turn negative: its
tail is never written, and what lies before it is overwritten (pytorch#189960, fixed by #189965 after 2.13). So it is
tried out in a child process only, by the full Doctor or at the first join of that size. The cure fills the result in
contiguous pieces, each within the limit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import child_probe, gate, probing
from .first_use import in_child
from .registry import Cure, Defect, FirstUse, Function, ProbeResult

ID = "cat-2-31"
NAMES = ("cat", "concat", "concatenate")


def reference(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """``torch.cat``, written piece by piece. The dtype is the promoted one."""
    parts = [tensor for tensor in tensors if tensor.shape != (0,)]
    dim = dim % parts[0].dim()
    shape = list(parts[0].shape)
    shape[dim] = sum(part.size(dim) for part in parts)
    dtype = parts[0].dtype
    for part in parts[1:]:
        dtype = torch.promote_types(dtype, part.dtype)
    output = parts[0].new_empty(shape, dtype=dtype)
    start = 0
    for part in parts:
        _copy(output, part, dim, start)
        start += part.size(dim)
    return output


def _copy(output: Tensor, part: Tensor, dim: int, start: int) -> None:
    """Write ``part`` into ``output`` at ``start`` along ``dim``, through slices of the leading dimension."""
    limit = gate.LIMITS[ID]
    if dim == 0:
        for first, length in gate.ranges(part.size(0), max(1, limit // max(1, math.prod(part.shape[1:])))):
            output[start + first : start + first + length].copy_(part[first : first + length])
    elif output.numel() <= limit:
        output.narrow(dim, start, part.size(dim)).copy_(part)
    elif output.size(0) == 1:
        _copy(output[0], part[0], dim - 1, start)
    else:
        for first, length in gate.ranges(output.size(0), max(1, limit * output.size(0) // output.numel())):
            rows = slice(first, first + length)
            if length == 1:
                _copy(output[first], part[first], dim - 1, start)
            else:
                output[rows].narrow(dim, start, part.size(dim)).copy_(part[rows])


def _applies(tensors: Any) -> bool:
    if not isinstance(tensors, (list, tuple)) or not tensors or not gate.acts_on(tensors[0]):
        return False
    limit = gate.LIMITS[ID]
    whole = all(isinstance(tensor, Tensor) for tensor in tensors) and gate.plain(*tensors)
    return whole and sum(tensor.numel() for tensor in tensors) > limit


def matching(tensors: Sequence[Tensor], dim: int) -> bool:
    """Whether the shapes fit together; what the original would refuse is left to it."""
    parts = [tensor for tensor in tensors if tensor.shape != (0,)]
    rank = parts[0].dim()
    if not -rank <= dim < rank or any(part.dim() != rank or part.device != parts[0].device for part in parts):
        return False
    others = [[size for axis, size in enumerate(part.shape) if axis != dim % rank] for part in parts]
    return all(other == others[0] for other in others)


def meets_cat(tensors: Any = (), dim: Any = 0, **kwargs: Any) -> bool:
    """Whether a call of cat is of trigger size."""
    return not kwargs and _applies(tensors) and isinstance(dim, int) and matching(tensors, dim)


def meets_stack(tensors: Any = (), dim: Any = 0, **kwargs: Any) -> bool:
    """Whether a call of stack is of trigger size."""
    return not kwargs and _applies(tensors) and len({tensor.shape for tensor in tensors}) == 1


def _make_cat(original: Function) -> Function:
    def cured(tensors: Sequence[Tensor], dim: int = 0, **kwargs: Any) -> Tensor:
        if meets_cat(tensors, dim, **kwargs):
            return reference(tensors, dim)
        return original(tensors, dim, **kwargs)

    return cured


def _make_stack(original: Function) -> Function:
    def cured(tensors: Sequence[Tensor], dim: int = 0, **kwargs: Any) -> Tensor:
        if meets_stack(tensors, dim, **kwargs):
            return reference([tensor.unsqueeze(dim) for tensor in tensors], dim)
        return original(tensors, dim, **kwargs)

    return cured


def check(original: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ProbeResult:
    """What the kernel does in a process of its own; the call itself is not made."""
    return in_child(ID, gate.LIMITS[ID])


def probe(device: torch.device, quick: bool) -> ProbeResult:
    """Join two halves whose sum passes the limit: in a child process (not quick), here where it is scaled down."""
    limit = gate.LIMITS[ID]
    if limit > probing.SCALED:
        if quick:
            return probing.not_applicable("takes 3 GiB and a process of its own")
        return in_child(ID, limit)
    side = math.isqrt(limit) // 2 + 1
    left, right = probing.noise((2 * side, side)), probing.noise((2 * side, side + 1), seed=1)
    expected = torch.cat([left, right], 1)
    compute = partial(torch.cat, [left.to(device), right.to(device)], 1)
    return probing.compare(compute, expected, probing.EXACT, f"cat to {expected.numel()} elements")


def _footprint(quick: bool) -> int:
    return 0 if quick else child_probe.footprint(ID, gate.LIMITS[ID])


DEFECTS = (
    Defect(
        id=ID,
        title="cat beyond 2^31 elements corrupts memory",
        symptom="Damaged frames anywhere after joining very large tensors",
        trigger="torch.cat or stack to more than 2^31 elements, each dimension below",
        cause="32-bit offsets in the Metal kernel",
        affected="torch up to 2.13",
        upstream=("pytorch#189960", "pytorch#189965"),
        seam="torch.cat, concat, concatenate, stack",
        advice="Leave the patch on auto, or update torch to 2.14.",
        probe=probe,
        cure=Cure(
            targets=(*(("torch", name) for name in NAMES), ("torch", "stack")),
            make={**dict.fromkeys(NAMES, _make_cat), "stack": _make_stack},
            first_use={
                **dict.fromkeys(NAMES, FirstUse(meets_cat, check)),
                "stack": FirstUse(meets_stack, check),
            },
        ),
        reference="cat_2_31.reference",
        footprint=_footprint,
    ),
)
