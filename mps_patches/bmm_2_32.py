"""bmm is wrong when an operand exceeds 2^32 elements, or a result does and an operand is not contiguous.

The kernels count elements in 32 bits (pytorch#197636, open; the second product of attention is the first case). The
cure multiplies contiguous pieces, none of them beyond the limit, into one result. ``torch.bmm``, ``matmul`` and their
methods are covered, with their batches broadcast; ``einsum`` enters bmm below Python and is not, attention never makes
such a score tensor once it is chunked. It takes 8 GiB to set off, so the first product of that size is checked.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import gate, probing
from .first_use import product_check
from .registry import Cure, Defect, FirstUse, Function, ProbeResult

ID = "bmm-2-32"


def reference(left: Tensor, right: Tensor) -> Tensor:
    """``torch.matmul`` of [..., M, K] and [..., K, N] in contiguous pieces within the limit."""
    return _chunked(torch.matmul, left, right)


def _chunked(product: Function, left: Tensor, right: Tensor) -> Tensor:
    batch = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    output = left.new_empty((*batch, left.size(-2), right.size(-1)))
    _fill(product, output, left.expand(*batch, -1, -1), right.expand(*batch, -1, -1))
    return output


def _fill(product: Function, output: Tensor, left: Tensor, right: Tensor) -> None:
    limit = gate.LIMITS[ID]
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
    if left.dim() + right.dim() < 5 or left.size(-1) != right.size(-2):
        return False
    if not gate.plain(left, right) or left.dtype != right.dtype:
        return False
    limit = gate.LIMITS[ID]
    if max(left.numel(), right.numel()) > limit:
        return _batch(left, right) is not None
    strided = not (left.is_contiguous() and right.is_contiguous())
    batch = _batch(left, right) if strided else None
    return batch is not None and math.prod(batch) * left.size(-2) * right.size(-1) > limit


def _batch(left: Tensor, right: Tensor) -> torch.Size | None:
    """The result's leading dimensions; None where the operands do not fit, which is left to the original."""
    if left.shape[:-2] == right.shape[:-2]:
        return left.shape[:-2]
    try:
        return torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    except RuntimeError:
        return None


def _make(original: Function) -> Function:
    def cured(*args: Any, **kwargs: Any) -> Tensor:
        if meets(*args, **kwargs):
            return _chunked(original, *_pair(args, kwargs))
        return original(*args, **kwargs)

    return cured


def _pair(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    return gate.operands(args, kwargs, "input", "mat2", "other")


def meets(*args: Any, **kwargs: Any) -> bool:
    """Whether a call of bmm or matmul is of trigger size."""
    pair = _pair(args, kwargs)
    return len(pair) == 2 and _applies(*pair)


def probe(device: torch.device, quick: bool) -> ProbeResult:
    """A strided product beyond the limit, and one with such an operand; where the limit is scaled down."""
    limit = gate.LIMITS[ID]
    if quick and limit > probing.SCALED:
        return probing.not_applicable(f"takes {_footprint(False) / probing.GIB:.0f} GiB")
    side = math.isqrt(limit // 4) + 1
    rows = torch.tensor([0, side // 2, side - 1])
    results = []
    for width, kind in ((2, "transposed"), (side, "contiguous")):
        left = probing.noise((4, side, width), torch.float16)
        right = probing.noise((4, side, width), torch.float16, seed=1).mT
        right = right if kind == "transposed" else right[..., :2].contiguous()
        expected = torch.matmul(left[:, rows].float(), right.float())
        compute = partial(_rows_of_product, left.to(device), right.to(device), rows)
        what = f"bmm to {4 * side * right.size(-1)} elements, an operand of {left.numel()}, {kind}"
        results.append(probing.compare(compute, expected, 5e-3, what))
    return probing.worst(results)


def _footprint(quick: bool) -> int:
    large = gate.LIMITS[ID] > probing.SCALED
    return 0 if quick and large else 2 * gate.LIMITS[ID] + (1 << 26)


def _rows_of_product(left: Tensor, right: Tensor, rows: Tensor) -> Tensor:
    product = torch.bmm(left, right)
    return torch.stack([product[:, row] for row in rows.tolist()], 1)


DEFECTS = (
    Defect(
        id=ID,
        title="bmm beyond 2^32 elements is wrong",
        symptom="Noise in very long attention",
        trigger="torch.bmm or matmul, an input of more than 2^32 elements, or a non-contiguous one and such a result",
        cause="32-bit element counts in the kernels",
        affected="every torch looked at, 2.4 to 2.15",
        upstream=("pytorch#197636",),
        seam="torch.bmm, torch.matmul, Tensor.bmm, Tensor.matmul, the operator @",
        advice="Leave the patch on auto: the first product of that size is checked, and patched if it is wrong.",
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
            first_use=dict.fromkeys(("bmm", "matmul", "__matmul__"), FirstUse(meets, product_check)),
        ),
        reference="bmm_2_32.reference",
        footprint=_footprint,
    ),
)
