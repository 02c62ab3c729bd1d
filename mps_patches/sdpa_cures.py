"""Two cures of torch's scaled_dot_product_attention on MPS: is_causal in half precision, and short queries.

In half precision `is_causal` lets a query see later tokens (pytorch 195910): the mask is given explicitly instead,
or, where it would be large, the scores are formed in blocks. The vector kernels for up to 8 queries read and write out
of bounds in torch 2.8 to 2.10 (pytorch 174861, 169222): the query is padded so that the general kernel runs.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention_plan import BUDGET, HALF, VECTOR_KERNEL_ROWS, AttentionRequest, in_chunks
from .chunked_attention import attend
from .registry import Function

LARGEST_MASK = 64 << 20


def causal_in_half(original: Function) -> Function:
    """SDPA whose ``is_causal`` is an explicit mask, for half-precision mps tensors."""

    @functools.wraps(original)
    def wrapper(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, **options: Any,
    ) -> Tensor:  # fmt: skip
        if not (is_causal and attn_mask is None and query.is_mps and query.dtype in HALF):
            return original(query, key, value, attn_mask, dropout_p, is_causal, **options)
        q_len, k_len = query.shape[-2], key.shape[-2]
        if q_len * k_len <= LARGEST_MASK or dropout_p or query.ndim != 4 or query.requires_grad:
            mask = torch.ones(q_len, k_len, dtype=torch.bool, device=query.device).tril()
            return original(query, key, value, mask, dropout_p, False, **options)
        batch, heads, _, head_dim = query.shape
        request = AttentionRequest(batch, heads, q_len, k_len, head_dim, query.dtype, (2, 6), BUDGET, value.shape[-1])
        plan = in_chunks(request, "a causal mask of this size is not formed at once")
        return attend(query, key, value, plan, scale=options.get("scale"), causal=True)

    return wrapper


def short_query(original: Function) -> Function:
    """SDPA that pads 1 to 8 query rows on MPS to 9, so that the general kernel runs, and drops the added rows."""

    @functools.wraps(original)
    def wrapper(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, **options: Any,
    ) -> Tensor:  # fmt: skip
        rows = query.shape[-2]
        if not (query.is_mps and 0 < rows <= VECTOR_KERNEL_ROWS):
            return original(query, key, value, attn_mask, dropout_p, is_causal, **options)
        more = VECTOR_KERNEL_ROWS + 1 - rows
        padded = F.pad(query, (0, 0, 0, more))
        if attn_mask is not None and attn_mask.ndim > 1 and attn_mask.shape[-2] != 1:
            last = attn_mask[..., -1:, :]
            attn_mask = torch.cat((attn_mask, last.expand(*last.shape[:-2], more, last.shape[-1])), dim=-2)
        return original(padded, key, value, attn_mask, dropout_p, is_causal, **options)[..., :rows, :]

    return wrapper
