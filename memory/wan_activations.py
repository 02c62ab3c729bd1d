"""Wan's transformer block with fewer activations alive: the same arithmetic, row by row where rows do not meet.

Only keys and values must be there for all tokens at once. Queries, both attentions, the feed-forward layer and the
head go through in chunks of tokens, and the sums with the residual are written where they stay. The architecture is
that of the Wan papers (2.1: 2503.20314): modulated self-attention with rotary embedding, cross-attention to text and
image tokens, modulated feed-forward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..mps_patches import attention_plan

DEFAULT_BYTES = 256 << 20
LEAST_ROWS = 64

# Tensors of the model's width that one chunk has alive at its worst moment, feed-forward's hidden ones not counted.
# Rotary embedding is computed in float32: input and result are two widths each there.
WIDTHS = {"keys": 9, "queries": 9, "cross": 6, "feed-forward": 4, "head": 3}
MODULATION_WIDTHS = 3  # more, where each token has a modulation of its own


@dataclass(eq=False)
class ActivationBudget:
    """What one chunk's temporary tensors may take, in bytes; may be changed at any time, also while sampling.

    Copies of a model share it: a deep copy is the object itself.
    """

    temporary_bytes: int = DEFAULT_BYTES

    def __deepcopy__(self, memo: dict[int, Any]) -> ActivationBudget:
        return self

    def rows(self, tokens: int, bytes_per_row: int, unit: int = 1) -> int:
        """Rows of one chunk: equal chunks of ``tokens``, each within the budget, none below 64 rows.

        Chunks of ``unit`` rows and more hold at most a multiple of it.
        """
        most = max(LEAST_ROWS, self.temporary_bytes // max(1, bytes_per_row))
        most -= most % unit if most >= unit else 0
        return math.ceil(tokens / math.ceil(tokens / most))


@dataclass(frozen=True)
class Host:
    """What the program around the model gives a block for one call.

    attention(q, k, v, heads=, transformer_options=): q [B, Lq, C], k and v [B, Lk, C] -> [B, Lq, C]. rotate(x, freqs):
    rotary embedding of x [B, L, H, D]. check(): called before each chunk, raises where the run is to stop. by_rows:
    whether attention may be asked for some rows and one batch entry at a time; false where somebody's function wants to
    see all of it.
    """

    attention: Callable[..., Tensor]
    rotate: Callable[[Tensor, Tensor], Tensor]
    check: Callable[[], None]
    budget: ActivationBudget
    options: dict[str, Any]
    by_rows: bool = True

    def patches(self, name: str) -> list[Callable[[Mapping[str, Any]], Tensor]]:
        return self.options.get("patches", {}).get(name, [])

    def attend(self, q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        return self.attention(q, k, v, heads=heads, transformer_options=self.options)

    def chunks(self, x: Tensor, stage: str, more: int = 0, batch: int = 1) -> Iterator[slice]:
        """Slices of x's tokens; ``more``: elements per token beyond the stage's widths."""
        per_row = batch * (WIDTHS[stage] * x.shape[-1] + more) * x.element_size()
        # Attention in blocks would halve chunks a little longer than its blocks.
        rows = self.budget.rows(x.shape[1], per_row, attention_plan.LIMITS.rows if stage == "queries" else 1)
        for start in range(0, x.shape[1], rows):
            self.check()
            yield slice(start, min(start + rows, x.shape[1]))


class Modulation:
    """Shift, scale and gate per channel: a learned table [1, S, C] plus an embedding of the time step, in chunks.

    embedding: [B, T, S or 1, C] with one entry for all tokens (T = 1), for each token, or for each run of
    ceil(tokens / T) tokens; the sum is made for the tokens that are asked for.
    """

    def __init__(self, table: Tensor, embedding: Tensor, tokens: int) -> None:
        self.embedding = embedding
        self.table = table.to(device=embedding.device, dtype=embedding.dtype)
        entries = embedding.shape[1]
        self.run = 0 if entries == 1 else math.ceil(tokens / entries)

    @property
    def more(self) -> int:
        """Elements per token that a chunk needs for it."""
        return MODULATION_WIDTHS * self.embedding.shape[-1] if self.run else 0

    def part(self, index: int, rows: slice, items: slice = slice(None)) -> Tensor:
        """Entry ``index`` of the table for these tokens and batch entries: [B, 1 or rows, C]."""
        column = min(index, self.embedding.shape[2] - 1)
        if not self.run:
            return self.table[:, index, None] + self.embedding[items, :, column]
        first = rows.start // self.run
        entries = self.embedding[items, first : (rows.stop - 1) // self.run + 1, column]
        found = self.table[:, index, None] + entries
        if self.run == 1:
            return found
        start = rows.start - first * self.run
        return found.repeat_interleave(self.run, dim=1)[:, start : start + rows.stop - rows.start]

    def apply(self, x: Tensor, shift: int, scale: int, rows: slice, items: slice = slice(None)) -> Tensor:
        """shift + x * (1 + scale), entries of the table named by index; x [B, rows, C]."""
        return torch.addcmul(self.part(shift, rows, items), x, 1 + self.part(scale, rows, items))


def modulation_fits(embedding: Tensor, tokens: int) -> bool:
    """Whether entries and tokens go together as ``Modulation`` reads them; [B, T, S, C]."""
    entries = embedding.shape[1]
    run = math.ceil(tokens / max(1, entries))
    return entries == 1 or entries == tokens or (tokens // entries > 1 and entries * run >= tokens)


def is_plain(module: nn.Module) -> bool:
    """Whether a module does what its class says: no forward of its own, no hooks."""
    own = module.__dict__.get("forward")
    bound = own is None or getattr(own, "__func__", None) is type(module).forward
    return bound and not (module._forward_hooks or module._forward_pre_hooks)


def decoded_once(layer: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """The layer with its weight decoded for as long as the result lives; layers that keep dense weights as they are.

    A layer that decodes its weight at each call has ``decoded_weight(dtype, device)`` and ``decoded_bias``.
    """
    if not hasattr(layer, "decoded_weight") or not is_plain(layer):
        return layer
    weight, bias = layer.decoded_weight(x.dtype, x.device), layer.decoded_bias(x.dtype, x.device)  # type: ignore[operator]
    return lambda rows: F.linear(rows, weight, bias)


def block_forward(
    block: nn.Module, x: Tensor, embedding: Tensor, freqs: Tensor, context: Tensor, image_tokens: int | None, host: Host
) -> Tensor:
    """One block of the transformer.

    x [B, L, C], not changed; embedding [B, T, 6, C], see ``Modulation``; freqs [1 or B, L, 1, D/2, 2, 2]; context
    [B, Lc, C], of which the first ``image_tokens`` belong to the image where the block has image attention. Returns a
    new [B, L, C].
    """
    modulation = Modulation(block.modulation, embedding, x.shape[1])  # type: ignore[arg-type]
    x = _self_attention(block, x, modulation, freqs, host)
    x = _cross_attention(block, x, context, image_tokens, host)
    patches = host.patches("attn2_patch")
    for patch in patches:
        x = patch({"x": x, "transformer_options": host.options})
    # A patch may have kept x, or given back something that others hold.
    return _feed_forward(block, x, modulation, host, torch.empty_like(x) if patches else x)


def vace_forward(block: nn.Module, c: Tensor, x: Tensor, forward: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """A block of VACE's own branch: c [B, L, C], the first with x added; (what the main branch gets, the next c)."""
    if block.block_id == 0:
        c = block.before_proj(c) + x  # type: ignore[operator]
    c = forward(c)
    return block.after_proj(c), c  # type: ignore[operator]


def head_forward(head: nn.Module, x: Tensor, embedding: Tensor, host: Host) -> Tensor:
    """The last layer: x [B, L, C], embedding [B, T, 1, C] -> [B, L, patch elements]."""
    modulation = Modulation(head.modulation, embedding, x.shape[1])  # type: ignore[arg-type]
    project = decoded_once(head.head, x)  # type: ignore[arg-type]
    parts = [
        project(modulation.apply(head.norm(x[:, rows]), 0, 1, rows))  # type: ignore[operator]
        for rows in host.chunks(x, "head", modulation.more, x.shape[0])
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _self_attention(block: nn.Module, x: Tensor, modulation: Modulation, freqs: Tensor, host: Host) -> Tensor:
    attention: Any = block.self_attn
    if host.by_rows and not host.patches("attn1_patch") and is_plain(attention):
        return _attend_by_rows(block, x, modulation, freqs, host)
    whole = slice(0, x.shape[1])
    if is_plain(attention):
        y = _attend_whole(block, x, modulation, freqs, host)
    else:
        h = modulation.apply(block.norm1(x.contiguous()), 0, 1, whole)  # type: ignore[operator]
        y = attention(h, freqs, transformer_options=host.options)
    return torch.addcmul(x, y, modulation.part(2, whole))


def _attend_by_rows(block: nn.Module, x: Tensor, modulation: Modulation, freqs: Tensor, host: Host) -> Tensor:
    """x + gate * self-attention in chunks of queries, keys and values of one batch entry at a time."""
    attention: Any = block.self_attn
    names = ("k", "v", "q", "o")
    held = [decoded_once(getattr(attention, name), x) for name in names] if x.shape[0] > 1 else None
    out: Tensor | None = None
    for item in range(x.shape[0]):
        out = _attend_item(out, block, x, slice(item, item + 1), modulation, freqs, host, held)
    assert out is not None
    return out


def _attend_item(
    out: Tensor | None, block: nn.Module, x: Tensor, items: slice, modulation: Modulation, freqs: Tensor, host: Host,
    held: list[Callable[[Tensor], Tensor]] | None,
) -> Tensor:  # fmt: skip
    """Fill in out[items], which is made when keys and values are; a function, so that these go with it."""
    k, v = _keys_and_values(block, x, items, modulation, freqs, host, held and held[:2])
    attention: Any = block.self_attn
    query_of, out_of = held[2:] if held else [decoded_once(layer, x) for layer in (attention.q, attention.o)]
    found = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out

    def fill(rows: slice) -> None:
        q = _queries(block, query_of, x, items, rows, modulation, freqs, host)
        y = out_of(host.attend(q, k, v, attention.num_heads))
        del q
        found[items, rows] = torch.addcmul(x[items, rows], y, modulation.part(2, rows, items))

    for rows in host.chunks(x, "queries", modulation.more):
        fill(rows)
    return found


def _queries(
    block: Any, project: Callable[[Tensor], Tensor], x: Tensor, items: slice, rows: slice, modulation: Modulation,
    freqs: Tensor, host: Host,
) -> Tensor:  # fmt: skip
    h = modulation.apply(block.norm1(x[items, rows].contiguous()), 0, 1, rows, items)
    return _rotated(block.self_attn, block.self_attn.norm_q(project(h)), freqs, items, rows, host)


def _rotated(attention: Any, x: Tensor, freqs: Tensor, items: slice, rows: slice, host: Host) -> Tensor:
    here = freqs[items if freqs.shape[0] > 1 else slice(None), rows]
    return host.rotate(x.unflatten(-1, (attention.num_heads, attention.head_dim)), here).flatten(2)


def _keys_and_values(
    block: Any, x: Tensor, items: slice, modulation: Modulation, freqs: Tensor, host: Host,
    held: list[Callable[[Tensor], Tensor]] | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    attention = block.self_attn
    key_of, value_of = held or [decoded_once(layer, x) for layer in (attention.k, attention.v)]
    k, v = (torch.empty(x[items].shape, dtype=x.dtype, device=x.device) for _ in range(2))

    def fill(rows: slice) -> None:
        h = modulation.apply(block.norm1(x[items, rows].contiguous()), 0, 1, rows, items)
        v[:, rows] = value_of(h)
        h = key_of(h)
        k[:, rows] = _rotated(attention, attention.norm_k(h), freqs, items, rows, host)

    for rows in host.chunks(x, "keys", modulation.more):
        fill(rows)
    return k, v


def _attend_whole(block: Any, x: Tensor, modulation: Modulation, freqs: Tensor, host: Host) -> Tensor:
    """Self-attention in one call, for patches and functions that look at all of it; projections in chunks."""
    attention, items = block.self_attn, slice(None)
    heads = (attention.num_heads, attention.head_dim)
    k, v = _keys_and_values(block, x, items, modulation, freqs, host, None)
    q = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    project = decoded_once(attention.q, x)
    for rows in host.chunks(x, "queries", modulation.more, x.shape[0]):
        q[:, rows] = _queries(block, project, x, items, rows, modulation, freqs, host)
    del project
    y = host.attend(q, k, v, attention.num_heads)
    q, k = (t.unflatten(-1, heads) for t in (q, k))
    for patch in host.patches("attn1_patch"):
        y = patch({"x": y, "q": q, "k": k, "transformer_options": host.options})
    del q, k, v
    return attention.o(y)


def _cross_attention(block: Any, x: Tensor, context: Tensor, image_tokens: int | None, host: Host) -> Tensor:
    """x, to which attention to the text, and to the image where the block has it, is added in place."""
    attention = block.cross_attn
    if not (host.by_rows and is_plain(attention)):
        y = attention(block.norm3(x), context, context_img_len=image_tokens, transformer_options=host.options)
        return x.add_(y)
    pairs = []
    if hasattr(attention, "k_img"):
        image, context = context[:, :image_tokens], context[:, image_tokens:]
        pairs.append((attention.norm_k_img(attention.k_img(image)), attention.v_img(image)))
    pairs.insert(0, (attention.norm_k(attention.k(context)), attention.v(context)))
    query_of, out_of = (decoded_once(layer, x) for layer in (attention.q, attention.o))

    def add(rows: slice) -> None:
        q = attention.norm_q(query_of(block.norm3(x[:, rows])))
        y, *others = (host.attend(q, k, v, attention.num_heads) for k, v in pairs)
        for other in others:
            y = y + other
        del q
        x[:, rows] += out_of(y)

    for rows in host.chunks(x, "cross", batch=x.shape[0]):
        add(rows)
    return x


def _feed_forward(block: Any, x: Tensor, modulation: Modulation, host: Host, out: Tensor) -> Tensor:
    """out = x + gate * feed-forward; ``out`` may be x."""
    by_rows = isinstance(block.ffn, nn.Sequential) and is_plain(block.ffn)
    layers = [decoded_once(layer, x) for layer in block.ffn] if by_rows else [block.ffn]

    def fill(rows: slice) -> None:
        h = modulation.apply(block.norm2(x[:, rows]), 3, 4, rows)
        for layer in layers:
            h = layer(h)
        out[:, rows] = torch.addcmul(x[:, rows], h, modulation.part(5, rows))

    if not by_rows:
        fill(slice(0, x.shape[1]))
        return out
    hidden = max((getattr(layer, "out_features", 0) for layer in block.ffn), default=0)
    for rows in host.chunks(x, "feed-forward", 2 * hidden + modulation.more, x.shape[0]):
        fill(rows)
    return out
