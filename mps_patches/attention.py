"""Attention on MPS: what goes wrong, how it is shown, and what is used instead.

Score matrices from 2^31 elements are noise (ComfyUI 14837), half-precision softmax over thousands of keys smears
(pytorch 190791), scaled_dot_product_attention forms all scores before torch 2.13, and has two defects of its own
(pytorch 195910, 174861). The first three are cured call by call, through a model's attention override.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from . import attention_plan, flash_packages
from .attention_plan import PREFILL_SINCE, AttentionPlan, parse_version, plan_attention
from .chunked_attention import attend, mask_kind, reference_attention
from .flash_packages import run_package, usable_packages
from .registry import Cure, Defect, ProbeResult
from .sdpa_cures import causal_in_half, short_query

__all__ = [
    "DEFECTS",
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

SDPA = ("torch.nn.functional", "scaled_dot_product_attention")
# Relative root mean square errors; a right half-precision kernel makes about 0.003, the defects 0.02 and up.
HALF_TOLERANCE = 0.01
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
    return _probe_softmax(torch.device(device_type), True).ok


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


def _probe_materialised(device: torch.device, quick: bool) -> ProbeResult:
    version = parse_version(torch.__version__)
    return _materialised(version < PREFILL_SINCE or _scores_formed(device), f"torch {version[0]}.{version[1]}")


def _probe_materialised_patched(device: torch.device, quick: bool) -> ProbeResult:
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


def _probe_softmax(
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


def _probe_scores(device: torch.device, quick: bool, attention: Attention = _plain_attention) -> ProbeResult:
    """As many scores as turn to noise, first and last rows against float32 on the CPU."""
    elements = attention_plan.LIMITS.score_elements
    needed = 3 * 2 * elements
    if quick and elements > 16 * MIB:
        return ProbeResult(True, 0.0, 0.0, f"needs {needed / 2**30:.0f} GiB: only in the full check", applicable=False)
    if needed > 0.6 * torch.mps.recommended_max_memory():
        return ProbeResult(True, 0.0, 0.0, f"needs {needed / 2**30:.0f} GiB: too much for this Mac", applicable=False)
    k_len = min(32760, max(256, elements >> 10))
    heads = 4
    rows = -(-elements // (heads * k_len))
    q, k, v = _random((1, heads, rows, 16), (1, heads, k_len, 16), (1, heads, k_len, 16), dtype=torch.bfloat16)
    ends = torch.cat((torch.arange(min(8, rows)), torch.arange(max(0, rows - 8), rows)))
    found = attention(q.to(device), k.to(device), v.to(device)).cpu()[:, :, ends]
    right = reference_attention(q[:, :, ends].float(), k.float(), v.float())
    error = _relative_error(found, right)
    # Softmax in half precision is another defect; noise is an error of the size of the result.
    return ProbeResult(error <= 0.2, error, 0.2, f"relative error at {heads * rows * k_len:,} scores")


def _probe_causal(device: torch.device, quick: bool) -> ProbeResult:
    length = 128 if quick else 1024
    errors = []
    for dtype in (torch.bfloat16, torch.float16):
        q, k, v = _random((1, 4, length, 64), (1, 4, length, 64), (1, 4, length, 64), dtype=dtype)
        found = F.scaled_dot_product_attention(q.to(device), k.to(device), v.to(device), is_causal=True)
        errors.append(_relative_error(found, reference_attention(q.float(), k.float(), v.float(), causal=True)))
    return ProbeResult(max(errors) <= HALF_TOLERANCE, max(errors), HALF_TOLERANCE, f"relative error at {length} tokens")


def _probe_short_query(device: torch.device, quick: bool) -> ProbeResult:
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


SHORT_QUERIES = tuple(
    (rows, key_heads, k_len) for rows in (1, 2, 5, 8) for key_heads in (2, 32) for k_len in (38, 257, 1024, 4097)
)

# What the probes of the model-level defects say when the patched attention is used instead of the device's own.
PATCHED_PROBES: dict[str, Callable[[torch.device, bool], ProbeResult]] = {
    "scores-2-31": functools.partial(_probe_scores, attention=_in_blocks),
    "softmax-half": functools.partial(_probe_softmax, ways=(_in_blocks,)),
    "sdpa-materialises": _probe_materialised_patched,
}

OVERRIDE = "transformer_options['optimized_attention_override'] of a model; the attention blocks of a VAE"

DEFECTS = (
    Defect(
        id="scores-2-31",
        title="Attention scores beyond 2^31 elements",
        symptom="Silent noise in long or large videos.",
        trigger="batch x heads x queries x keys in one score tensor at or beyond 2,147,483,648.",
        cause="32-bit element indices in MPSGraph's matrix product and softmax.",
        affected="Every torch version; every attention function of ComfyUI that forms scores, sub-quadratic included.",
        upstream=("ComfyUI#14837", "ComfyUI#14838", "pytorch#179592"),
        seam=OVERRIDE,
        advice="Leave attention on auto in Patch Model for MPS, or make the video shorter or smaller.",
        probe=_probe_scores,
        cure=None,
        reference="chunked_attention.reference_attention",
        kind="model",
    ),
    Defect(
        id="softmax-half",
        title="Half-precision softmax over many keys",
        symptom="Ghosting and smear that grow with length.",
        trigger="bfloat16 or float16 attention over more than about 3,000 keys.",
        cause="Weights and their sum are rounded to half precision.",
        affected="Attention that forms its scores in half precision.",
        upstream=("pytorch#190791",),
        seam=OVERRIDE,
        advice="Leave attention on auto in Patch Model for MPS; it computes scores in float32, block by block.",
        probe=_probe_softmax,
        cure=None,
        reference="chunked_attention.reference_attention",
        kind="model",
    ),
    Defect(
        id="sdpa-materialises",
        title="Attention forms all scores at once",
        symptom="`total bytes of NDArray > 2**32`, `Invalid buffer size`, or the process is killed.",
        trigger="scaled_dot_product_attention over thousands of tokens; other head dims than the prefill kernels'.",
        cause="No kernel without a score matrix before torch 2.13.",
        affected="torch before 2.13; since, head dims other than 32, 64, 72, 80, 96, 128 and 256.",
        upstream=("pytorch#179592",),
        seam=OVERRIDE,
        advice="Update torch to 2.13 or later; until then attention runs in blocks, at a lower speed.",
        probe=_probe_materialised,
        cure=None,
        reference="chunked_attention.reference_attention",
        kind="model",
    ),
    Defect(
        id="sdpa-causal-half",
        title="Causal attention sees the future",
        symptom="Wrong text or video from causal models, without an error.",
        trigger="scaled_dot_product_attention(is_causal=True) in bfloat16 or float16.",
        cause="The causal mask of the half-precision kernels.",
        affected="Reported in 2026 for current torch.",
        upstream=("pytorch#195910",),
        seam="torch.nn.functional.scaled_dot_product_attention",
        advice="Nothing to do while the patch is on.",
        probe=_probe_causal,
        cure=Cure((SDPA,), causal_in_half),
        reference="chunked_attention.reference_attention",
    ),
    Defect(
        id="sdpa-short-query",
        title="Attention with few queries reads out of bounds",
        symptom="Garbage or NaN that changes from run to run.",
        trigger="scaled_dot_product_attention with 1 to 8 queries.",
        cause="The vector kernels read keys beyond the last one and write sums into buffers half the size.",
        affected="torch 2.8 to 2.10.",
        upstream=("pytorch#174861", "pytorch#169222", "pytorch#163597"),
        seam="torch.nn.functional.scaled_dot_product_attention",
        advice="Update torch to 2.11 or later.",
        probe=_probe_short_query,
        cure=Cure((SDPA,), short_query),
        reference="chunked_attention.reference_attention",
    ),
)
