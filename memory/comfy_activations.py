"""Fewer activations for ComfyUI's Wan models, through object patches on the forward methods of their blocks.

Recognised is what ComfyUI 0.16 to 0.30 have in comfy/ldm/wan/model.py: the plain block, VACE's block and the head,
by the functions they run and the names of their parts. Blocks that override them (HuMo, autoregressive models) and
layers that somebody else has patched stay as they are. Each kind of block is compared with core's on first use.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..mps_patches.comfy_attention import OVERRIDE, AttentionOverride
from .wan_activations import (
    ActivationBudget,
    Host,
    block_forward,
    head_forward,
    modulation_fits,
    vace_forward,
)

log = logging.getLogger(__name__)

Choice = Literal["auto", "on", "off"]

BUDGET = "mps_activation_budget"
"""Entry of transformer_options that holds the model's ActivationBudget; one put there for a call goes first."""

CHECK = "mps_block_check"
"""Entry of transformer_options that is called between chunks in place of core's check for interrupts."""

CORE = "comfy.ldm.wan.model"
PARTS = ("norm1", "self_attn", "norm2", "cross_attn", "norm3", "ffn", "modulation")
ATTENTION_PARTS = ("q", "k", "v", "o", "norm_q", "norm_k", "num_heads", "head_dim")
IMAGE_PARTS = ("k_img", "v_img", "norm_k_img")
CHECK_TOKENS = 192
# Root mean square of the difference to core's block over that of what the block adds to its input. Rounding at other
# places makes a few units in the last place; a missing or misplaced term is of the size of the whole.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.05}

_verified: dict[tuple[Any, ...], bool] = {}


def reduce_activations(patcher: Any, choice: Choice = "auto", temporary_bytes: int | None = None) -> Any:
    """A clone of a ModelPatcher whose Wan blocks keep fewer activations; ``patcher`` where nothing is to be changed.

    auto: where the model runs on MPS. off: takes out what this function put there. temporary_bytes: of one chunk's
    temporary tensors, see ``ActivationBudget``; None is the default. The input is never changed. Other models than
    Wan come back as they are.
    """
    wanted = choice == "on" or (choice == "auto" and patcher.load_device.type == "mps")
    ours = [name for name, patch in patcher.object_patches.items() if isinstance(patch, _Forward)]
    present = activation_budget(patcher)
    if not wanted:
        return _without(patcher, ours) if ours or present else patcher
    if ours and present is not None and temporary_bytes in (None, present.temporary_bytes):
        return patcher
    budget = ActivationBudget() if temporary_bytes is None else ActivationBudget(temporary_bytes)
    found = [
        (name, kind(module, budget))
        for name, module, kind in _patchable(patcher.model)
        if name in ours or name not in patcher.object_patches
    ]
    if not found:
        return patcher
    patched = patcher.clone()
    for name, patch in found:
        patched.add_object_patch(name, patch)
    _set_option(patched, budget)
    return patched


def activation_budget(patcher: Any) -> ActivationBudget | None:
    """The budget that the model's blocks go by, which may be changed while they run; None where nothing is patched."""
    return patcher.model_options.get("transformer_options", {}).get(BUDGET)


def _without(patcher: Any, ours: list[str]) -> Any:
    patched = patcher.clone()
    for name in ours:
        del patched.object_patches[name]
    _set_option(patched, None)
    return patched


def _set_option(patcher: Any, budget: ActivationBudget | None) -> None:
    options = dict(patcher.model_options.get("transformer_options", {}))
    options.pop(BUDGET, None)
    if budget is not None:
        options[BUDGET] = budget
    patcher.model_options = {**patcher.model_options, "transformer_options": options}


def _patchable(model: Any) -> Iterator[tuple[str, nn.Module, type[_Forward]]]:
    """(name of the forward method for add_object_patch, module, what replaces the method)."""
    diffusion = getattr(model, "diffusion_model", None)
    if not isinstance(diffusion, nn.Module):
        return
    for name, module in diffusion.named_modules():
        for kind in KINDS:
            if kind.recognises(module):
                yield f"diffusion_model.{name}.forward", module, kind


def _runs(module: Any, *class_names: str) -> bool:
    """Whether the module's class runs the forward method of one of these classes of core's Wan model."""
    function = getattr(type(module), "forward", None)
    owner = getattr(function, "__globals__", {})
    return owner.get("__name__") == CORE and any(
        function is getattr(owner.get(name), "forward", None) for name in class_names
    )


def _has(module: Any, names: tuple[str, ...]) -> bool:
    return all(hasattr(module, name) for name in names)


def _is_block(module: Any, class_name: str) -> bool:
    if not (_runs(module, class_name) and _has(module, PARTS)):
        return False
    own, cross = module.self_attn, module.cross_attn
    with_image = _runs(cross, "WanI2VCrossAttention")
    return (
        _runs(own, "WanSelfAttention")
        and (with_image or _runs(cross, "WanT2VCrossAttention"))
        and _has(own, ATTENTION_PARTS)
        and _has(cross, ATTENTION_PARTS)
        and with_image == _has(cross, IMAGE_PARTS)
    )


@dataclass(eq=False)
class _Forward:
    """A forward method of one module; holds what the method is bound to."""

    module: nn.Module
    budget: ActivationBudget = field(default_factory=ActivationBudget)

    @classmethod
    def recognises(cls, module: nn.Module) -> bool:
        raise NotImplementedError

    def original(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.module).forward(self.module, *args, **kwargs)  # type: ignore[operator]

    def host(self, options: dict[str, Any], budget: ActivationBudget | None = None) -> Host:
        import comfy.model_management

        names = _namespace(self.module)
        override = options.get(OVERRIDE)
        return Host(
            attention=names["optimized_attention"],
            rotate=names["apply_rope1"],
            check=options.get(CHECK, comfy.model_management.throw_exception_if_processing_interrupted),
            budget=budget or options.get(BUDGET, self.budget),
            options=options,
            by_rows=override is None or (isinstance(override, AttentionOverride) and override.previous is None),
        )


class BlockForward(_Forward):
    """WanAttentionBlock.forward."""

    @classmethod
    def recognises(cls, module: nn.Module) -> bool:
        return _is_block(module, "WanAttentionBlock")

    def __call__(
        self, x: Tensor, e: Tensor, freqs: Tensor, context: Tensor, context_img_len: int | None = 257,
        transformer_options: dict[str, Any] | None = None,
    ) -> Tensor:  # fmt: skip
        options = {} if transformer_options is None else transformer_options
        inputs = (x, e, freqs, context, context_img_len)
        if not (_regular(x, e, freqs, context) and self.agrees(*inputs)):
            return self.original(*inputs, transformer_options=options)
        return self.reduced(self.host(options), *inputs)

    def reduced(
        self, host: Host, x: Tensor, e: Tensor, freqs: Tensor, context: Tensor, image_tokens: int | None
    ) -> Tensor:
        return block_forward(self.module, x, _embedding(e), freqs, context, image_tokens, host)

    def core(self, *inputs: Any) -> Any:
        """Core's method on the same inputs, without patches."""
        return _core_class(self.module, "WanAttentionBlock").forward(self.module, *inputs, transformer_options={})

    def agrees(self, x: Tensor, e: Tensor, freqs: Tensor, context: Tensor, image_tokens: int | None) -> bool:
        """Whether the first tokens come out as core's do, several chunks of them; found out once for each kind."""
        embedding = _embedding(e)
        key = (type(self.module), x.device.type, x.dtype, image_tokens is None, embedding.shape[1] > 1)
        if key not in _verified:
            tokens = min(CHECK_TOKENS, x.shape[1])
            entries = embedding.shape[1] if tokens == x.shape[1] else min(3, embedding.shape[1])
            small = (x[:, :tokens], embedding[:, :entries], freqs[:, :tokens], context, image_tokens)
            right = self.core(*small)
            found = self.reduced(self.host({}, ActivationBudget(0)), *small)
            _verified[key] = _close(found, right, small[0])
        return _verified[key]


class VaceForward(BlockForward):
    """VaceWanAttentionBlock.forward."""

    @classmethod
    def recognises(cls, module: nn.Module) -> bool:
        return _is_block(module, "VaceWanAttentionBlock") and _has(module, ("block_id", "after_proj"))

    def __call__(  # type: ignore[override]
        self, c: Tensor, x: Tensor, e: Tensor, freqs: Tensor, context: Tensor, context_img_len: int | None = 257,
        transformer_options: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        options = {} if transformer_options is None else transformer_options
        more = (e, freqs, context, context_img_len)
        regular = _regular(c, e, freqs, context) and x.shape == c.shape and x.dtype == c.dtype
        if not (regular and self.agrees(c, *more)):
            named = dict(zip(("e", "freqs", "context", "context_img_len"), more, strict=True))
            return self.original(c, x, **named, transformer_options=options)
        host = self.host(options)
        return vace_forward(self.module, c, x, lambda own: self.reduced(host, own, *more))


class HeadForward(_Forward):
    """Head.forward."""

    @classmethod
    def recognises(cls, module: nn.Module) -> bool:
        return _runs(module, "Head") and _has(module, ("norm", "head", "modulation"))

    def __call__(self, x: Tensor, e: Tensor) -> Tensor:
        embedding = e[:, None, None] if e.ndim < 3 else e[:, :, None]
        if not _usable(x, embedding):
            return self.original(x, e)
        return head_forward(self.module, x, embedding, self.host({}))


KINDS: tuple[type[_Forward], ...] = (BlockForward, VaceForward, HeadForward)


def _namespace(module: nn.Module) -> dict[str, Any]:
    """The module's core file, whose attention and rotary embedding others may have replaced there."""
    return type(module).forward.__globals__  # type: ignore[attr-defined]


def _core_class(module: nn.Module, name: str) -> Any:
    return _namespace(module)[name]


def _embedding(e: Tensor) -> Tensor:
    """[B, 6, C] or [B, T, 6, C] as [B, T, 6, C]."""
    return e[:, None] if e.ndim < 4 else e


def _usable(x: Tensor, embedding: Tensor) -> bool:
    fits = embedding.ndim == 4 and embedding.dtype == x.dtype and embedding.shape[0] in (1, x.shape[0])
    tracing = torch.is_grad_enabled() or torch.compiler.is_compiling()
    return fits and not tracing and x.ndim == 3 and modulation_fits(embedding, x.shape[1])


def _regular(x: Tensor, e: Tensor, freqs: Tensor, context: Tensor) -> bool:
    """Shapes that the chunks are defined for; others go to core and its own errors."""
    return (
        _usable(x, _embedding(e))
        and freqs.ndim == 6
        and freqs.shape[0] in (1, x.shape[0])
        and freqs.shape[1] == x.shape[1]
        and context.ndim == 3
        and context.shape[0] == x.shape[0]
        and context.dtype == x.dtype
    )


def _close(found: Tensor, right: Tensor, before: Tensor) -> bool:
    change = (right.float() - before.float()).square().mean().sqrt()
    difference = (found.float() - right.float()).square().mean().sqrt()
    limit = TOLERANCE.get(right.dtype, TOLERANCE[torch.bfloat16])
    ok = bool(difference <= limit * change)
    if not ok:
        log.warning(
            "Fewer activations: this Wan block differs from core's by %.2g of what it adds (%.2g allowed), so core's "
            "own is used.",
            float(difference / change),
            limit,
        )
    return ok


__all__ = ["BUDGET", "BlockForward", "HeadForward", "VaceForward", "activation_budget", "reduce_activations"]
