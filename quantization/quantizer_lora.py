"""Merges LoRAs into the weights of a source while they are read for quantising.

Key styles are those of published Wan LoRAs: ``lora_A``/``lora_B`` and ``lora_down``/``lora_up`` with an optional
``alpha``, the ``diff`` and ``diff_b`` of extracted ones; native, diffusers and kohya module names.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch

from .quantizer import QuantizeError
from .quantizer_sources import Source, Tensor, native_name, safetensors_tensors

_PREFIXES = ("base_model.model.", "model.", "diffusion_model.", "transformer.", "lora_unet__", "lora_unet_")
_DIFFUSERS_MARKS = (".attn1.", ".attn2.", ".ffn.net.", "condition_embedder.")
_DOWN = ("lora_A.weight", "lora_A.default.weight", "lora_down.weight")
_UP = ("lora_B.weight", "lora_B.default.weight", "lora_up.weight")
_PARTS = (*_DOWN, *_UP, "alpha", "diff", "diff_b")


@dataclass(frozen=True)
class LowRank:
    """``up`` [rows, rank] times ``down`` [rank, columns], strength and alpha included in ``up``."""

    up: torch.Tensor
    down: torch.Tensor

    def between(self, start: int, stop: int) -> torch.Tensor:
        """The product's values from flat position ``start`` up to ``stop``."""
        columns = self.down.shape[1]
        first, last = start // columns, -(-stop // columns)
        return (self.up[first:last] @ self.down).view(-1)[start - first * columns : stop - first * columns]


@dataclass(frozen=True)
class Difference:
    """Values to add, times ``strength``."""

    tensor: Tensor
    strength: float

    def between(self, start: int, stop: int) -> torch.Tensor:
        """The values from flat position ``start`` up to ``stop``."""
        return self.tensor.read(start, stop).float() * self.strength


@dataclass(frozen=True)
class Merged:
    """A tensor with LoRAs added."""

    base: Tensor
    changes: tuple[LowRank | Difference, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The base's."""
        return self.base.shape

    @property
    def type_name(self) -> str:
        """The base's."""
        return self.base.type_name

    def read(self, start: int, stop: int) -> torch.Tensor:
        """The weights from flat position ``start`` up to ``stop``, float32."""
        result = self.base.read(start, stop).float()
        for change in self.changes:
            result = result + change.between(start, stop)
        return result


def with_loras(source: Source, loras: Sequence[tuple[Path, float]]) -> Source:
    """The source with LoRA files (path, strength) merged in.

    Raises:
        QuantizeError: a file cannot be read, fits none of the source's tensors or has another shape.
    """
    tensors, notes = dict(source.tensors), list(source.notes)
    for path, strength in loras:
        modules = _modules(path)
        targets = {module: target for module in modules if (target := _target(module, tensors)) is not None}
        if not targets:
            raise QuantizeError(f"{path.name} changes no tensor of the model: choose a LoRA that was made for it.")
        if len(targets) < len(modules):
            notes.append(f"{path.name}: {len(modules) - len(targets)} of {len(modules)} parts are for another model")
        parts = ((target, modules[module]) for module, target in targets.items())
        for name, change in [change for pair in parts for change in _changes(path, strength, source.tensors, *pair)]:
            base = tensors[name]
            earlier = base.changes if isinstance(base, Merged) else ()
            tensors[name] = Merged(base.base if isinstance(base, Merged) else base, (*earlier, change))
    return replace(source, tensors=tensors, notes=tuple(notes))


def _modules(path: Path) -> dict[str, dict[str, Tensor]]:
    """The factors of each module that a LoRA changes, by the module's name in the file and the factor's."""
    found = safetensors_tensors(path, [path])
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in found.items():
        part = next((part for part in _PARTS if key.endswith("." + part)), None)
        if part is None:
            raise QuantizeError(
                f"{path.name} holds {key}, which is no part of a plain LoRA and cannot be merged: "
                "quantise without it and apply it with a LoRA loader."
            )
        modules.setdefault(key.removesuffix("." + part), {})[part] = tensor
    return modules


def _target(module: str, tensors: dict[str, Tensor]) -> str | None:
    """The model's name of a module, or None if the model has no such module."""
    for prefix in _PREFIXES:
        module = module.removeprefix(prefix)
    if any(mark in module for mark in _DIFFUSERS_MARKS):
        module = native_name(module + ".").removesuffix(".")
    bases = (name.removesuffix(".weight").removesuffix(".bias") for name in tensors)
    return next((base for base in bases if module in (base, base.replace(".", "_"))), None)


def _changes(
    path: Path, strength: float, tensors: dict[str, Tensor], target: str, parts: dict[str, Tensor]
) -> Iterable[tuple[str, LowRank | Difference]]:
    """The changes of one module, each with the name of the model's tensor."""
    bias = f"{target}.bias"
    if "diff_b" in parts and bias in tensors:
        yield bias, Difference(_fitting(path, bias, parts["diff_b"], tensors[bias]), strength)
    weight = next((name for name in (f"{target}.weight", target) if name in tensors), None)
    if weight is None:
        return
    if "diff" in parts:
        yield weight, Difference(_fitting(path, weight, parts["diff"], tensors[weight]), strength)
    down, up = (next((parts[name] for name in names if name in parts), None) for names in (_DOWN, _UP))
    if down is not None and up is not None:
        yield weight, _low_rank(path, weight, (down, up), parts.get("alpha"), strength, tensors[weight])


def _fitting(path: Path, module: str, change: Tensor, target: Tensor) -> Tensor:
    if prod(change.shape) != prod(target.shape):
        raise _misfit(path, module, target)
    return change


def _low_rank(
    path: Path,
    module: str,
    pair: tuple[Tensor, Tensor],
    alpha: Tensor | None,
    strength: float,
    target: Tensor,
) -> LowRank:
    down, up = (tensor.read(0, prod(tensor.shape)).float().view(tensor.shape[0], -1) for tensor in pair)
    if up.shape[1] != down.shape[0] or (up.shape[0], down.shape[1]) != (target.shape[0], prod(target.shape[1:])):
        raise _misfit(path, module, target)
    rank = down.shape[0]
    factor = strength if alpha is None else strength * alpha.read(0, 1).float().item() / rank
    return LowRank(up * factor, down)


def _misfit(path: Path, module: str, target: Tensor) -> QuantizeError:
    return QuantizeError(
        f"{path.name} has another shape for {module} than the model ({list(target.shape)}): "
        "choose a LoRA that was made for this size of model."
    )
