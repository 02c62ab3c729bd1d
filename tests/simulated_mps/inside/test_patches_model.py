"""Attention, UniPC and VAE patches on the simulated device: the defect without, the right result with.

ComfyUI's own attention, sampler and VAE run unchanged on it; the tree is $COMFYUI_DIR, or the newest one pinned.
"""

import sys
from contextlib import contextmanager, suppress

import core_tree
import pytest
import simulated_mps as sim
import torch
import torch.nn.functional as F

sys.path.insert(0, core_tree.folder())

import comfy.extra_samplers.uni_pc as uni_pc
import comfy.ldm.modules.attention as core
import comfy.ldm.modules.diffusionmodules.model as core_vae
import comfy.ldm.wan.vae as wan_vae
import comfy.ldm.wan.vae2_2 as wan_vae_2_2
import comfy.model_management
from apple_silicon_video.mps_patches import attention, attention_plan, comfy_vae, gate, install
from apple_silicon_video.mps_patches.attention_plan import plan_attention, scaled
from apple_silicon_video.mps_patches.chunked_attention import attend, reference_attention
from apple_silicon_video.mps_patches.comfy_attention import AttentionOverride, Call
from apple_silicon_video.mps_patches.comfy_unipc import flow_sigmas
from apple_silicon_video.mps_patches.comfy_vae import VAEAttention

MPS = torch.device("mps")
DEFECTS = install.DEFECTS
TABLE = tuple(map(int, sim.installed()["torch"].split(".")[:2]))
PREFILL = TABLE >= (2, 13)
MIB = 1 << 20
# What bfloat16 makes of a right result, and what float32 does.
ROUNDING = {torch.bfloat16: 4e-3, torch.float16: 1e-3, torch.float32: 1e-5}


@pytest.fixture(autouse=True)
def clean():
    attention.forget()
    yield
    install.remove()
    sim.disable_all()
    sim.dry(0)
    attention.forget()


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.inference_mode():
        yield


def tensors(*shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def error(found, right):
    """Relative root mean square error; infinite where something is not a number."""
    found, right = found.cpu().double(), right.cpu().double()
    value = ((found - right).square().mean() / right.square().mean()).sqrt().item()
    return value if value == value else float("inf")


def by_core(q, k, v, **options):
    """Core's default attention on a Mac, as a model calls it; q, k, v [B, H, L, D] on the CPU."""
    q, k, v = (t.to(MPS) for t in (q, k, v))
    return core.attention_sub_quad(q, k, v, q.shape[1], skip_reshape=True, skip_output_reshape=True, **options)


OVERRIDE = {"transformer_options": {"optimized_attention_override": AttentionOverride()}}


# ---- scores beyond 2^31


def test_scores_are_noise_without_and_right_with_the_override():
    q, k, v = tensors((1, 4, 600, 64), (1, 4, 500, 64), (1, 4, 500, 64))
    right = reference_attention(q, k, v)
    with sim.rule("scores-2-31", elements=1 << 20), scaled(score_elements=1 << 20, gate_elements=1 << 19):
        assert error(by_core(q, k, v), right) > 0.5
        assert error(by_core(q, k, v, **OVERRIDE), right) < ROUNDING[torch.float32]
        defect = DEFECTS["scores-2-31"]
        assert not defect.probe(MPS, True).ok
        assert attention.PATCHED_PROBES["scores-2-31"](MPS, True).ok
    assert error(by_core(q, k, v), right) < ROUNDING[torch.float32]
    with scaled(score_elements=1 << 20):
        assert DEFECTS["scores-2-31"].probe(MPS, True).ok


def test_the_quick_probe_does_not_try_the_real_size():
    result = DEFECTS["scores-2-31"].probe(MPS, True)
    assert (result.ok, result.applicable) == (True, False)
    sim.limits(recommended_bytes=8 << 30)
    result = install.run_probe(DEFECTS["scores-2-31"], MPS, False)
    assert (result.ok, result.applicable) == (True, False)
    assert "50% of the 8.0 GiB that are free" in result.detail


@pytest.mark.parametrize("mask", [None, (1, 1, 1, 500), (1, 4, 600, 500)])
@pytest.mark.parametrize("head_dim", [64, 40, 384])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_way_stays_below_the_limits(mask, head_dim, dtype):
    """Whatever torch this is, no product, softmax or kernel sees a size that is spoilt."""
    q, k, v = tensors((1, 4, 600, head_dim), (1, 4, 500, head_dim), (1, 4, 500, head_dim), dtype=dtype)
    keep = None if mask is None else torch.rand(mask, generator=torch.Generator().manual_seed(1)) > 0.3
    right = reference_attention(q.float(), k.float(), v.float(), keep)
    on_device = None if keep is None else keep.to(MPS)
    with (
        sim.rule("scores-2-31", elements=1 << 18),
        sim.rule("softmax-half", keys=100),
        sim.rule("matmul-large-k", k=400),
        scaled(score_elements=1 << 18, gate_elements=1 << 16, softmax_keys=100, rows=128, keys=399),
    ):
        assert not attention.half_softmax_is_exact(MPS)
        found = by_core(q, k, v, mask=on_device, **OVERRIDE)
    assert found.dtype == dtype
    assert error(found, right) < ROUNDING[dtype]


# ---- precision of the softmax


def test_half_softmax_goes_through_float32_only_where_the_probe_fails():
    q, k, v = tensors((1, 1, 64, 64), (1, 1, 16000, 64), (1, 1, 16000, 64), dtype=torch.bfloat16)
    right = reference_attention(q.float(), k.float(), v.float())
    exact = DEFECTS["softmax-half"].probe(MPS, True)
    assert exact.ok
    assert attention.half_softmax_is_exact(MPS)
    attention.forget()
    with sim.rule("softmax-half"):
        assert error(F.scaled_dot_product_attention(q.to(MPS), k.to(MPS), v.to(MPS)), right) > 0.01
        assert error(by_core(q, k, v, **OVERRIDE), right) < ROUNDING[torch.bfloat16]
        assert not DEFECTS["softmax-half"].probe(MPS, True).ok
        assert not DEFECTS["softmax-half"].probe(MPS, False).ok
        assert attention.PATCHED_PROBES["softmax-half"](MPS, True).ok
        off = {"transformer_options": {"optimized_attention_override": AttentionOverride(float32_softmax="off")}}
        sdpa = core.attention_pytorch
        args = (q.to(MPS), k.to(MPS), v.to(MPS), 1)
        assert error(sdpa(*args, skip_reshape=True, skip_output_reshape=True, **off), right) > 0.01


# ---- memory


def peak_of(call):
    """(result, bytes over what was there before, the result included)."""
    torch.mps.empty_cache()
    sim.reset()
    before = sim.stats().live
    result = call()
    return result, sim.stats().peak - before


def free_memory(monkeypatch, size):
    """What core believes to be free."""

    def answer(dev=None, torch_free_too=False):
        return (size, size) if torch_free_too else size

    monkeypatch.setattr(comfy.model_management, "get_free_memory", answer)


def test_sdpa_materialises_before_2_13():
    assert DEFECTS["sdpa-materialises"].probe(MPS, True).ok == PREFILL
    assert (attention.attention_version(MPS) >= (2, 13)) == PREFILL
    attention.forget()
    with sim.rule("sdpa-materialises"):
        assert not DEFECTS["sdpa-materialises"].probe(MPS, True).ok
        assert attention.PATCHED_PROBES["sdpa-materialises"](MPS, True).ok
        assert attention.attention_version(MPS) < (2, 13)


@pytest.mark.parametrize("budget", [4 * MIB, 32 * MIB])
def test_chunks_peak_as_planned(budget):
    shape = (1, 8, 2000, 1500, 64)
    q, k, v = (t.to(MPS) for t in tensors((1, 8, 2000, 64), (1, 8, 1500, 64), (1, 8, 1500, 64), dtype=torch.bfloat16))
    limits = attention_plan.AttentionLimits(gate_elements=0)
    plan = plan_attention(*shape, torch.bfloat16, (2, 12), budget, limits=limits)
    assert plan.method == "chunks"
    assert plan.block_bytes <= budget
    found, peak = peak_of(lambda: attend(q, k, v, plan))
    assert peak <= plan.block_bytes + found.nbytes + MIB // 4
    assert peak >= 0.6 * plan.block_bytes
    _, materialised = peak_of(lambda: core.attention_basic(q, k, v, 8, skip_reshape=True))
    assert materialised >= 2 * 8 * 2000 * 1500 * 2
    with sim.rule("sdpa-materialises"):
        _, materialised = peak_of(lambda: F.scaled_dot_product_attention(q, k, v))
    assert materialised >= 8 * 2000 * 1500 * 6


@pytest.mark.parametrize(("method", "head_dim"), [("sdpa", 64), ("sdpa-padded", 40), ("sdpa-float32", 64)])
def test_the_ways_to_the_prefill_kernel_peak_as_planned(method, head_dim):
    limits = attention_plan.AttentionLimits(gate_elements=0, softmax_keys=100)
    plan = plan_attention(
        1, 8, 1000, 1000, head_dim, torch.bfloat16, attention.attention_version(MPS), 2 * MIB,
        half_softmax_exact=method != "sdpa-float32", limits=limits,
    )  # fmt: skip
    assert plan.method == (method if PREFILL else "chunks")
    assert plan.heads < 8
    q, k, v = (t.to(MPS) for t in tensors(*[(1, 8, 1000, head_dim)] * 3, dtype=torch.bfloat16))
    found, peak = peak_of(lambda: attend(q, k, v, plan))
    assert peak <= plan.block_bytes + found.nbytes + MIB // 4
    assert ("sdpa.prefill" in sim.stats().ops) == PREFILL
    assert "sdpa.materialised" not in sim.stats().ops


def test_wan_14b_layer_at_832x480_in_dry_mode(monkeypatch):
    """32,760 tokens, 40 heads: one call through core with and without the override."""
    sim.mac(64)
    free_memory(monkeypatch, 20 << 30)
    shape = (1, 32760, 5120)
    attention.attention_version(MPS), attention.half_softmax_is_exact(MPS)
    sim.dry(1 << 18)
    q, k, v = (torch.empty(shape, dtype=torch.bfloat16, device=MPS) for _ in range(3))
    found, peak = peak_of(lambda: core.attention_sub_quad(q, k, v, 40, **OVERRIDE))
    assert found.shape == shape
    assert not {violation.rule for violation in sim.violations()} & {"scores-2-31", "matmul-large-k", "buffer-limit"}
    assert peak <= found.nbytes + (attention_plan.BUDGET // 8 if PREFILL else attention_plan.BUDGET) + MIB
    sim.reset()
    with suppress(RuntimeError):
        core.attention_sub_quad(q, k, v, 40)
    assert "scores-2-31" in {violation.rule for violation in sim.violations()}
    sim.limits()


# ---- the two cures of SDPA


@contextmanager
def patched(**choices):
    yield install.apply(MPS, {name.replace("_", "-"): choice for name, choice in choices.items()})
    install.remove()


@pytest.mark.parametrize("length", [50, 300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_causal_attention_does_not_see_the_future(length, dtype, monkeypatch):
    from apple_silicon_video.mps_patches import sdpa_cures

    monkeypatch.setattr(sdpa_cures, "LARGEST_MASK", 10_000)  # 300 tokens go through blocks
    q, k, v = tensors((2, 4, length, 64), (2, 2, length, 64), (2, 2, length, 64), dtype=dtype)
    right = reference_attention(q.float(), k.float(), v.float(), causal=True)

    def causal():
        return F.scaled_dot_product_attention(q.to(MPS), k.to(MPS), v.to(MPS), is_causal=True, enable_gqa=True)

    with sim.rule("sdpa-causal-half"):
        assert error(causal(), right) > 0.01
        with patched() as report:
            assert report.entries["sdpa-causal-half"].state == "patched"
            assert error(causal(), right) < ROUNDING[dtype]
            mask = torch.ones(length, length, dtype=torch.bool).tril()
            given = F.scaled_dot_product_attention(q.to(MPS), k.to(MPS), v.to(MPS), mask.to(MPS), enable_gqa=True)
            assert error(given, right) < ROUNDING[dtype]
        assert error(causal(), right) > 0.01
    with patched() as report:
        assert report.entries["sdpa-causal-half"].state == "not needed"


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("mask", [None, "per query", "per key", "bias"])
def test_short_queries_take_the_general_kernel(rows, mask):
    q, k, v = tensors((1, 8, rows, 64), (1, 2, 70, 64), (1, 2, 70, 64), dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(2)
    given = {
        None: None,
        "per query": torch.rand(1, 1, rows, 70, generator=generator) > 0.3,
        "per key": torch.rand(1, 1, 1, 70, generator=generator) > 0.3,
        "bias": torch.randn(1, 8, rows, 70, generator=generator).bfloat16(),
    }[mask]
    right = reference_attention(q.float(), k.float(), v.float(), given)

    def short():
        m = None if given is None else given.to(MPS)
        return F.scaled_dot_product_attention(q.to(MPS), k.to(MPS), v.to(MPS), m, enable_gqa=True)

    has_vector_kernel = TABLE >= (2, 8)
    with sim.rule("sdpa-short-query"):
        assert (error(short(), right) > 0.05) == has_vector_kernel
        with patched() as report:
            assert report.entries["sdpa-short-query"].state == ("patched" if has_vector_kernel else "not needed")
            assert short().shape == right.shape
            assert error(short(), right) < ROUNDING[torch.bfloat16]
    with patched() as report:
        assert report.entries["sdpa-short-query"].state == "not needed"
        assert error(short(), right) < ROUNDING[torch.bfloat16]


# ---- UniPC


def sample_unipc(device, steps=20, shift=8.0):
    """The end of a run of uni_pc over Wan's schedule, with a model whose outputs differ from step to step."""
    sigmas = torch.tensor([*flow_sigmas(steps, shift)[:-1], 0.0])
    noise = tensors((1, 4, 2, 6, 6))[0]

    def model(x, sigma, **_):
        return 0.6 * torch.tanh(x) + 0.2 * torch.sin(1000 * sigma).view(-1, 1, 1, 1, 1)

    return uni_pc.sample_unipc(model, noise.to(device), sigmas.to(device), {}, disable=True).cpu()


def exact_unipc(monkeypatch):
    from apple_silicon_video.mps_patches import comfy_unipc

    with monkeypatch.context() as patch:
        patch.setattr(uni_pc.UniPC, "multistep_uni_pc_bh_update", comfy_unipc.update)
        return sample_unipc("cpu")


def test_uni_pc_with_a_coarse_expm1(monkeypatch):
    right = exact_unipc(monkeypatch)

    def bare():
        """Core's error; torch 2.6 has no linear solver on MPS, and uni_pc stops with an exception."""
        try:
            return error(sample_unipc(MPS), right)
        except NotImplementedError:
            return float("inf")

    assert (bare() == float("inf")) == (TABLE < (2, 7))
    with sim.rule("expm1-coarse"):
        assert bare() > 0.05
        with patched() as report:
            assert report.entries["expm1-coarse"].state == "patched"
            assert report.entries["unipc-float32"].state == "patched"
            assert error(sample_unipc(MPS), right) < 1e-4
        assert bare() > 0.05
    with patched() as report:
        assert report.entries["expm1-coarse"].state == ("not needed" if TABLE >= (2, 7) else "patched")


def test_uni_pc_of_a_core_with_float64_is_left_alone(monkeypatch):
    """A core that computes the coefficients on the CPU in float64, as later ones do."""
    from apple_silicon_video.mps_patches import comfy_unipc

    step = comfy_unipc.update
    theirs = type(step)(step.__code__, {**step.__globals__, "__name__": uni_pc.__name__}, "theirs", step.__defaults__)
    monkeypatch.setattr(uni_pc.UniPC, "multistep_uni_pc_bh_update", theirs)
    for rule in (None, "expm1-coarse"):
        if rule:
            sim.enable(rule)
        with patched() as report:
            states = {name: report.entries[name].state for name in ("expm1-coarse", "unipc-float32")}
            assert set(states.values()) == {"not needed"}
            assert uni_pc.UniPC.multistep_uni_pc_bh_update is theirs


def test_the_step_does_not_leave_the_device():
    """One copy of a few numbers a step; nothing in float64 on the device, nothing on the CPU in its stead."""
    with patched(unipc_float32="on"):
        sim.reset()
        sample_unipc(MPS, steps=8)
        stats = sim.stats()
    assert stats.float64_attempts == 0
    assert not stats.fell_back
    assert stats.device_to_host < 2000


# ---- VAE


def small_vae(module, seed=0):
    """A Wan VAE of small width on the CPU, and its input: 5 frames at 256x256, and a latent of that size."""
    torch.manual_seed(seed)
    common = {"dim_mult": [1, 2, 4, 4], "num_res_blocks": 1, "attn_scales": [], "dropout": 0.0}
    if module is wan_vae:
        model = module.WanVAE(dim=4, z_dim=4, temperal_downsample=[False, True, True], **common)
        latent = (1, 4, 2, 32, 32)
    else:
        model = module.WanVAE(dim=4, dec_dim=4, z_dim=4, temperal_downsample=[False, True, True], **common)
        latent = (1, 4, 2, 16, 16)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    return model.eval(), torch.rand(1, 3, 5, 256, 256) * 2 - 1, torch.randn(latent)


@pytest.mark.parametrize("module", [wan_vae, wan_vae_2_2])
def test_wan_vae_encodes_and_decodes_right_with_the_pad_rule(module):
    model, pixels, latent = small_vae(module)
    encoded, decoded = model.encode(pixels), model.decode(latent)
    model = model.to(MPS)

    def errors():
        return error(model.encode(pixels.to(MPS)), encoded), error(model.decode(latent.to(MPS)), decoded)

    assert max(errors()) < 1e-4
    # Wan 2.1 pads frames by concatenation. AvgDown3D of 2.2 calls F.pad on [B, C, T, H, W], with frames to add from
    # its second level on, where a side is a quarter: 1024x1024 reaches the true threshold, 256x256 a scaled one.
    inner = 65536 if module is wan_vae else 4096
    with sim.rule("pad-rank-5", inner=inner), gate.scaled(pad_rank_5=inner):
        assert (errors()[0] > 0.01) == (module is wan_vae_2_2)
        with patched(pad_rank_5="on"):
            assert max(errors()) < 1e-4


def test_vae_attention_in_blocks_at_the_limits():
    """One wide head over all positions of each frame."""
    q, k, v = tensors((2, 48, 20, 24), (2, 48, 20, 24), (2, 48, 20, 24))
    right = core_vae.normal_attention(q, k, v)
    with sim.rule("scores-2-31", elements=1 << 18), scaled(score_elements=1 << 18, gate_elements=1 << 16):
        on_device = [t.to(MPS) for t in (q, k, v)]
        assert error(core_vae.normal_attention(*on_device), right) > 0.5
        assert error(VAEAttention(core_vae.normal_attention)(*on_device), right) < 1e-5


REAL_VAES = {
    "2.1": (wan_vae, {"dim": 96, "z_dim": 16}, (1, 16, 3, 90, 160)),
    "2.2": (wan_vae_2_2, {"dim": 160, "dec_dim": 256, "z_dim": 48}, (1, 48, 3, 45, 80)),
}
FORBIDDEN = {"scores-2-31", "int-max-dims", "buffer-limit", "cat-2-31", "index-select-2-31", "bmm-2-32"}


@pytest.mark.parametrize("direction", ["encode", "decode"])
@pytest.mark.parametrize("name", REAL_VAES)
def test_real_vae_at_1280x720_in_dry_mode(name, direction, monkeypatch):
    """9 frames in bfloat16 on a 16 GB Mac's limits: attention within its budget, every tensor within the limits."""
    module, options, latent = REAL_VAES[name]
    free_memory(monkeypatch, 4 << 30)
    with torch.device("meta"):
        model = module.WanVAE(
            **options, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[],
            temperal_downsample=[False, True, True], dropout=0.0,
        ).bfloat16()  # fmt: skip
    attention.attention_version(MPS), attention.half_softmax_is_exact(MPS)
    sim.mac(16)
    sim.dry(1 << 16)
    try:
        model = model.to_empty(device=MPS)
        size = latent if direction == "decode" else (1, 3, 9, 720, 1280)
        x = torch.empty(size, dtype=torch.bfloat16, device=MPS)
        plain, peak = peak_of(lambda: getattr(model, direction)(x))
        found = {violation.rule for violation in sim.violations()}
        assert not found & FORBIDDEN
        for block in comfy_vae.attention_blocks(model):
            blocks = model.get_submodule(block)
            blocks.optimized_attention = VAEAttention(blocks.optimized_attention)
        patched, peak_patched = peak_of(lambda: getattr(model, direction)(x))
        stats = sim.stats()
        found = {violation.rule for violation in sim.violations()}
        assert patched.shape == plain.shape
        assert not found & FORBIDDEN
        largest = max(count.largest for count in stats.ops.values())
        assert largest < 1 << 31
        assert peak_patched <= peak
        print(f"{name} {direction}: {peak / 2**30:.2f} GiB, in blocks {peak_patched / 2**30:.2f} GiB, {largest:,}")
    finally:
        sim.dry(0)
        sim.limits()


def test_an_override_is_made_of_what_the_call_says():
    """A model's own layout, [B, L, H*D], through the override on the device."""
    q, k, v = tensors((2, 90, 96), (2, 70, 96), (2, 70, 96))
    right = core.attention_basic(q, k, v, 4)
    with scaled(gate_elements=0):
        found = AttentionOverride().compute(Call(q.to(MPS), k.to(MPS), v.to(MPS), 4))
    assert error(found, right) < 1e-5
