"""Attention of a ComfyUI VAE on MPS: one wide head (384 in Wan 2.1, 640 and 1024 in Wan 2.2) over all of a frame.

The blocks keep their attention function in an attribute, `optimized_attention(q, k, v)`, of [B, C, *spatial] tensors;
a VAE's patcher replaces such attributes while its model is loaded and puts them back afterwards. At 1280x720 it would
form 415 million scores for two frames; no other tensor there comes near 2^31 elements, and `F.pad`'s defect, which
Wan 2.2's AvgDown3D meets, is cured process-wide.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .attention import patched_attention
from .comfy_attention import MODEL_PATCHES, Choice, memory_budget, model_choice

log = logging.getLogger(__name__)

ATTRIBUTE = "optimized_attention"
# Head dims of VAEs are wider than any package takes, so that switch has no meaning here.
VAE_PATCHES = tuple(name for name in MODEL_PATCHES if name != "flash_packages")


@dataclass(frozen=True)
class VAEAttention:
    """Stands in for one block's attention function ``original``; the choices are those of AttentionOverride."""

    original: Callable[[Tensor, Tensor, Tensor], Tensor]
    attention: Choice = "auto"
    float32_softmax: Choice = "auto"

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v and the result: [B, C, *spatial]."""
        known = all(type(t) is Tensor and t.ndim >= 3 and t.shape == q.shape for t in (q, k, v))
        if not known or not (self.attention == "on" or q.is_mps) or (torch.is_grad_enabled() and q.requires_grad):
            return self.original(q, k, v)
        exact = {"on": False, "off": True, "auto": None}[self.float32_softmax]
        # [B, 1, positions, C], as views where the layout allows.
        one_q, one_k, one_v = (t.flatten(2).transpose(1, 2).unsqueeze(1) for t in (q, k, v))
        found, plan = patched_attention(
            one_q, one_k, one_v, budget=memory_budget(), half_softmax_exact=exact, packages=()
        )
        if found is None:
            return self.original(q, k, v)
        log.debug("VAE attention (%s): %s", plan.method, plan.reason)
        return found.squeeze(1).transpose(1, 2).reshape(q.shape)


def patch_vae(vae: Any, choices: Mapping[str, str] | None = None) -> Any:
    """A shallow copy of a VAE with patched attention blocks, or ``vae`` itself where nothing is to be changed.

    choices: patch (see VAE_PATCHES) -> "auto", "on" or "off". With auto, nothing happens unless the VAE runs on MPS;
    with off, what this pack put there is taken out. The input and its patcher are never changed.
    """
    wanted = {name: model_choice(name, choices) for name in VAE_PATCHES}
    needed = wanted["attention"] == "on" or (wanted["attention"] == "auto" and vae.patcher.load_device.type == "mps")
    current = vae.patcher.object_patches
    keys = [f"{name}.{ATTRIBUTE}" for name in attention_blocks(vae.first_stage_model)]
    mine = {key: current[key] for key in keys if isinstance(current.get(key), VAEAttention)}
    put = {key: VAEAttention(_original(vae.patcher, key), **wanted) for key in keys} if needed else {}
    if put == mine:
        return vae
    patched = copy.copy(vae)
    patched.patcher = vae.patcher.clone()
    for key in mine:
        del patched.patcher.object_patches[key]
    for key, attention in put.items():
        patched.patcher.add_object_patch(key, attention)
    return patched


def attention_blocks(model: torch.nn.Module) -> list[str]:
    """Names of the modules whose attention function is an attribute of theirs."""
    return [name for name, module in model.named_modules() if callable(vars(module).get(ATTRIBUTE))]


def _original(patcher: Any, key: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    function = patcher.get_model_object(key)
    return function.original if isinstance(function, VAEAttention) else function
