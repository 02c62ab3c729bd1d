"""Arithmetic between an mps tensor and a 0-dim CPU view takes the wrong number.

``sigmas[i]`` of a CPU table is a view with a storage offset; Metal's binary kernels copy the scalar from the start of
the storage, so every step uses ``sigmas[0]`` (pytorch#187117, #191929, #193057; fixed in 2.14). Schedulers that keep
their tables on the CPU, diffusers' among them, go wrong without an error. The cure clones such a view: it then lies
at the start of a storage of its own. The binary operations that schedulers use are covered: see ``FUNCTIONS``.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import gate, probing
from .registry import Cure, Defect, Function, ProbeResult

FUNCTIONS = (
    "add",
    "sub",
    "subtract",
    "mul",
    "multiply",
    "div",
    "divide",
    "true_divide",
    "floor_divide",
    "remainder",
    "fmod",
    "pow",
    "maximum",
    "minimum",
    "atan2",
)
IN_PLACE = ("add_", "sub_", "subtract_", "mul_", "multiply_", "div_", "divide_", "true_divide_", "remainder_", "pow_")
OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")


def reference(operation: Function, input: Tensor, other: Tensor) -> Tensor:
    """``operation(input, other)`` with both 0-dim CPU views moved to the start of a storage."""
    return operation(*(value.clone() if value.dim() == 0 and not value.is_mps else value for value in (input, other)))


def _is_view(value: Tensor) -> bool:
    return value.dim() == 0 and value.is_cpu and value.storage_offset() != 0


def _make(original: Function, in_place: bool = False) -> Function:
    def cured(*args: Any, **kwargs: Any) -> Any:
        if len(args) == 2:
            input, other = args
            if isinstance(other, Tensor) and isinstance(input, Tensor):
                if gate.acts_on(input):
                    if _is_view(other):
                        return original(input, other.clone(), **kwargs)
                elif gate.acts_on(other) and not in_place and _is_view(input):
                    return original(input.clone(), other, **kwargs)
        elif len(args) == 1 and isinstance(kwargs.get("other"), Tensor):
            return cured(args[0], kwargs.pop("other"), **kwargs)
        return original(*args, **kwargs)

    return cured


_make_in_place = partial(_make, in_place=True)


_TARGETS = (
    *(("torch", name) for name in FUNCTIONS),
    *(("torch.Tensor", name) for name in (*FUNCTIONS, *IN_PLACE)),
    *(("torch.Tensor", f"__{prefix}{name}__") for name in OPERATORS for prefix in ("", "r", "i")),
)
_CHANGING = {*IN_PLACE, *(f"__i{name}__" for name in OPERATORS)}


def probe(device: torch.device, quick: bool) -> ProbeResult:
    """Scale a small tensor by entries of a CPU table, on either side."""
    table = probing.noise((8,)) + 2
    values = probing.noise((4, 4), seed=1)
    on_device = values.to(device)
    results = []
    for index in (3,) if quick else (1, 3, 7):
        scalar = table[index]
        for name, operation in (("mul", torch.mul), ("add", torch.add), ("div", torch.div), ("sub", torch.sub)):
            left = probing.compare(partial(operation, on_device, scalar), operation(values, scalar), 1e-6, name)
            right = probing.compare(partial(operation, scalar, on_device), operation(scalar, values), 1e-6, name)
            results += [left, right]
    return probing.worst(results)


DEFECTS = (
    Defect(
        id="cpu-scalar-view",
        title="Arithmetic with an entry of a CPU table uses its first entry",
        symptom="Schedulers give NaN or wrong images (diffusers and packs built on it)",
        trigger="a binary operation of an mps tensor and a 0-dim CPU tensor with a storage offset, such as sigmas[3]",
        cause="the scalar is read from the start of its storage",
        affected="torch before 2.14",
        upstream=("pytorch#187117", "pytorch#191929", "pytorch#193057"),
        seam="arithmetic functions of torch, methods and operators of torch.Tensor",
        advice="Leave the patch on, or update torch to 2.14.",
        probe=probe,
        cure=Cure(
            targets=_TARGETS,
            make={name: _make_in_place if name in _CHANGING else _make for _, name in _TARGETS},
        ),
        reference="cpu_scalar_view.reference",
    ),
)
