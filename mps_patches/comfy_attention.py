"""The attention override of a ComfyUI model: where a call would go wrong on MPS, it is computed as the plan says.

ComfyUI wraps each of its attention functions (`wrap_attn`): a call that passes `transformer_options` asks the entry
`optimized_attention_override` there, with the function and its arguments, first. The arguments are those of ComfyUI
0.16 to 0.30: query, key and value [B, L, H*D], or [B, H, L, D] with `skip_reshape`. What the override does not know,
it leaves to the function. For calls without `transformer_options`, which no override sees, wrappers of core's functions
do the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor

from . import attention_plan, gate, probing
from .attention import NOISE, patched_attention
from .attention_plan import BUDGET
from .chunked_attention import mask_to_rank_4, reference_attention
from .install import choice_for
from .registry import DEFECTS, Function, ProbeResult

log = logging.getLogger(__name__)

Choice = Literal["auto", "on", "off"]

OVERRIDE = "optimized_attention_override"
LEAST_BUDGET = 64 << 20
POSITIONS = ("q", "k", "v", "heads", "mask", "attn_precision", "skip_reshape", "skip_output_reshape")
ALIASES = {"query": "q", "key": "k", "value": "v"}
# attn_precision and low_precision_attention ask for more precision, which a float32 softmax gives in any case.
KNOWN = {
    *POSITIONS, "scale", "enable_gqa", "low_precision_attention", "transformer_options", "_inside_attn_wrapper",
}  # fmt: skip

# What a user can switch for one model: name -> the defect whose ASV_PATCH_... variable goes first.
MODEL_PATCHES: dict[str, str] = {
    "attention": "scores-2-31",
    "float32_softmax": "softmax-half",
    "flash_packages": "sdpa-materialises",
}

_announced: set[str] = set()


@dataclass(frozen=True)
class AttentionOverride:
    """The callable put into transformer_options.

    attention: "on" acts on every device, "auto" on mps tensors only. float32_softmax: "on" and "off" overrule the
    probe. flash_packages: "off" ignores installed packages. previous: the override that was there, used for the calls
    that are left alone.
    """

    attention: Choice = "auto"
    float32_softmax: Choice = "auto"
    flash_packages: Choice = "auto"
    previous: Callable[..., Any] | None = None

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = read_call(args, kwargs)
        if call is not None and self.acts_on(call.q, call.k, call.v):
            found = self.compute(call)
            if found is not None:
                return found
        if self.previous is not None:
            return self.previous(function, *args, **kwargs)
        return function(*args, **kwargs)

    def acts_on(self, *tensors: Tensor) -> bool:
        fit = self.attention == "on" or tensors[0].is_mps
        return fit and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))

    def compute(self, call: Call) -> Tensor | None:
        """The result in the layout that the caller asked for, or None to leave the call alone."""
        q, k, v = call.by_head()
        packages = () if self.flash_packages == "off" or not q.is_mps else None
        exact = {"on": False, "off": True, "auto": None}[self.float32_softmax]
        found, plan = patched_attention(
            q, k, v, mask_to_rank_4(call.mask), call.scale, budget=memory_budget(), half_softmax_exact=exact,
            packages=packages,
        )  # fmt: skip
        if found is None:
            return None
        if plan.method not in _announced:
            _announced.add(plan.method)
            log.info("Attention on MPS (%s): %s.", plan.method, plan.reason)
        return found if call.skip_output_reshape else found.transpose(1, 2).flatten(2)


@dataclass(frozen=True)
class Call:
    """One call of a ComfyUI attention function."""

    q: Tensor
    k: Tensor
    v: Tensor
    heads: int
    mask: Tensor | None = None
    skip_reshape: bool = False
    skip_output_reshape: bool = False
    scale: float | None = None

    def by_head(self) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, H, Lq, D] and k, v [B, Hk, Lk, D]; views."""
        if self.skip_reshape:
            return self.q, self.k, self.v
        head_dim = self.q.shape[-1] // self.heads
        q, k, v = (t.unflatten(-1, (-1, head_dim)).transpose(1, 2) for t in (self.q, self.k, self.v))
        return q, k, v


def read_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call | None:
    """The call's arguments, or None if there is one whose meaning is unknown or shapes are unusual.

    Keys and values may be [B, L, H, D] beside a query [B, L, H*D], as Wan Animate's face adapter has them.
    """
    named: dict[str, Any] = {ALIASES.get(name, name): value for name, value in kwargs.items()}
    if len(args) > len(POSITIONS) or not named.keys() <= KNOWN:
        return None
    named.update(zip(POSITIONS, args))
    q, k, v, heads, mask = (named.get(name) for name in POSITIONS[:5])
    skip_reshape = bool(named.get("skip_reshape", False))
    rank = 4 if skip_reshape else 3
    if not skip_reshape:
        k, v = (t.flatten(2) if _plain(t, 4) and t.shape[2] == heads else t for t in (k, v))
    if not isinstance(heads, int) or not (_plain(q, rank) and _plain(k, rank) and _plain(v, rank)):
        return None
    if mask is not None and not _plain(mask, 2, 3, 4):
        return None
    output_by_head = bool(named.get("skip_output_reshape", False))
    call = Call(q, k, v, heads, mask, skip_reshape, output_by_head, named.get("scale"))
    return call if _regular(call) else None


def _plain(value: Any, *ranks: int) -> TypeGuard[Tensor]:
    return type(value) is Tensor and value.ndim in ranks


def _regular(call: Call) -> bool:
    """Shapes that attention by head is defined for; others go to the function and its own errors."""
    if not call.skip_reshape and (call.q.shape[-1] % call.heads or call.k.shape[-1] % (call.q.shape[-1] // call.heads)):
        return False
    q, k, v = call.by_head()
    same_dtype = q.dtype == k.dtype == v.dtype and q.is_floating_point() and q.dtype != torch.float64
    same_device = q.device == k.device == v.device and (call.mask is None or call.mask.device == q.device)
    heads_fit = q.shape[1] == call.heads and k.shape[1] == v.shape[1] and q.shape[1] % max(1, k.shape[1]) == 0
    lengths_fit = q.shape[0] == k.shape[0] == v.shape[0] and k.shape[2] == v.shape[2] and q.shape[3] == k.shape[3]
    return same_dtype and same_device and heads_fit and lengths_fit and min(*q.shape, *k.shape, *v.shape) > 0


def cure_unreached(original: Function) -> Function:
    """One of core's attention functions; calls that no model's override reaches are computed as the plan says."""

    def cured(*args: Any, **kwargs: Any) -> Any:
        call = unreached(args, kwargs)
        found = None if call is None else AttentionOverride().compute(call)
        return original(*args, **kwargs) if found is None else found

    return cured


def cure_unreached_scores(original: Function) -> Function:
    """As ``cure_unreached``, for calls with as many scores as turn to noise."""
    cured = cure_unreached(original)

    def chosen(*args: Any, **kwargs: Any) -> Any:
        return (cured if meets_scores(*args, **kwargs) else original)(*args, **kwargs)

    return chosen


def unreached(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call | None:
    """The call if it is on mps, has no model's options and is not one that core makes inside another."""
    first = args[0] if args else kwargs.get("q", kwargs.get("query"))
    if not gate.acts_on(first) or kwargs.get("transformer_options") or "_inside_attn_wrapper" in kwargs:
        return None
    call = read_call(args, kwargs)
    return call if call is not None and AttentionOverride().acts_on(call.q, call.k, call.v) else None


def meets_scores(*args: Any, **kwargs: Any) -> bool:
    """Whether an unreached call has as many scores as turn to noise."""
    call = unreached(args, kwargs)
    if call is None:
        return False
    q, k, _ = call.by_head()
    return q.shape[:3].numel() * k.shape[2] >= attention_plan.LIMITS.score_elements


def check_scores(original: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ProbeResult:
    """Rows of the first, middle and last head that core's function computes, against float32 attention."""
    call = read_call(args, kwargs)
    assert call is not None
    try:
        result = original(*args, **kwargs)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return ProbeResult(False, float("inf"), NOISE, f"the device refuses ({probing.first_line(error)})")
    q, k, v = call.by_head()
    by_head = result if call.skip_output_reshape else result.unflatten(-1, (call.heads, -1)).transpose(1, 2)
    worst = 0.0
    for batch in probing.sampled(q.shape[0], 2):
        for head in probing.sampled(q.shape[1]):
            for row in probing.sampled(q.shape[2]):
                right = _one_row(call, q, k, v, batch, head, row)
                worst = max(worst, probing.relative_error(by_head[batch, head, row], right))
    return ProbeResult(worst <= NOISE, worst, NOISE, "relative error of attention's rows")


def _one_row(call: Call, q: Tensor, k: Tensor, v: Tensor, batch: int, head: int, row: int) -> Tensor:
    """What one query of one head should give, in float32."""
    shared = head // (q.shape[1] // k.shape[1])
    mask = mask_to_rank_4(call.mask)
    if mask is not None:
        mask = mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])[batch, head, row][None, None, None]
    query = q[batch, head, row].float()[None, None, None]
    keys, values = (t[batch, shared].float()[None, None] for t in (k, v))
    return reference_attention(query, keys, values, mask, call.scale)[0, 0, 0]


def memory_budget() -> int:
    """Bytes that one attention call may take for temporaries: an eighth of what is free, within bounds."""
    import comfy.model_management

    free = comfy.model_management.get_free_memory()
    return int(min(BUDGET, max(LEAST_BUDGET, free // 8)))


def patch_model(patcher: Any, choices: Mapping[str, str] | None = None) -> Any:
    """A clone of a ModelPatcher with the attention override, or ``patcher`` itself where nothing is to be changed.

    choices: patch (see MODEL_PATCHES) -> "auto", "on" or "off". With auto, nothing happens unless the model runs on
    MPS; with off, an override that this pack put there is taken out. The input is never changed.
    """
    wanted = {name: model_choice(name, choices) for name in MODEL_PATCHES}
    options = patcher.model_options.get("transformer_options", {})
    current = options.get(OVERRIDE)
    previous = current.previous if isinstance(current, AttentionOverride) else current
    needed = wanted["attention"] == "on" or (wanted["attention"] == "auto" and patcher.load_device.type == "mps")
    override = AttentionOverride(**wanted, previous=previous) if needed else previous
    if override == current:
        return patcher
    patched = patcher.clone()
    own = dict(patched.model_options.get("transformer_options", {}))
    own.pop(OVERRIDE, None)
    if override is not None:
        own[OVERRIDE] = override
    patched.model_options = {**patched.model_options, "transformer_options": own}
    return patched


def model_choice(name: str, choices: Mapping[str, str] | None) -> Any:
    """The choice for one model-level patch; the environment variable of its defect goes first."""
    defect = DEFECTS[MODEL_PATCHES[name]]
    return choice_for(defect, {defect.id: (choices or {}).get(name, "auto")})
