"""Attention calls of core that no model's override sees: Wan Animate's face adapter, PixArt, encoders.

Core's own modules run unchanged; how many scores are too many is scaled down.
"""

import sys
from contextlib import contextmanager

import core_tree
import pytest
import simulated_mps as sim
import torch

sys.path.insert(0, core_tree.folder())

import comfy.ldm.modules.attention as core
import comfy.ldm.pixart.blocks as pixart
import comfy.ldm.wan.model_animate as animate
import comfy.ops
from apple_silicon_video.mps_patches import attention, attention_defects, install, probing
from apple_silicon_video.mps_patches.attention_plan import scaled
from apple_silicon_video.mps_patches.chunked_attention import reference_attention
from apple_silicon_video.mps_patches.comfy_attention import AttentionOverride

MPS = torch.device("mps")
TABLE = tuple(map(int, sim.installed()["torch"].split(".")[:2]))
ELEMENTS = 1 << 17
OPERATIONS = {"operations": comfy.ops.disable_weight_init, "dtype": torch.float32, "device": "cpu"}
ORIGINALS = {name: getattr(core, name) for name in attention_defects.CORE_FUNCTIONS}


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """Scores from 2^17 elements on count as too many, and as too large to be tried out at start."""
    monkeypatch.setattr(probing, "SCALED", 0)
    attention.forget()
    with scaled(score_elements=ELEMENTS, gate_elements=ELEMENTS // 2), torch.inference_mode():
        yield
        install.remove()
        attention.forget()
    assert {name: getattr(core, name) for name in ORIGINALS} == ORIGINALS
    assert animate.optimized_attention is ORIGINALS["optimized_attention"]


@contextmanager
def only(*names):
    """The process-wide cures of these defects by their probes, all others off."""
    yield install.apply(MPS, {name: "auto" if name in names else "off" for name in install.DEFECTS})


def seeded(module):
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return module.eval()


def face_adapter():
    """One block over 2 latent frames of 1,100 tokens, with 80 motion tokens each (4 in the real model)."""
    block = seeded(animate.FaceBlock(64, 2, **OPERATIONS))
    return block, (probing.noise((1, 2 * 1100, 64)), probing.noise((1, 2, 80, 64), seed=1))


def pixart_self_attention():
    return seeded(pixart.AttentionKVCompress(32, num_heads=2, qkv_bias=True, **OPERATIONS)), (
        probing.noise((1, 400, 32)),
    )


def pixart_cross_attention():
    block = seeded(pixart.MultiHeadCrossAttention(32, 2, **OPERATIONS))
    return block, (probing.noise((1, 800, 32)), probing.noise((1, 300, 32), seed=1))


MODULES = [face_adapter, pixart_self_attention, pixart_cross_attention]


def on_device(module, inputs):
    return module.to(MPS)(*(value.to(MPS) for value in inputs)).cpu()


def error(make):
    module, inputs = make()
    right = module(*inputs)
    return probing.relative_error(on_device(module, inputs), right)


@pytest.mark.parametrize("make", MODULES)
def test_too_many_scores_are_checked_and_cured(make):
    with sim.rule("scores-2-31", elements=ELEMENTS):
        assert error(make) > 0.1
        with only("scores-2-31") as report:
            assert report.watching == ("scores-2-31",)
            assert error(make) < 1e-4, "the call that was checked"
            entry = install.status().entries["scores-2-31"]
            assert entry.state == "patched" and "attention's rows" in entry.detail
            assert error(make) < 1e-4
        install.remove()
        assert error(make) > 0.1


@pytest.mark.parametrize("make", MODULES)
def test_on_a_right_device_core_stays_as_it_is(make):
    module, inputs = make()
    plain = on_device(module, inputs)
    with only("scores-2-31") as report:
        assert report.watching == ("scores-2-31",)
        assert torch.equal(on_device(module, inputs), plain)
        assert install.status().entries["scores-2-31"].probe.ok
        assert core.optimized_attention is ORIGINALS["optimized_attention"], "the gate of what was checked is left"
        assert torch.equal(on_device(module, inputs), plain)


def test_a_model_s_own_choice_goes_first():
    """Calls with a model's options are its override's, or, without one, nobody's."""
    q, k, v = (probing.noise((1, 400, 64), seed=seed).to(MPS) for seed in range(3))
    options = {"cond_or_uncond": [0]}
    overridden = {**options, "optimized_attention_override": AttentionOverride()}
    with sim.rule("scores-2-31", elements=ELEMENTS), only("scores-2-31"):
        right = core.optimized_attention(q, k, v, 2)
        bare = core.optimized_attention(q, k, v, 2, transformer_options=options)
        by_model = core.optimized_attention(q, k, v, 2, transformer_options=overridden)
    assert probing.relative_error(by_model, right) < 1e-5 and probing.relative_error(bare, right) > 0.1


def test_small_calls_and_calls_inside_others_are_left_alone():
    q, k, v = (probing.noise((1, 100, 64), seed=seed).to(MPS) for seed in range(3))
    with only("scores-2-31"):
        core.optimized_attention(q, k, v, 2)
        core.optimized_attention(*(t.cpu().repeat(1, 5, 1) for t in (q, k, v)), 2)
        many = [t.repeat(1, 5, 1) for t in (q, k, v)]
        core.optimized_attention(*many, 2, _inside_attn_wrapper=True)
        assert install.status().watching == ("scores-2-31",)
        core.optimized_attention(*many, 2)
        assert install.status().entries["scores-2-31"].probe.ok


def half_attention():
    """Core's SDPA over 1,000 bfloat16 tokens, which is a million scores: error, and the kernels that ran."""
    q, k, v = (probing.noise((1, 1000, 64), torch.bfloat16, seed) for seed in range(3))
    right = reference_attention(*(t[None].float() for t in (q, k, v)))[0]
    on_mps = [t.to(MPS) for t in (q, k, v)]
    core.attention_pytorch(*on_mps, 1)  # finds out about the device
    sim.reset()
    found = core.attention_pytorch(*on_mps, 1).cpu().float()
    return ((found - right).norm() / right.norm()).item(), sim.stats().ops


@pytest.mark.parametrize(("defect", "rule"), [("sdpa-materialises", {}), ("softmax-half", {"keys": 100})])
def test_other_defects_of_attention_are_cured_from_the_start(defect, rule):
    healthy = TABLE >= (2, 13) or defect != "sdpa-materialises"
    with only(defect) as report:
        assert report.entries[defect].state == ("not needed" if healthy else "patched")
        assert (core.attention_pytorch is ORIGINALS["attention_pytorch"]) is healthy
    install.remove()
    with sim.rule(defect, **rule), scaled(softmax_keys=100, gate_elements=ELEMENTS // 2):
        attention.forget()
        error, ops = half_attention()
        assert error > 0.004 if defect == "softmax-half" else "sdpa.materialised" in ops
        with only(defect) as report:
            assert report.entries[defect].state == "patched"
            error, ops = half_attention()
            assert error < 0.003 and "sdpa.materialised" not in ops
