"""LoRA files in every adapter type that ComfyUI's core knows, for the small models.

Key names and shapes of the factors are those of the LyCORIS and PEFT families as published Wan LoRAs have them
(``diffusion_model.blocks.0.self_attn.q.lora_down.weight``). Each change is a fraction of the weight it changes, so
that its effect on a video is plain to see without breaking it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

import torch

from .text_encoders import EncoderShape, encoder_tensors, transformers_name
from .wan_shapes import VARIANTS, wan_shape, wan_tensors
from .weights import t5_statistics, tensor_seed, wan_statistics

RANK = 8
ALPHA = 4.0
STRENGTH = 0.5  # size of a change, relative to the weight's own

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Target:
    """The weight that an adapter changes: its shape, the usual size of its elements, the generator of its factors."""

    shape: tuple[int, ...]
    size: float
    generator: torch.Generator

    @property
    def inner(self) -> int:
        """Product of all dimensions but the first (the fan-in)."""
        return int(torch.Size(self.shape[1:]).numel())

    def factor(self, *shape: int, std: float = 1.0) -> torch.Tensor:
        """Random factor of the given standard deviation."""
        return torch.randn(shape, generator=self.generator) * std

    @property
    def change(self) -> float:
        """Standard deviation of the elements of the whole change."""
        return STRENGTH * self.size


def _alpha(value: float = ALPHA) -> torch.Tensor:
    return torch.tensor(value)


def _low_rank(target: Target, down: str, up: str) -> Tensors:
    std = target.change * sqrt(RANK) / ALPHA
    return {
        down: target.factor(RANK, target.inner),
        up: target.factor(target.shape[0], RANK, std=std),
        "alpha": _alpha(),
    }


def _lora(target: Target) -> Tensors:
    return _low_rank(target, "lora_down.weight", "lora_up.weight")


def _peft(target: Target) -> Tensors:
    return _low_rank(target, "lora_A.weight", "lora_B.weight")


def _lora_without_alpha(target: Target) -> Tensors:
    std = target.change / sqrt(RANK)
    return {
        "lora_A.weight": target.factor(RANK, target.inner),
        "lora_B.weight": target.factor(target.shape[0], RANK, std=std),
    }


def _lora_reshape(target: Target) -> Tensors:
    return {**_lora(target), "reshape_weight": torch.tensor(target.shape)}


def _loha(target: Target) -> Tensors:
    out, inner = target.shape[0], target.inner
    std = target.change / ALPHA
    return {
        "hada_w1_a": target.factor(out, RANK, std=std),
        "hada_w1_b": target.factor(RANK, inner),
        "hada_w2_a": target.factor(out, RANK),
        "hada_w2_b": target.factor(RANK, inner),
        "alpha": _alpha(),
    }


_KRONECKER = 8


def _lokr(target: Target) -> Tensors:
    out, inner = target.shape[0], target.inner
    return {
        "lokr_w1": target.factor(_KRONECKER, _KRONECKER),
        "lokr_w2": target.factor(out // _KRONECKER, inner // _KRONECKER, std=target.change),
    }


def _lokr_low_rank(target: Target) -> Tensors:
    out, inner = target.shape[0], target.inner
    std = target.change * sqrt(RANK) / ALPHA
    return {
        "lokr_w1": target.factor(_KRONECKER, _KRONECKER),
        "lokr_w2_a": target.factor(out // _KRONECKER, RANK, std=std),
        "lokr_w2_b": target.factor(RANK, inner // _KRONECKER),
        "alpha": _alpha(),
    }


def _lokr_two_low_ranks(target: Target) -> Tensors:
    low_rank = _lokr_low_rank(target)
    del low_rank["lokr_w1"]
    rank = 2
    return {
        "lokr_w1_a": target.factor(_KRONECKER, rank, std=1 / sqrt(rank)),
        "lokr_w1_b": target.factor(rank, _KRONECKER),
        **low_rank,
    }


def _glora(target: Target) -> Tensors:
    out, inner = target.shape[0], target.inner
    scale = sqrt(RANK) / ALPHA
    return {
        "a1.weight": target.factor(inner, RANK, std=STRENGTH * scale / sqrt(inner)),
        "a2.weight": target.factor(RANK, inner, std=1 / sqrt(RANK)),
        "b1.weight": target.factor(out, RANK, std=target.change * scale),
        "b2.weight": target.factor(RANK, inner, std=1 / sqrt(RANK)),
        "alpha": _alpha(),
    }


_ROTATED = 32


def _oft(target: Target) -> Tensors:
    return {"oft_blocks": target.factor(target.shape[0] // _ROTATED, _ROTATED, _ROTATED, std=0.02)}


def _oft_constrained(target: Target) -> Tensors:
    return {**_oft(target), "alpha": _alpha(0.5)}


def _boft(target: Target) -> Tensors:
    """Two butterfly stages; core needs an alpha, and 0 leaves the rotation unconstrained."""
    stages = 2
    return {
        "oft_blocks": target.factor(stages, target.shape[0] // _ROTATED, _ROTATED, _ROTATED, std=0.02),
        "rescale": 1 + target.factor(target.shape[0], 1, std=0.05),
        "alpha": _alpha(0.0),
    }


def _difference(target: Target) -> Tensors:
    return {"diff": target.factor(*target.shape, std=target.change)}


def _norm_difference(target: Target) -> Tensors:
    return {"w_norm": target.factor(*target.shape, std=target.change)}


def _replacement(target: Target) -> Tensors:
    return {"set_weight": target.factor(*target.shape, std=target.size)}


def _bias_difference(target: Target) -> Tensors:
    return {"diff_b": target.factor(target.shape[0], std=0.05)}


def _decomposed(adapter: Callable[[Target], Tensors], on_input: bool = False) -> Callable[[Target], Tensors]:
    """Weight decomposition (DoRA): a magnitude per output row, or per input column of a square matrix."""

    def adapted(target: Target) -> Tensors:
        shape = (1, target.inner) if on_input else (target.shape[0], *[1] * (len(target.shape) - 1))
        return {**adapter(target), "dora_scale": 1 + target.factor(*shape, std=0.1)}

    return adapted


ADAPTERS: dict[str, Callable[[Target], Tensors]] = {
    "lora": _lora,
    "lora-peft": _peft,
    "lora-no-alpha": _lora_without_alpha,
    "lora-reshape": _lora_reshape,
    "lora-dora": _decomposed(_lora),
    "lora-dora-input": _decomposed(_lora, on_input=True),
    "loha": _loha,
    "loha-dora": _decomposed(_loha),
    "lokr": _lokr,
    "lokr-low-rank": _lokr_low_rank,
    "lokr-two-low-ranks": _lokr_two_low_ranks,
    "lokr-dora": _decomposed(_lokr),
    "glora": _glora,
    "glora-dora": _decomposed(_glora),
    "oft": _oft,
    "oft-constrained": _oft_constrained,
    "oft-dora": _decomposed(_oft_constrained),
    "boft": _boft,
    "diff": _difference,
    "w-norm": _norm_difference,
    "diff-bias": _bias_difference,
    "set": _replacement,
}

# Key styles: how a weight's name in the model becomes the prefix of its factors.
KEY_STYLES: dict[str, Callable[[str], str]] = {
    "generic": lambda module: f"diffusion_model.{module}",
    "kohya": lambda module: "lora_unet_" + module.replace(".", "_"),
    "videox-fun": lambda module: "lora_unet__" + module.replace(".", "_"),
}
_TARGETS = (
    "self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "cross_attn.q", "cross_attn.k", "cross_attn.v",
    "cross_attn.o", "ffn.0", "ffn.2",
)  # fmt: skip


def lora_targets(variant: str) -> list[str]:
    """Modules that published Wan LoRAs change: all matrices of the blocks."""
    layers = wan_shape(variant).layers
    return [f"blocks.{layer}.{module}" for layer in range(layers) for module in _TARGETS]


def wan_lora(
    variant: str,
    adapter: str,
    modules: Sequence[str] | None = None,
    key_style: str = "generic",
    seed: int = 0,
) -> Tensors:
    """A LoRA for a small Wan.

    Args:
        variant: a name of ``VARIANTS``.
        adapter: a name of ``ADAPTERS``.
        modules: what to change ("blocks.0.ffn.2", "patch_embedding"); None is every matrix of the blocks.
        key_style: a name of ``KEY_STYLES``.
        seed: other factors of the same kind.
    """
    shapes = wan_tensors(wan_shape(variant))
    prefix = KEY_STYLES[key_style]
    targets = {prefix(module): _wan_target(f"{module}.weight", shapes) for module in modules or lora_targets(variant)}
    return _lora_tensors(targets, adapter, seed + VARIANTS[variant].seed)


def published_lora(variant: str, seed: int = 0) -> Tensors:
    """A LoRA like those of distilled Wan models: low rank for matrices, differences for biases, norms, modulation."""
    shapes = wan_tensors(wan_shape(variant))
    tensors: Tensors = {}
    for name, shape in shapes.items():
        module, _, kind = name.rpartition(".")
        if kind == "bias":
            adapter = "diff-bias"
        elif kind != "weight" or len(shape) == 1 or module == "head.head":
            adapter = "diff"
        else:
            adapter = "lora"
        key = f"diffusion_model.{module if kind in ('weight', 'bias') else name}"
        tensors.update(_lora_tensors({key: _wan_target(name, shapes)}, adapter, seed))
    return {name: tensor.to(torch.float16) for name, tensor in tensors.items()}


def encoder_lora(shape: EncoderShape, adapter: str = "lora", seed: int = 0) -> Tensors:
    """A LoRA for a text encoder, by the only names under which core finds UMT5's weights."""
    targets = {
        f"text_encoders.umt5xxl.transformer.{transformers_name(name).removesuffix('.weight')}": (
            size,
            t5_statistics(name, size).std,
        )
        for name, size in encoder_tensors(shape).items()
        if len(size) == 2 and "attn_rel_b" not in name and name != "token_embd.weight"
    }
    return _lora_tensors(targets, adapter, seed + shape.seed)


def _wan_target(name: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[tuple[int, ...], float]:
    statistics = wan_statistics(name, shapes[name])
    return shapes[name], max(statistics.mean, statistics.std)


def _lora_tensors(targets: Mapping[str, tuple[tuple[int, ...], float]], adapter: str, seed: int) -> Tensors:
    tensors: Tensors = {}
    for prefix, (shape, size) in targets.items():
        generator = torch.Generator().manual_seed(tensor_seed(seed, f"{adapter}:{prefix}"))
        for suffix, factor in ADAPTERS[adapter](Target(shape, size, generator)).items():
            tensors[f"{prefix}.{suffix}"] = factor
    return tensors
