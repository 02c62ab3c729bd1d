"""bmm is wrong when a result exceeds 2^32 elements and an input is not contiguous.

The kernel for strided operands counts elements in 32 bits (pytorch#197636, open). The cure multiplies contiguous
pieces, none of them beyond the limit, into one result. ``torch.bmm``, ``matmul`` and their methods are covered, with
their batches broadcast; ``einsum`` enters bmm below Python and is not, attention never makes such a score tensor once
it is chunked.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import gate, probing
from .registry import Cure, Defect, Function, ProbeResult


def reference(left: Tensor, right: Tensor) -> Tensor:
    """``torch.matmul`` of [..., M, K] and [..., K, N] in contiguous pieces within the limit."""
    return _chunked(torch.matmul, left, right)


def _chunked(product: Function, left: Tensor, right: Tensor) -> Tensor:
    batch = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    output = left.new_empty((*batch, left.size(-2), right.size(-1)))
    _fill(product, output, left.expand(*batch, -1, -1), right.expand(*batch, -1, -1))
    return output


def _fill(product: Function, output: Tensor, left: Tensor, right: Tensor) -> None:
    limit = gate.LIMITS["bmm-2-32"]
    tensors = (output, left, right)
    most = max(tensor.numel() for tensor in tensors)
    if most <= limit:
        output.copy_(product(left.contiguous(), right.contiguous()))
    elif output.dim() > 2 and output.size(0) == 1:
        _fill(product, output[0], left[0], right[0])
    elif output.dim() > 2:
        for start, length in gate.ranges(output.size(0), max(1, limit * output.size(0) // most)):
            _fill(product, *(tensor.narrow(0, start, length) for tensor in tensors))
    else:
        _fill_matrix(product, output, left, right, limit)


def _fill_matrix(product: Function, output: Tensor, left: Tensor, right: Tensor, limit: int) -> None:
    (rows, inner), columns = left.shape, right.size(1)
    for first, width in gate.ranges(columns, max(1, limit // max(inner, 1))):
        for start, height in gate.ranges(rows, max(1, limit // max(inner, width))):
            piece = product(left[start : start + height].contiguous(), right[:, first : first + width].contiguous())
            output[start : start + height, first : first + width] = piece


def _applies(left: Any, right: Any) -> bool:
    if not (gate.acts_on(left) and isinstance(right, Tensor) and left.dim() >= 2 and right.dim() >= 2):
        return False
    if left.dim() + right.dim() < 5 or (left.is_contiguous() and right.is_contiguous()):
        return False
    if left.size(-1) != right.size(-2) or not gate.plain(left, right) or left.dtype != right.dtype:
        return False
    limit = gate.LIMITS["bmm-2-32"]
    if left.shape[:-2] == right.shape[:-2]:
        result = math.prod(left.shape[:-1]) * right.size(-1)
    else:
        try:
            batch = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
        except RuntimeError:
            return False
        result = math.prod(batch) * left.size(-2) * right.size(-1)
    return max(result, left.numel(), right.numel()) > limit


def _make(original: Function) -> Function:
    def cured(*args: Any, **kwargs: Any) -> Tensor:
        pair = gate.operands(args, kwargs, "input", "mat2", "other")
        if len(pair) == 2 and _applies(*pair):
            return _chunked(original, *pair)
        return original(*args, **kwargs)

    return cured


def probe(device: torch.device, quick: bool) -> ProbeResult:
    """A product with a transposed operand beyond the limit, where that is scaled down; at full size it takes 8 GiB."""
    limit = gate.LIMITS["bmm-2-32"]
    side = math.isqrt(limit // 4) + 1
    size = 2 * 4 * side * side
    if reason := probing.lacks_memory(device, size + (1 << 28)):
        return probing.not_applicable(reason)
    results = []
    for width in (2, side):
        left = probing.noise((4, side, width), torch.float16)
        right = probing.noise((4, side, width), torch.float16, seed=1)
        rows = torch.tensor([0, side // 2, side - 1])
        expected = torch.matmul(left[:, rows].float(), right.mT.float())
        compute = partial(_rows_of_product, left.to(device), right.to(device), rows)
        what = f"bmm to {4 * side * side} elements, transposed operand of {right.numel()}"
        results.append(probing.compare(compute, expected, 5e-3, what))
    return probing.worst(results)


def _rows_of_product(left: Tensor, right: Tensor, rows: Tensor) -> Tensor:
    product = torch.bmm(left, right.mT)
    return torch.stack([product[:, row] for row in rows.tolist()], 1)


DEFECTS = (
    Defect(
        id="bmm-2-32",
        title="bmm beyond 2^32 elements is wrong",
        symptom="Noise in very long attention",
        trigger="torch.bmm or matmul with a non-contiguous input and a result of more than 2^32 elements",
        cause="a 32-bit element count in the kernel for strided operands",
        affected="open (torch 2.15 included)",
        upstream=("pytorch#197636",),
        seam="torch.bmm, torch.matmul, Tensor.bmm, Tensor.matmul, the operator @",
        advice="Leave the patch on.",
        probe=probe,
        cure=Cure(
            targets=(
                ("torch", "bmm"),
                ("torch", "matmul"),
                ("torch.Tensor", "bmm"),
                ("torch.Tensor", "matmul"),
                ("torch.Tensor", "__matmul__"),
            ),
            make=_make,
            preventive=True,
        ),
        reference="bmm_2_32.reference",
    ),
)
