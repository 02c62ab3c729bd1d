"""Graph operations refuse tensors beyond INT_MAX elements, and slices of such tensors.

MPSGraph raises "does not support tensor dims larger than INT_MAX" (before torch 2.9 it ended the process) for the
products, powers, repeats and joins of large video tensors; a slice counts as the whole buffer that it lies in
(ComfyUI#11628, #12463). The cure copies parts of bounded size out of the large buffer and works on those. Attention and
the VAE have cures of their own: this one is for what is left. Each operation is checked at its first call of that size:
where the device refuses it, the cure stays on. Before torch 2.9 a child process tries it out.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import cat_2_31, child_probe, gate, probing
from .first_use import in_child
from .registry import Cure, Defect, FirstUse, Function, ProbeResult

ID = "int-max-dims"


def reference_pow(input: Tensor, exponent: float) -> Tensor:
    """``torch.pow`` by a number, part by part."""
    return _elementwise(torch.pow, input, exponent)


def reference_bmm(left: Tensor, right: Tensor) -> Tensor:
    """``torch.bmm`` of [B, M, K] and [B, K, N], part by part."""
    return _product(torch.bmm, left, right)


def reference_repeat(input: Tensor, *sizes: int) -> Tensor:
    """``Tensor.repeat`` as one strided copy."""
    shape = [1] * (len(sizes) - input.dim()) + list(input.shape)
    source = input.reshape([value for size in shape for value in (1, size)])
    spread = source.expand([value for count, size in zip(sizes, shape) for value in (count, size)])
    output = input.new_empty([count * size for count, size in zip(sizes, shape)])
    output.view(spread.shape).copy_(spread)
    return output


def _limit() -> int:
    return gate.LIMITS[ID]


def _own(part: Tensor) -> Tensor:
    """The part, copied out of its buffer if that is too large."""
    return part.clone(memory_format=torch.contiguous_format) if gate.extent(part) > _limit() else part


def _elementwise(operation: Function, input: Tensor, *args: Any) -> Tensor:
    if input.numel() <= _limit():
        return operation(_own(input), *args)
    output = torch.empty_like(input, memory_format=torch.contiguous_format)
    for start, length in gate.ranges(input.size(0), max(1, _limit() * input.size(0) // input.numel())):
        output[start : start + length] = _elementwise(operation, input[start : start + length].squeeze(0), *args)
    return output


def _product(product: Function, left: Tensor, right: Tensor) -> Tensor:
    """Batch by batch, and within one by rows; a right-hand matrix beyond the limit is split by columns."""
    batch, rows, inner = left.shape
    columns = right.size(2)
    output = left.new_empty((batch, rows, columns))
    width = max(1, min(columns, _limit() // max(1, inner)))
    height = max(1, min(rows, _limit() // max(1, inner, width)))
    count = max(1, _limit() // max(1, height * inner, inner * width, height * width))
    for b, some in gate.ranges(batch, count):
        for c, wide in gate.ranges(columns, width):
            second = _own(right[b : b + some, :, c : c + wide])
            for r, tall in gate.ranges(rows, height):
                first = _own(left[b : b + some, r : r + tall])
                output[b : b + some, r : r + tall, c : c + wide] = product(first, second)
    return output


def _large(*values: Any) -> bool:
    if not gate.acts_on(values[0]) or not all(isinstance(value, Tensor) for value in values):
        return False
    return any(gate.extent(value) > _limit() for value in values) and gate.plain(*values)


def meets_pow(*args: Any, **kwargs: Any) -> bool:
    """Whether a power by a number is of a large tensor."""
    pair = gate.operands(args, kwargs, "input", "exponent")
    return len(pair) == 2 and isinstance(pair[1], (int, float)) and _large(pair[0]) and pair[0].dim() > 0


def meets_bmm(*args: Any, **kwargs: Any) -> bool:
    """Whether a batched product is of large tensors."""
    pair = gate.operands(args, kwargs, "input", "mat2")
    return len(pair) == 2 and _large(*pair) and pair[0].dim() == pair[1].dim() == 3


def meets_baddbmm(*args: Any, beta: float = 1, alpha: float = 1, **kwargs: Any) -> bool:
    """Whether a batched product with a sum is of large tensors."""
    three = gate.operands(args, kwargs, "input", "batch1", "batch2")
    return len(three) == 3 and _large(three[1], three[0], three[2]) and three[1].dim() == three[2].dim() == 3


def meets_repeat(input: Any = None, *sizes: Any, **kwargs: Any) -> bool:
    """Whether a repeat is of a large tensor."""
    counts = _counts(sizes)
    return not kwargs and _large(input) and len(counts) >= input.dim() and min(counts, default=1) > 0


def meets_cat(tensors: Any = (), dim: Any = 0, **kwargs: Any) -> bool:
    """Whether a join is of large tensors."""
    listed = isinstance(tensors, (list, tuple)) and len(tensors) > 0
    return not kwargs and listed and isinstance(dim, int) and _large(*tensors) and cat_2_31.matching(tensors, dim)


def _counts(sizes: tuple[Any, ...]) -> Any:
    return sizes[0] if len(sizes) == 1 and isinstance(sizes[0], (list, tuple)) else sizes


def _make_pow(original: Function) -> Function:
    def cured(*args: Any, **kwargs: Any) -> Tensor:
        if meets_pow(*args, **kwargs):
            return _elementwise(original, *gate.operands(args, kwargs, "input", "exponent"))
        return original(*args, **kwargs)

    return cured


def _make_bmm(original: Function) -> Function:
    def cured(*args: Any, **kwargs: Any) -> Tensor:
        if meets_bmm(*args, **kwargs):
            return _product(original, *gate.operands(args, kwargs, "input", "mat2"))
        return original(*args, **kwargs)

    return cured


def _make_baddbmm(original: Function) -> Function:
    def cured(*args: Any, beta: float = 1, alpha: float = 1, **kwargs: Any) -> Tensor:
        if meets_baddbmm(*args, **kwargs):
            start, left, right = gate.operands(args, kwargs, "input", "batch1", "batch2")
            output = _product(torch.bmm, left, right).mul_(alpha)
            return output if beta == 0 else output.add_(start, alpha=beta)
        return original(*args, beta=beta, alpha=alpha, **kwargs)

    return cured


def _make_repeat(original: Function) -> Function:
    def cured(input: Tensor, *sizes: Any, **kwargs: Any) -> Tensor:
        if meets_repeat(input, *sizes, **kwargs):
            return reference_repeat(input, *_counts(sizes))
        return original(input, *sizes, **kwargs)

    return cured


def _make_cat(original: Function) -> Function:
    def cured(tensors: Any, dim: int = 0, **kwargs: Any) -> Tensor:
        if meets_cat(tensors, dim, **kwargs):
            return cat_2_31.reference(tensors, dim)
        return original(tensors, dim, **kwargs)

    return cured


def check(original: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ProbeResult:
    """Whether the device refuses the call; before torch 2.9, which ends the process, a child process finds out."""
    if _ends_the_process():
        return in_child(ID, _limit())
    try:
        original(*args, **kwargs)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if "INT_MAX" not in str(error):
            raise
        return ProbeResult(False, math.inf, 0.0, f"the device refuses ({probing.first_line(error)})")
    return ProbeResult(True, 0.0, 0.0, "the device takes it")


def _ends_the_process() -> bool:
    return gate.torch_before(2, 9) and _limit() > probing.SCALED


def probe(device: torch.device, quick: bool) -> ProbeResult:
    """Square a few numbers that lie in a buffer beyond the limit: 2 GiB, so not in the quick check."""
    limit = _limit()
    if limit > probing.SCALED and quick:
        return probing.not_applicable(f"takes {limit / probing.GIB:.0f} GiB")
    if _ends_the_process():
        return in_child(ID, limit)
    values = torch.arange(64, dtype=torch.uint8)
    compute = partial(_square_in_large_buffer, values.to(device), limit + 1)
    return probing.compare(compute, (values.long() ** 2 % 256), probing.EXACT, f"pow in a buffer of {limit + 65}")


def _footprint(quick: bool) -> int:
    return 0 if quick else child_probe.footprint(ID, _limit())


def _square_in_large_buffer(values: Tensor, size: int) -> Tensor:
    rows = -(-size // 64) + 1
    buffer = torch.empty((rows, 64), dtype=torch.uint8, device=values.device)
    buffer[-1].copy_(values)
    return buffer[-1].pow(2)


DEFECTS = (
    Defect(
        id=ID,
        title="Tensors beyond INT_MAX elements are refused",
        symptom='"MPSGaph does not support tensor dims larger than INT_MAX"',
        trigger="bmm, baddbmm, repeat, cat or pow on a tensor of 2^31 or more elements, or on a slice of one",
        cause="MPSGraph addresses buffers with 32-bit extents",
        affected="open; an error since torch 2.9, an abort of the process before",
        upstream=("ComfyUI#11628", "ComfyUI#12463", "pytorch#149325", "pytorch#158824"),
        seam="torch.pow, bmm, baddbmm, cat, the methods of torch.Tensor, Tensor.repeat",
        advice="Leave the patch on auto; where it is not enough, choose fewer frames, a smaller size or VAE tiles.",
        probe=probe,
        cure=Cure(
            targets=(
                *((path, name) for path in ("torch", "torch.Tensor") for name in ("pow", "bmm", "baddbmm")),
                ("torch.Tensor", "__pow__"),
                ("torch.Tensor", "repeat"),
                *(("torch", name) for name in cat_2_31.NAMES),
            ),
            make={
                **dict.fromkeys(("pow", "__pow__"), _make_pow),
                **dict.fromkeys(cat_2_31.NAMES, _make_cat),
                "bmm": _make_bmm,
                "baddbmm": _make_baddbmm,
                "repeat": _make_repeat,
            },
            first_use={
                **dict.fromkeys(("pow", "__pow__"), FirstUse(meets_pow, check)),
                **dict.fromkeys(cat_2_31.NAMES, FirstUse(meets_cat, check)),
                "bmm": FirstUse(meets_bmm, check),
                "baddbmm": FirstUse(meets_baddbmm, check),
                "repeat": FirstUse(meets_repeat, check),
            },
        ),
        reference="int_max.reference_bmm",
        footprint=_footprint,
    ),
)
