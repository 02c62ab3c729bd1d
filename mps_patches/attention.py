"""Attention on MPS: what goes wrong, how it is shown, and what is used instead.

Score matrices from 2^31 elements are noise (ComfyUI 14837), half-precision softmax over thousands of keys smears
(pytorch 190791), scaled_dot_product_attention forms all scores before torch 2.13, and has two defects of its own
(pytorch 195910, 174861). The first three are cured call by call, through a model's attention override, and process-wide
for the calls that no override reaches; attention_defects.py has their entries in the table.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from . import attention_plan, flash_packages, probing
from .attention_plan import PREFILL_SINCE, AttentionPlan, parse_version, plan_attention
from .chunked_attention import attend, mask_kind, reference_attention
from .flash_packages import run_package, usable_packages
from .registry import ProbeResult

__all__ = [
    "PATCHED_PROBES",
    "attend",
    "attention_version",
    "forget",
    "half_softmax_is_exact",
    "patched_attention",
    "plan_attention",
    "reference_attention",
]

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

# Relative root mean square errors; a right half-precision kernel makes about 0.003, the defects 0.02 and up.
HALF_TOLERANCE = 0.01
NOISE = 0.2
MATERIALISED_PROBE = (4096, 4096, 32)  # queries, keys, head dim; scores far larger than the allocator's heaps
MIB = 1 << 20


def patched_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    *,
    budget: int = attention_plan.BUDGET,
    version: tuple[int, int] | None = None,
    half_softmax_exact: bool | None = None,
    packages: tuple[str, ...] | None = None,
) -> tuple[Tensor | None, AttentionPlan]:
    """Attention the way the plan for these tensors says, and the plan; None where the plan is to leave the call alone.

    q [B, H, Lq, D], k [B, Hk, Lk, D], v [B, Hk, Lk, Dv], mask broadcastable to [B, H, Lq, Lk]; result [B, H, Lq, Dv].
    What is None is found out about q's device: torch's kernels, half-precision softmax, the packages installed.
    """

    version = version or attention_version(q.device)
    exact = half_softmax_is_exact(q.device) if half_softmax_exact is None else half_softmax_exact
    remaining = usable_packages(q.shape[-1]) if packages is None else packages
    while True:
        chosen = _plan(q, k, v, version, budget, mask=mask, half_softmax_exact=exact, packages=remaining)
        if chosen.method == "original":
            return None, chosen
        if chosen.method not in remaining:
            return attend(q, k, v, chosen, mask, scale), chosen
        out = run_package(chosen.method, q, k, v, q.shape[-1] ** -0.5 if scale is None else scale)
        if out is not None:
            return out, chosen
        remaining = remaining[1:]


def _plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    version: tuple[int, int],
    budget: int = attention_plan.BUDGET,
    *,
    mask: Tensor | None = None,
    half_softmax_exact: bool,
    packages: tuple[str, ...] = (),
    limits: attention_plan.AttentionLimits | None = None,
) -> AttentionPlan:
    batch, heads, q_len, head_dim = q.shape
    return plan_attention(
        batch,
        heads,
        q_len,
        k.shape[2],
        head_dim,
        q.dtype,
        version,
        budget,
        value_dim=v.shape[-1],
        mask=mask_kind(mask, q.dtype),
        half_softmax_exact=half_softmax_exact,
        packages=packages,
        limits=limits,
    )


def attention_version(device: torch.device) -> tuple[int, int]:
    """torch's version as far as attention goes: one without prefill kernels if scores are formed on this device."""
    return _attention_version(device.type)


def half_softmax_is_exact(device: torch.device) -> bool:
    """Whether half-precision attention over some thousand keys passes its probe on this device; True off MPS."""
    return device.type != "mps" or _half_softmax_is_exact(device.type)


@functools.cache
def _attention_version(device_type: str) -> tuple[int, int]:
    version = parse_version(torch.__version__)
    if version >= PREFILL_SINCE and device_type == "mps" and _scores_formed(torch.device(device_type)):
        return PREFILL_SINCE[0], PREFILL_SINCE[1] - 1
    return version


@functools.cache
def _half_softmax_is_exact(device_type: str) -> bool:
    return probe_softmax(torch.device(device_type), True).ok


def forget() -> None:
    """Find everything about the device and the packages out again."""
    _attention_version.cache_clear()
    _half_softmax_is_exact.cache_clear()
    flash_packages.forget()


def _scores_formed(device: torch.device, way: Attention | None = None) -> bool:
    """Whether attention allocates a score matrix, seen in what the driver holds afterwards: 4 bytes a score or more."""
    q_len, k_len, head_dim = MATERIALISED_PROBE
    q, k = (torch.ones(1, 1, length, head_dim, device=device) for length in (q_len, k_len))
    torch.mps.synchronize()
    torch.mps.empty_cache()
    before = torch.mps.driver_allocated_memory()
    (way or _native_attention)(q, k, k)
    torch.mps.synchronize()
    grown = torch.mps.driver_allocated_memory() - before
    torch.mps.empty_cache()
    return grown >= q_len * k_len * 4


def probe_materialised(device: torch.device, quick: bool) -> ProbeResult:
    version = parse_version(torch.__version__)
    return _materialised(version < PREFILL_SINCE or _scores_formed(device), f"torch {version[0]}.{version[1]}")


def probe_materialised_patched(device: torch.device, quick: bool) -> ProbeResult:
    return _materialised(_scores_formed(device, _in_small_blocks), "the patched attention")


def _materialised(formed: bool, what: str) -> ProbeResult:
    q_len, k_len, _ = MATERIALISED_PROBE
    detail = f"{what} {'forms' if formed else 'does not form'} {q_len} x {k_len} scores at once (bytes per score)"
    return ProbeResult(not formed, 8.0 if formed else 0.0, 0.0, detail)


def _relative_error(found: Tensor, right: Tensor) -> float:
    """Root mean square of the difference over that of the right values; inf where something is not a number."""
    right = right.double().cpu()
    error = ((found.double().cpu() if not found.is_mps else found.cpu().double()) - right).square().mean().sqrt()
    size = right.square().mean().sqrt()
    ratio = (error / size.clamp_min(1e-30)).item()
    return ratio if ratio == ratio else float("inf")


def _random(*shapes: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def _native_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def _plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2), dim=-1) @ v


def _in_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The model-level patch, for a call of any size."""
    limits = dataclasses.replace(attention_plan.LIMITS, gate_elements=0)
    return attend(q, k, v, _plan(q, k, v, attention_version(q.device), half_softmax_exact=False, limits=limits))


def _in_small_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    limits = dataclasses.replace(attention_plan.LIMITS, gate_elements=0)
    return attend(q, k, v, _plan(q, k, v, (2, 12), 4 * MIB, half_softmax_exact=True, limits=limits))


def probe_softmax(
    device: torch.device, quick: bool, ways: tuple[Attention, ...] = (_native_attention, _plain_attention)
) -> ProbeResult:
    """Half-precision attention over more keys than its softmax can take, against float32 on the CPU."""
    k_len = 14040 if quick else 32760
    errors = []
    for dtype in (torch.bfloat16, torch.float16):
        q, k, v = _random((1, 1, 32, 64), (1, 1, k_len, 64), (1, 1, k_len, 64), dtype=dtype)
        right = reference_attention(q.float(), k.float(), v.float())
        errors += [_relative_error(way(q.to(device), k.to(device), v.to(device)), right) for way in ways]
    worst = max(errors)
    return ProbeResult(worst <= HALF_TOLERANCE, worst, HALF_TOLERANCE, f"relative error over {k_len:,} keys")


def probe_scores(device: torch.device, quick: bool) -> ProbeResult:
    """The product of queries and keys at as many scores as turn to noise, a few rows against float32 on the CPU.

    The product alone is 4 GiB; its softmax would take as much again, and is looked at by the check at first use.
    """
    if quick and attention_plan.LIMITS.score_elements > probing.SCALED:
        return probing.not_applicable(f"takes {scores_footprint(False) / probing.GIB:.0f} GiB")
    heads, rows, k_len = _score_shape()
    q, k = _random((heads, rows, 8), (heads, k_len, 8), dtype=torch.bfloat16)
    scores = torch.bmm(q.to(device), k.to(device).transpose(-1, -2))
    errors = [
        _relative_error(scores[head, row].cpu(), k[head].float() @ q[head, row].float())
        for head in range(heads)
        for row in probing.sampled(rows)
    ]
    return _noise_result(max(errors), f"relative error in a product of {scores.numel():,} scores")


def probe_scores_patched(device: torch.device, quick: bool) -> ProbeResult:
    """Attention in blocks over as many scores, first and last rows against float32 on the CPU."""
    heads, rows, k_len = _score_shape()
    q, k, v = _random(*((1, heads, length, 16) for length in (rows, k_len, k_len)), dtype=torch.bfloat16)
    ends = probing.sampled(rows, 16)
    found = _in_blocks(q.to(device), k.to(device), v.to(device)).cpu()[:, :, ends]
    right = reference_attention(q[:, :, ends].float(), k.float(), v.float())
    return _noise_result(_relative_error(found, right), f"relative error at {heads * rows * k_len:,} scores")


def scores_footprint(quick: bool) -> int:
    """Bytes that ``probe_scores`` takes."""
    heads, rows, k_len = _score_shape()
    large = attention_plan.LIMITS.score_elements > probing.SCALED
    return 0 if quick and large else 2 * heads * (rows * k_len + 16 * (rows + k_len)) + (1 << 24)


def _score_shape() -> tuple[int, int, int]:
    """Heads, queries and keys whose scores just reach the limit."""
    elements = attention_plan.LIMITS.score_elements
    heads, k_len = 4, min(32760, max(256, elements >> 10))
    return heads, -(-elements // (heads * k_len)), k_len


def _noise_result(error: float, what: str) -> ProbeResult:
    """Rounding and half-precision softmax are other matters; noise is an error of the size of the result."""
    return ProbeResult(error <= NOISE, error, NOISE, what)


def probe_causal(device: torch.device, quick: bool) -> ProbeResult:
    length = 128 if quick else 1024
    errors = []
    for dtype in (torch.bfloat16, torch.float16):
        q, k, v = _random((1, 4, length, 64), (1, 4, length, 64), (1, 4, length, 64), dtype=dtype)
        found = F.scaled_dot_product_attention(q.to(device), k.to(device), v.to(device), is_causal=True)
        errors.append(_relative_error(found, reference_attention(q.float(), k.float(), v.float(), causal=True)))
    return ProbeResult(max(errors) <= HALF_TOLERANCE, max(errors), HALF_TOLERANCE, f"relative error at {length} tokens")


def probe_short_query(device: torch.device, quick: bool) -> ProbeResult:
    """One or a few queries; the reports had 2 key heads for 32 query heads, and key lengths off multiples of 32."""
    worst = 0.0
    for rows, key_heads, k_len in ((1, 2, 1024), (1, 8, 70), (8, 8, 39)) if quick else SHORT_QUERIES:
        keys = (1, key_heads, k_len, 128)
        q, k, v = _random((1, 32, rows, 128), keys, keys, dtype=torch.bfloat16)
        right = reference_attention(q.float(), k.float(), v.float())
        for _ in range(2):
            found = F.scaled_dot_product_attention(q.to(device), k.to(device), v.to(device), enable_gqa=True)
            worst = max(worst, _relative_error(found, right))
    return ProbeResult(worst <= HALF_TOLERANCE, worst, HALF_TOLERANCE, "relative error for 1 to 8 queries")


# Queries, key heads, keys.
SHORT_QUERIES = (
    (1, 2, 1024),
    (1, 32, 257),
    (2, 2, 4097),
    (2, 32, 38),
    (5, 2, 257),
    (5, 32, 1024),
    (8, 2, 38),
    (8, 8, 39),
)

# What the probes of the model-level defects say when the patched attention is used instead of the device's own.
PATCHED_PROBES: dict[str, Callable[[torch.device, bool], ProbeResult]] = {
    "scores-2-31": probe_scores_patched,
    "softmax-half": functools.partial(probe_softmax, ways=(_in_blocks,)),
    "sdpa-materialises": probe_materialised_patched,
}
