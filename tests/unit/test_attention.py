"""Attention in blocks against float64, the plans and their limits, and the flash-attention packages (as stand-ins)."""

import sys
import types
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from apple_silicon_video.mps_patches import attention, attention_defects, flash_packages
from apple_silicon_video.mps_patches.attention import patched_attention, plan_attention
from apple_silicon_video.mps_patches.attention_plan import AttentionLimits, parse_version, scaled
from apple_silicon_video.mps_patches.chunked_attention import attend, mask_to_rank_4, reference_attention
from apple_silicon_video.mps_patches.registry import DEFECTS
from apple_silicon_video.mps_patches.sdpa_cures import causal_in_half, short_query

OLD, NEW = (2, 12), (2, 13)
SMALL = AttentionLimits(score_elements=4096, rows=32, keys=64, gate_elements=0)
GATED = AttentionLimits(gate_elements=0)
# Rounding of the result to the dtype, and of float32 sums over some hundred keys.
RELATIVE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def tensors(batch, heads, q_len, k_len, head_dim, dtype, key_heads=None, value_dim=None, seed=0):
    """q, k, v as ComfyUI lays them out: views of [B, L, H*D]."""
    generator = torch.Generator().manual_seed(seed)

    def by_length(length, heads, dim):
        flat = torch.randn(batch, length, heads * dim, generator=generator).to(dtype)
        return flat.view(batch, length, heads, dim).transpose(1, 2)

    key_heads = key_heads or heads
    return (
        by_length(q_len, heads, head_dim),
        by_length(k_len, key_heads, head_dim),
        by_length(k_len, key_heads, value_dim or head_dim),
    )


def exact(q, k, v, mask=None, scale=None, causal=False):
    mask = mask if mask is None or mask.dtype == torch.bool else mask.double()
    return reference_attention(q.double(), k.double(), v.double(), mask, scale, causal)


def assert_close(found, right, dtype):
    assert found.dtype == dtype
    assert not found.isnan().any()
    assert (found.double() - right).abs().max() <= RELATIVE[dtype] * max(1.0, right.abs().max().item())


def masks(batch, heads, q_len, k_len, dtype):
    generator = torch.Generator().manual_seed(1)
    keep = torch.rand(batch, heads, q_len, k_len, generator=generator) > 0.4
    keep[..., 0] = True
    bias = torch.randn(batch, heads, q_len, k_len, generator=generator).to(dtype)
    return {
        "none": None,
        "bool": keep,
        "bool per key": keep[:, :1, :1],
        "bool per head": keep[:1, :, :, :],
        "bool [Lq, Lk]": mask_to_rank_4(keep[0, 0]),
        "bool [B, 1, Lk]": mask_to_rank_4(keep[:, 0, :1]),
        "additive": bias,
        "additive per key": bias[:1, :1, :1],
        "additive float32": bias[:, :1].float(),
        "additive with -inf": torch.where(keep, bias.float(), -torch.inf),
        "column": bias[..., :1],
    }


SHAPES = [(1, 1, 1, 1, 8), (1, 2, 65, 65, 16), (2, 3, 33, 257, 24), (3, 4, 127, 7, 40), (1, 1, 130, 131, 384)]


@pytest.mark.parametrize("dtype", RELATIVE)
@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_are_float32_attention_rounded_once(shape, dtype):
    q, k, v = tensors(*shape, dtype)
    for limits, budget in product((SMALL, replace(SMALL, keys=1000), GATED), (1, 1 << 16, 1 << 29)):
        plan = plan_attention(*shape, dtype, OLD, budget, limits=limits)
        assert plan.method == "chunks"
        assert_close(attend(q, k, v, plan), exact(q, k, v), dtype)


@pytest.mark.parametrize("dtype", RELATIVE)
@pytest.mark.parametrize("keys", [64, 1000])
def test_masks(dtype, keys):
    shape = (2, 3, 65, 129, 16)
    q, k, v = tensors(*shape, dtype)
    plan = plan_attention(*shape, dtype, OLD, limits=replace(SMALL, keys=keys), mask="other")
    for name, mask in masks(*shape[:4], dtype).items():
        found, right = attend(q, k, v, plan, mask), exact(q, k, v, mask)
        assert (found.double() - right).abs().max() <= RELATIVE[dtype] * 2, name


def test_a_row_that_sees_no_key_is_zero():
    q, k, v = tensors(1, 2, 40, 100, 16, torch.float32)
    mask = torch.ones(1, 1, 40, 100, dtype=torch.bool)
    mask[:, :, 3] = False
    mask[:, :, 7, :64] = False  # nothing in the first block of keys, something in the second
    plan = plan_attention(1, 2, 40, 100, 16, torch.float32, OLD, limits=SMALL)
    assert plan.keys < 64
    found = attend(q, k, v, plan, mask)
    assert (found[:, :, 3] == 0).all()
    assert_close(found, exact(q, k, v, mask), torch.float32)
    assert_close(found, F.scaled_dot_product_attention(q, k, v, attn_mask=mask).double(), torch.float32)


@pytest.mark.parametrize("keys", [64, 1000])
def test_causal_scale_shared_keys_and_narrow_values(keys):
    q, k, v = tensors(2, 6, 70, 70, 16, torch.float32, key_heads=2, value_dim=24)
    for causal, scale, budget in product((False, True), (None, 0.5), (1, 1 << 29)):
        plan = plan_attention(
            2, 6, 70, 70, 16, torch.float32, OLD, budget, value_dim=24, limits=replace(SMALL, keys=keys)
        )
        found = attend(q, k, v, plan, scale=scale, causal=causal)
        assert_close(found, exact(q, k, v, None, scale, causal), torch.float32)


@pytest.mark.parametrize(("version", "method"), [(OLD, "chunks"), (NEW, "sdpa-padded"), (NEW, "sdpa")])
def test_groups_of_heads_that_begin_inside_shared_keys(version, method):
    head_dim = 64 if method == "sdpa" else 16
    q, k, v = tensors(1, 6, 40, 50, head_dim, torch.float32, key_heads=2)
    plan = plan_attention(1, 6, 40, 50, head_dim, torch.float32, version, limits=GATED)
    assert plan.method == method
    for heads in (2, 4, 5):
        assert_close(attend(q, k, v, replace(plan, heads=heads)), exact(q, k, v), torch.float32)


def test_large_scores_do_not_overflow():
    q, k, v = tensors(1, 1, 64, 200, 16, torch.float32)
    plan = plan_attention(1, 1, 64, 200, 16, torch.float32, OLD, limits=SMALL)
    assert_close(attend(q * 100, k * 100, v, plan), exact(q * 100, k * 100, v), torch.float32)


@pytest.mark.parametrize(
    ("head_dim", "method"), [(64, "sdpa"), (40, "sdpa-padded"), (160, "sdpa-padded"), (384, "chunks")]
)
@pytest.mark.parametrize("mask", ["none", "bool", "additive"])
def test_with_prefill_kernels(head_dim, method, mask):
    shape = (2, 4, 70, 90, head_dim)
    q, k, v = tensors(*shape, torch.float32)
    given = masks(*shape[:4], torch.float32)[mask]
    kind = {"none": "none", "bool": "bool", "additive": "same"}[mask]
    plan = plan_attention(*shape, torch.float32, NEW, 1 << 17, mask=kind, limits=GATED)
    assert plan.method == method
    assert method != "sdpa-padded" or plan.heads < 4
    assert_close(attend(q, k, v, plan, given), exact(q, k, v, given), torch.float32)


def test_half_precision_that_failed_its_probe_goes_through_float32(monkeypatch):
    shape = (1, 4, 50, 80, 40)
    q, k, v = tensors(*shape, torch.bfloat16, key_heads=2)
    limits = replace(GATED, softmax_keys=64)
    plan = plan_attention(*shape, torch.bfloat16, NEW, 1 << 17, half_softmax_exact=False, limits=limits)
    assert (plan.method, plan.head_dim, plan.heads) == ("sdpa-float32", 64, 1)
    seen, sdpa = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **o: (seen.append(a[0].dtype), sdpa(*a, **o))[1])
    mask = torch.randn(1, 1, 50, 80).bfloat16()
    assert_close(attend(q, k, v, plan, mask), exact(q, k, v, mask), torch.bfloat16)
    assert seen == [torch.float32] * 4
    short = plan_attention(1, 4, 50, 64, 40, torch.bfloat16, NEW, half_softmax_exact=False, limits=limits)
    assert short.method == "sdpa-padded"


# batch, heads, queries, keys, head dim: Wan 14B, 1.3B and 5B at 832x480 and 1280x720 over 81 and 121 frames, their
# cross-attention, a VAE's wide head, windows, odd lengths.
REAL = [
    (1, 40, 32760, 32760, 128),
    (2, 12, 32760, 32760, 128),
    (1, 40, 75600, 75600, 128),
    (1, 24, 27280, 27280, 128),
    (1, 40, 32760, 512, 128),
    (1, 40, 75600, 257, 128),
    (2, 1, 14400, 14400, 384),
    (4, 1, 57600, 57600, 1024),
    (4096, 8, 64, 64, 64),
    (1, 16, 100003, 100003, 72),
    (1, 1, 50000, 50000, 40),
]


@pytest.mark.parametrize("shape", REAL)
@pytest.mark.parametrize("budget", [64 << 20, 512 << 20])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_plans_stay_within_the_limits(shape, budget, dtype):
    plan = plan_attention(*shape, dtype, OLD, budget)
    assert plan.method == "chunks"
    assert plan.rows <= 2048
    assert plan.keys <= 32766
    assert plan.block_scores < 1 << 31
    assert plan.rows >= 64 or plan.rows == shape[2]
    # One head's float32 keys and values alone are beyond 64 MiB for the largest shapes.
    assert plan.block_bytes <= max(budget, 4 * (2 * shape[3] * shape[4] + 4 * 64 * shape[4] + 2 * 64 * 300))
    assert f"{plan.rows:,} rows" in plan.reason


def test_blocks_use_the_budget():
    """A block that is much smaller than it may be costs time."""
    assert plan_attention(1, 40, 32760, 32760, 128, torch.bfloat16, OLD).block_scores > 30e6
    windows = plan_attention(4096, 8, 64, 64, 64, torch.bfloat16, OLD)
    assert windows.batches > 500


CHOICES = [
    # scores below the gate, in a precision that does not suffer
    ((1, 12, 1560, 1560, 128, torch.bfloat16, OLD), {}, "original", "small enough"),
    ((1, 1, 8000, 4000, 64, torch.float32, OLD), {"half_softmax_exact": False}, "original", "small enough"),
    ((1, 1, 8000, 4000, 64, torch.float16, OLD), {"half_softmax_exact": False}, "chunks", "loses precision"),
    ((1, 1, 8000, 3000, 64, torch.float16, OLD), {"half_softmax_exact": False}, "original", "small enough"),
    ((1, 12, 9000, 9000, 128, torch.bfloat16, OLD), {}, "chunks", "GiB in float32"),
    ((1, 40, 32760, 32760, 128, torch.bfloat16, OLD), {}, "chunks", "turn to noise"),
    ((1, 40, 32760, 32760, 128, torch.bfloat16, NEW), {}, "sdpa", "prefill kernel for head dim 128"),
    ((1, 40, 32760, 32760, 128, torch.bfloat16, NEW), {"mask": "bool"}, "sdpa", "prefill"),
    ((1, 40, 32760, 32760, 128, torch.bfloat16, NEW), {"mask": "other"}, "chunks", "noise"),
    ((1, 40, 32760, 32760, 128, torch.bfloat16, NEW), {"value_dim": 64}, "chunks", "noise"),
    ((1, 40, 32760, 32760, 128, torch.bfloat16, NEW), {"half_softmax_exact": False}, "sdpa-float32", "in float32"),
    ((1, 40, 32760, 32760, 100, torch.bfloat16, NEW), {}, "sdpa-padded", "zeros up to 128"),
    ((1, 40, 8, 10_000_000, 128, torch.bfloat16, NEW), {}, "chunks", "noise"),
    ((1, 40, 32760, 32760, 128, torch.bfloat16, NEW), {"packages": ("mtlflashattn",)}, "mtlflashattn", "installed"),
    ((1, 40, 32760, 32760, 128, torch.bfloat16, NEW), {"packages": ("x",), "mask": "bool"}, "sdpa", "prefill"),
]


@pytest.mark.parametrize(("arguments", "options", "method", "words"), CHOICES)
def test_each_choice_has_its_reason(arguments, options, method, words):
    plan = plan_attention(*arguments, **options)
    assert plan.method == method
    assert words in plan.reason


def test_versions_and_scaled_limits():
    assert [parse_version(v) for v in ("2.13.0", "2.6.0+cpu", "2.15.0.dev20261101")] == [(2, 13), (2, 6), (2, 15)]
    with scaled(gate_elements=10, rows=4):
        assert plan_attention(1, 1, 16, 16, 8, torch.float32, "2.6.0").rows == 4
    assert plan_attention(1, 1, 16, 16, 8, torch.float32, "2.6.0").method == "original"


# ---- flash-attention packages


@pytest.fixture
def packages(monkeypatch):
    """Installs stand-ins by module name; nothing else counts as installed."""
    flash_packages.forget()
    for package in flash_packages.PACKAGES:
        monkeypatch.delitem(sys.modules, package.module, raising=False)

    def install(module, **functions):
        stand_in = types.ModuleType(module)
        stand_in.__spec__ = types.SimpleNamespace()
        stand_in.__dict__.update(functions)
        monkeypatch.setitem(sys.modules, module, stand_in)

    yield install
    flash_packages.forget()


def mtl(calls, wrong=0.0, error=None):
    def flash_attn_func(q, k, v, softmax_scale=None):
        calls.append("mtl")
        if error:
            raise error
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, scale=softmax_scale).transpose(1, 2) * (1 + wrong)

    return flash_attn_func


def mfa(calls, wrong=0.0):
    def flash_attention(query, key, value, scale=None):
        calls.append("mfa")
        return F.scaled_dot_product_attention(query, key, value, scale=scale) * (1 + wrong)

    return flash_attention


def run(dtype=torch.bfloat16, q_len=90, **options):
    q, k, v = tensors(1, 4, q_len, 100, 64, dtype, key_heads=2)
    with scaled(gate_elements=0):
        found, plan = patched_attention(q, k, v, scale=0.1, half_softmax_exact=True, **options)
    assert_close(found, exact(q, k, v, scale=0.1), dtype)
    return plan.method


@pytest.mark.parametrize("dtype", RELATIVE)
def test_packages_are_used_by_priority(packages, dtype):
    calls = []
    packages("mps_flash_attn", flash_attention=mfa(calls))
    assert run(dtype) == "mps-flash-attn"
    flash_packages.forget()
    packages("metal_flash_attn", flash_attn_func=mtl(calls))
    assert run(dtype) == "mtlflashattn"
    assert calls == ["mfa", "mtl"]
    assert run(dtype, packages=()) == "sdpa"


def test_a_wrong_package_stays_off_and_the_next_takes_over(packages, caplog):
    calls = []
    packages("metal_flash_attn", flash_attn_func=mtl(calls, wrong=0.05))
    packages("mps_flash_attn", flash_attention=mfa(calls))
    assert run() == run() == "mps-flash-attn"
    assert calls == ["mtl", "mfa", "mfa"]
    assert [record.getMessage() for record in caplog.records] == [
        f"mtlflashattn is not used for attention in this session: {flash_packages.switched_off()['mtlflashattn']}."
    ]
    assert "relative error 5" in caplog.text


def test_packages_that_raise_or_give_the_wrong_shape(packages, caplog):
    calls = []
    packages("metal_flash_attn", flash_attn_func=mtl(calls, error=NotImplementedError("no Metal")))
    packages("mps_flash_attn", flash_attention=lambda q, k, v, scale: q.float())
    assert run() == run() == "sdpa"
    assert calls == ["mtl"]
    assert set(flash_packages.switched_off()) == {"mtlflashattn", "mps-flash-attn"}
    assert "NotImplementedError: no Metal" in caplog.text
    assert len(caplog.records) == 2


def test_packages_are_checked_at_every_shape_in_use(packages):
    calls = []

    def wrong_when_long(query, key, value, scale=None):
        return mfa(calls, wrong=0.1 if query.shape[2] > 100 else 0.0)(query, key, value, scale)

    packages("mps_flash_attn", flash_attention=wrong_when_long)
    assert run() == run() == "mps-flash-attn"
    assert run(q_len=101) == run() == "sdpa"
    assert len(calls) == 3


def test_a_package_with_nan_is_off(packages):
    packages("mps_flash_attn", flash_attention=lambda q, k, v, scale: q * float("nan"))
    assert run() == "sdpa"
    assert "nan" in flash_packages.switched_off()["mps-flash-attn"]


# ---- the process-wide cures leave other devices alone


@pytest.mark.parametrize("cure", [causal_in_half, short_query])
def test_cures_of_sdpa_pass_on_what_is_not_on_mps(cure):
    seen = []

    def original(*args, **kwargs):
        seen.append((args, kwargs))
        return "result"

    q = torch.zeros(1, 1, 4, 8, dtype=torch.bfloat16)
    assert cure(original)(q, q, q, is_causal=True, scale=0.3, enable_gqa=True) == "result"
    args, kwargs = seen[0]
    assert all(tensor is q for tensor in args[:3])
    assert args[3:] == (None, 0.0, True)
    assert kwargs == {"scale": 0.3, "enable_gqa": True}


def test_defects_are_in_the_table():
    assert {defect.id for defect in attention_defects.DEFECTS} <= set(DEFECTS)
    models = {defect.id for defect in attention_defects.DEFECTS if defect.kind == "model"}
    assert set(attention.PATCHED_PROBES) <= models
