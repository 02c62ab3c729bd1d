"""Attention computed the way a plan says: query blocks in float32, or torch's SDPA kept on its fast path.

Scores, softmax and sums are float32, so that the result is the float32 one rounded once to the input's dtype; keys
and values stay as they are but for the heads of the block at hand. Where keys come in several blocks, the softmax is
accumulated with a running maximum (Milakov and Gimelshein, 2018; Rabe and Staats, 2021).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention_plan import AttentionPlan, Mask


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    mask: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
) -> Tensor:
    """softmax(q k^T * scale + mask) v, computed as ``plan`` says.

    q [B, H, Lq, D], k [B, Hk, Lk, D], v [B, Hk, Lk, Dv], Hk a divisor of H; mask [B|1, H|1, Lq|1, Lk|1], bool (False
    hides a key) or additive; scale defaults to D^-0.5; causal hides keys after the query's own index. Returns
    [B, H, Lq, Dv] in q's dtype, laid out so that ``transpose(1, 2).flatten(2)`` is a view. A row that sees no key is 0.
    Raises KeyError for a plan whose method is not computed here.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    fill = METHODS[plan.method]
    out = _result(q, v)
    for batches, heads in _groups(q, plan):
        fill(out, q, k, v, plan, mask, scale, causal, batches, heads)
    return out


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None, causal: bool = False
) -> Tensor:
    """The plain form of ``attend``: all scores at once, in q's dtype but at least float32; same shapes."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    repeats = q.shape[1] // k.shape[1]
    k, v = (t.to(dtype).repeat_interleave(repeats, dim=1) for t in (k, v))
    scores = q.to(dtype) @ k.transpose(-1, -2) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.to(dtype)
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    return (torch.softmax(scores, dim=-1).nan_to_num(0.0) @ v).to(q.dtype)


def mask_kind(mask: Tensor | None, dtype: torch.dtype) -> Mask:
    """How the planner names a mask for queries of ``dtype``."""
    if mask is None:
        return "none"
    return "bool" if mask.dtype == torch.bool else "same" if mask.dtype == dtype else "other"


def mask_to_rank_4(mask: Tensor | None) -> Tensor | None:
    """[Lq, Lk] and [B, Lq, Lk] get the missing dimensions, batch before heads, as in ComfyUI."""
    if mask is None or mask.ndim >= 4:
        return mask
    return mask[None, None] if mask.ndim == 2 else mask[:, None]


def _chunks_of_heads(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, mask: Tensor | None, scale: float, causal: bool,
    batches: slice, heads: slice,
) -> None:  # fmt: skip
    """Fill in ``out`` for some heads; a function of its own, so that their copies are gone before the next ones'."""
    q_len, k_len = q.shape[2], k.shape[2]
    keys = _copy(_heads_of(k, q, batches, heads)).transpose(-1, -2)
    values = _copy(_heads_of(v, q, batches, heads))
    for start in range(0, q_len, plan.rows):
        rows = slice(start, min(start + plan.rows, q_len))
        query = _copy(q[batches, heads, rows]).mul_(scale)
        hide = _hider(mask, batches, heads, rows, causal)
        if hide is None and plan.keys >= k_len:
            out[batches, heads, rows] = torch.softmax(query @ keys, dim=-1) @ values
        else:
            seen = min(k_len, rows.stop) if causal else k_len
            out[batches, heads, rows] = _accumulate(query, keys, values, min(plan.keys, k_len), seen, hide)


def _accumulate(
    query: Tensor, keys: Tensor, values: Tensor, extent: int, seen: int, hide: Callable[[Tensor, slice], Tensor] | None
) -> Tensor:
    """softmax(query keys) values over the first ``seen`` keys, ``extent`` at a time; hidden scores are -inf."""
    top = total = result = None
    for start in range(0, seen, extent):
        part = slice(start, min(start + extent, seen))
        scores = query @ keys[..., part]
        if hide is not None:
            scores = hide(scores, part)
        new_top = scores.amax(dim=-1, keepdim=True)
        if top is not None:
            new_top = torch.maximum(top, new_top)
        # A row that sees no key yet has a maximum of -inf, and -inf - -inf is NaN.
        finite = new_top.clamp_min(torch.finfo(scores.dtype).min)
        weights = scores.sub_(finite).exp_()
        mass = weights.sum(dim=-1, keepdim=True)
        block = weights @ values[..., part, :]
        if top is None or total is None or result is None:
            total, result = mass, block
        else:
            fade = (top - finite).exp_()
            total = total.mul_(fade).add_(mass)
            result = result.mul_(fade).add_(block)
        top = new_top
    assert total is not None and result is not None
    return result.div_(total.clamp_min_(torch.finfo(torch.float32).tiny))


def _hider(
    mask: Tensor | None, batches: slice, heads: slice, rows: slice, causal: bool
) -> Callable[[Tensor, slice], Tensor] | None:
    """What applies the mask to a block of scores, given the slice of keys it covers; None if nothing is hidden."""
    if mask is None and not causal:
        return None
    here = None if mask is None else mask[_within(mask, 0, batches), _within(mask, 1, heads), _within(mask, 2, rows)]

    def hide(scores: Tensor, part: slice) -> Tensor:
        if here is not None:
            block = here[..., _within(here, 3, part)]
            if block.dtype == torch.bool:
                scores = scores.masked_fill_(block.logical_not(), -torch.inf)
            else:
                scores = scores.add_(block.to(torch.float32))
        if causal:
            own = torch.arange(rows.start, rows.stop, device=scores.device)
            key = torch.arange(part.start, part.stop, device=scores.device)
            scores = scores.masked_fill_(key[None, :] > own[:, None], -torch.inf)
        return scores

    return hide


def _sdpa_of_heads(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, mask: Tensor | None, scale: float, causal: bool,
    batches: slice, heads: slice,
) -> None:  # fmt: skip
    """As ``_chunks_of_heads``: on views, or on float32 or zero-padded copies, so that SDPA has a kernel for them."""
    dtype = torch.float32 if plan.method == "sdpa-float32" else q.dtype
    prepare = _unit_stride if plan.method == "sdpa" else partial(_copy, dtype=dtype, last=plan.head_dim)
    query = prepare(q[batches, heads])
    key, value = (prepare(_heads_of(t, q, batches, heads)) for t in (k, v))
    here = None if mask is None else mask[_within(mask, 0, batches), _within(mask, 1, heads)]
    if here is not None and here.dtype != torch.bool:
        here = here.to(dtype)
    found = F.scaled_dot_product_attention(query, key, value, attn_mask=here, is_causal=causal, scale=scale)
    out[batches, heads] = found[..., : v.shape[-1]]


# Each fills in the result for the heads of one block.
METHODS: dict[str, Callable[..., None]] = {
    "chunks": _chunks_of_heads,
    "sdpa": _sdpa_of_heads,
    "sdpa-float32": _sdpa_of_heads,
    "sdpa-padded": _sdpa_of_heads,
}


def _copy(t: Tensor, dtype: torch.dtype = torch.float32, last: int | None = None) -> Tensor:
    """A contiguous copy in ``dtype``, made in one go; zeros up to ``last`` elements in the last dimension."""
    if last is None or last == t.shape[-1]:
        return torch.empty(t.shape, dtype=dtype, device=t.device).copy_(t)
    padded = torch.zeros((*t.shape[:-1], last), dtype=dtype, device=t.device)
    padded[..., : t.shape[-1]] = t
    return padded


def _result(q: Tensor, v: Tensor) -> Tensor:
    """An empty [B, H, Lq, Dv] whose memory is in the order B, Lq, H, Dv."""
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1]).transpose(1, 2)


def _groups(q: Tensor, plan: AttentionPlan) -> Iterator[tuple[slice, slice]]:
    for batch in range(0, q.shape[0], plan.batches):
        for head in range(0, q.shape[1], plan.heads):
            yield slice(batch, batch + plan.batches), slice(head, min(head + plan.heads, q.shape[1]))


def _heads_of(t: Tensor, q: Tensor, batches: slice, heads: slice) -> Tensor:
    """The key or value heads that serve the query heads ``heads``, repeated where several queries share one."""
    repeats = q.shape[1] // t.shape[1]
    if repeats == 1:
        return t[batches, heads]
    first, last = heads.start // repeats, (heads.stop - 1) // repeats
    shared = t[batches, first : last + 1].repeat_interleave(repeats, dim=1)
    return shared[:, heads.start - first * repeats :][:, : heads.stop - heads.start]


def _within(t: Tensor, dim: int, part: slice) -> slice:
    return slice(None) if t.shape[dim] == 1 else part


def _unit_stride(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()
