"""On M1 and M2, matrix products summed over 32,767 terms or more read past their operands.

The last tile along K is not clipped on MPSGraph's large-dimension path (pytorch#193487, #195163, Apple's FB24518264).
torch 2.14 sends mm, addmm and linear elsewhere; bmm, baddbmm, addbmm, and through them matmul and einsum, still fail.
The cure splits K, multiplies and adds up in float32, which also spares half precision a rounding per piece. Covered are
the functions and methods of ``TARGETS`` in float16, bfloat16 and float32, and ``nn.Linear`` through them. Not covered:
mv, dot and tensordot, which no report names, calls with ``out=``, and attention, which has a cure of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from . import gate, probing
from .registry import Cure, Defect, Function, ProbeResult

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def reference(left: Tensor, right: Tensor) -> Tensor:
    """``torch.matmul`` summed piece by piece in float32; the result has the dtype of ``left``."""
    return _summed(torch.matmul, left, right, *_matmul_dims(right)).to(left.dtype)


def _matmul_dims(right: Tensor) -> tuple[int, int]:
    return -1, -2 if right.dim() > 1 else -1


def _summed(product: Function, left: Tensor, right: Tensor, left_dim: int, right_dim: int) -> Tensor:
    """The product in float32, one piece of the summed dimension after the other."""
    total = None
    for start, length in gate.ranges(left.size(left_dim), gate.LIMITS["matmul-large-k"] - 1):
        pieces = left.narrow(left_dim, start, length), right.narrow(right_dim, start, length)
        part = product(*(piece.float().contiguous() for piece in pieces))
        total = part if total is None else total + part
    assert total is not None
    return total


def _applies(left: Any, right: Any, left_dim: int, right_dim: int) -> bool:
    return (
        gate.acts_on(left)
        and left.dim() > 0
        and left.size(-1) >= gate.LIMITS["matmul-large-k"]
        and gate.plain(left, right)
        and left.dtype in FLOATS
        and right.dtype == left.dtype
        and right.dim() >= -right_dim
        and right.size(right_dim) == left.size(left_dim)
    )


def _make_product(original: Function) -> Function:
    """mm, bmm, matmul and the operator @."""

    def cured(*args: Any, **kwargs: Any) -> Tensor:
        pair = gate.operands(args, kwargs, "input", "mat2", "other")
        if len(pair) == 2 and isinstance(pair[1], Tensor) and _applies(*pair, *_matmul_dims(pair[1])):
            return _summed(original, *pair, *_matmul_dims(pair[1])).to(pair[0].dtype)
        return original(*args, **kwargs)

    return cured


def _make_linear(original: Function) -> Function:
    def cured(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if _applies(input, weight, -1, -1) and gate.plain(bias):
            output = _summed(original, input, weight, -1, -1)
            return (output if bias is None else output + bias.float()).to(input.dtype)
        return original(input, weight, bias)

    return cured


def _make_add(product: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Function], Function]:
    """addmm, baddbmm and addbmm: beta * input + alpha * product."""

    def make(original: Function) -> Function:
        def cured(*args: Any, beta: float = 1, alpha: float = 1, **kwargs: Any) -> Tensor:
            three = gate.operands(args, kwargs, "input", "batch1", "mat1", "batch2", "mat2")
            if len(three) == 3 and isinstance(three[2], Tensor) and _applies(three[1], three[2], -1, -2):
                output = product(three[1], three[2]) * alpha
                return (output if beta == 0 else output + beta * three[0].float()).to(three[1].dtype)
            return original(*args, beta=beta, alpha=alpha, **kwargs)

        return cured

    return make


def _mm(left: Tensor, right: Tensor) -> Tensor:
    return _summed(torch.mm, left, right, -1, -2)


def _bmm(left: Tensor, right: Tensor) -> Tensor:
    return _summed(torch.bmm, left, right, -1, -2)


def _bmm_and_sum(left: Tensor, right: Tensor) -> Tensor:
    return _bmm(left, right).sum(0)


@lru_cache(maxsize=256)
def _terms(equation: str) -> tuple[tuple[str, ...], frozenset[str]] | None:
    """The operands' terms of an einsum equation and the letters summed over two or more; None if it has diagonals."""
    left, arrow, output = equation.replace(" ", "").partition("->")
    terms = tuple(left.split(","))
    letters = {letter for term in terms for letter in term if letter != "."}
    if any(len(set(term) - {"."}) != len(term.replace(".", "")) for term in terms):
        return None
    uses = {letter: sum(letter in term for term in terms) for letter in letters}
    kept = set(output) if arrow else {letter for letter, count in uses.items() if count == 1}
    return terms, frozenset(letter for letter in letters - kept if uses[letter] > 1)


def _axis(term: str, letter: str) -> int | None:
    """The dimension that a letter names, counted from the right behind an ellipsis."""
    place = term.find(letter)
    if place < 0:
        return None
    return place - len(term) if "..." in term[:place] else place


def _make_einsum(original: Function) -> Function:
    def cured(equation: Any, *operands: Any) -> Tensor:
        if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
            operands = tuple(operands[0])
        if isinstance(equation, str) and len(operands) > 1 and gate.acts_on(operands[0]):
            dtype = operands[0].dtype
            if dtype in FLOATS and gate.plain(*operands) and (split := _einsum_split(equation, operands)):
                total = None
                for pieces in split:
                    part = cured(equation, *(piece.float() for piece in pieces))
                    total = part if total is None else total + part
                assert total is not None
                return total.to(dtype)
        return original(equation, *operands)

    return cured


def _einsum_split(equation: str, operands: Sequence[Tensor]) -> list[list[Tensor]] | None:
    """Operands cut along the largest summed letter, so that fewer terms than the limit are summed; None if they are."""
    parsed = _terms(equation)
    if parsed is None or len(parsed[0]) != len(operands):
        return None
    terms, summed = parsed
    sizes: dict[str, int] = {}
    for letter in summed:
        axes = [(operand, _axis(term, letter)) for term, operand in zip(terms, operands)]
        extents = {operand.size(axis) for operand, axis in axes if axis is not None}
        sizes[letter] = max(extents)
        if len(extents) != 1:
            return None
    limit = gate.LIMITS["matmul-large-k"]
    total = math.prod(sizes.values())
    if not sizes or total < limit:
        return None
    letter = max(sizes, key=lambda name: sizes[name])
    most = max(1, (limit - 1) // (total // sizes[letter]))
    return [
        [
            operand if (axis := _axis(term, letter)) is None else operand.narrow(axis, start, length)
            for term, operand in zip(terms, operands)
        ]
        for start, length in gate.ranges(sizes[letter], most)
    ]


def probe(device: torch.device, quick: bool) -> ProbeResult:
    """16 to 64 rows and columns summed over the limit (not quick: also over a 1280x720x81 video's tokens)."""
    limit = gate.LIMITS["matmul-large-k"]
    results = []
    for k, rows, dtype in [(limit, 16, torch.float32)] + ([] if quick else [(75600, 64, torch.bfloat16)]):
        left, right = probing.noise((1, rows, k), dtype), probing.noise((1, k, rows), dtype, seed=1)
        expected = torch.bmm(left.double(), right.double())
        tolerance = 1e-4 if dtype == torch.float32 else 1e-2
        on_device = left.to(device), right.to(device)
        for name, compute in (
            ("bmm", partial(torch.bmm, *on_device)),
            ("linear", partial(torch.nn.functional.linear, on_device[0], on_device[1].mT[0])),
        ):
            results.append(probing.compare(compute, expected, tolerance, f"{name} with K = {k}"))
    return probing.worst(results)


_MAKERS: dict[str, Callable[[Function], Function]] = {
    "mm": _make_product,
    "bmm": _make_product,
    "matmul": _make_product,
    "__matmul__": _make_product,
    "addmm": _make_add(_mm),
    "baddbmm": _make_add(_bmm),
    "addbmm": _make_add(_bmm_and_sum),
    "linear": _make_linear,
    "einsum": _make_einsum,
}
_METHODS = ("mm", "bmm", "matmul", "addmm", "baddbmm", "addbmm")
TARGETS = (
    ("torch.nn.functional", "linear"),
    ("torch", "einsum"),
    ("torch.Tensor", "__matmul__"),
    *(("torch", name) for name in _METHODS),
    *(("torch.Tensor", name) for name in _METHODS),
)

DEFECTS = (
    Defect(
        id="matmul-large-k",
        title="Matrix products over 32,767 terms are wrong",
        symptom="Garbage or slight errors in long attention and wide layers, on M1 and M2 only",
        trigger="mm, bmm, matmul, einsum or linear with K >= 32,767 and 16 or more rows and columns",
        cause="MPSGraph reads past the end of the operands along K",
        affected="M1 and M2; mm, addmm and linear fixed in torch 2.14, bmm and einsum not",
        upstream=("pytorch#193487", "pytorch#195163", "FB24518264"),
        seam="torch.mm, bmm, matmul, addmm, baddbmm, addbmm, einsum, the methods and @, torch.nn.functional.linear",
        advice="Leave the patch on.",
        probe=probe,
        cure=Cure(targets=TARGETS, make=_MAKERS),
        reference="matmul_large_k.reference",
    ),
)
