"""Patch Model and Patch VAE for MPS inside ComfyUI, on the CPU: choices, clones, core's attention functions, UniPC."""

import logging

import comfy.extra_samplers.uni_pc as uni_pc
import comfy.ldm.modules.attention as core
import comfy.ldm.modules.diffusionmodules.model as core_vae
import comfy.model_management
import comfy.sample
import comfy.sd
import comfy.utils
import pytest
import torch
from apple_silicon_video.mps_patches import attention, attention_plan, comfy_attention, comfy_unipc, comfy_vae
from apple_silicon_video.mps_patches.attention_plan import scaled
from apple_silicon_video.mps_patches.chunked_attention import reference_attention
from apple_silicon_video.mps_patches.comfy_attention import AttentionOverride, patch_model, read_call
from apple_silicon_video.mps_patches.comfy_vae import VAEAttention, patch_vae
from apple_silicon_video.mps_patches.unipc import DEFECTS as UNIPC
from apple_silicon_video.nodes.patches import NODES
from small_models import wan_weights, write_vae, write_wan_reference

from .wan import forward

KEY = "optimized_attention_override"


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("wan") / "wan.safetensors"
    write_wan_reference(path, wan_weights("wan2.1-t2v-1.3b", "Q5_K_M"))
    return comfy.sd.load_diffusion_model(str(path))


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    path = write_vae(tmp_path_factory.mktemp("vae") / "vae.safetensors")
    return comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(path)))


@pytest.fixture
def plans(monkeypatch):
    """The plans of all calls that the patches compute."""
    made = []

    def record(request):
        made.append(choose(request))
        return made[-1]

    choose = attention_plan.choose
    monkeypatch.setattr(attention_plan, "choose", record)
    return made


def override(patcher):
    return patcher.model_options["transformer_options"].get(KEY)


def run_node(name, *args, **kwargs):
    node = next(node for node in NODES if node.__name__ == name)
    assert {i.id for i in node.define_schema().inputs} >= {name.removeprefix("Patch").lower(), "attention"}
    return node.execute(*args, **kwargs).result[0]


def test_the_nodes_have_valid_schemas():
    assert [node.define_schema().node_id for node in NODES] == ["MPSPatchModel", "MPSPatchVAE"]
    for node in NODES:
        schema = node.GET_SCHEMA()
        assert schema.description
        assert schema.search_aliases
        assert all(i.tooltip for i in (*schema.inputs, *schema.outputs))


# ---- models


def test_auto_leaves_a_model_on_the_cpu_alone(model):
    assert run_node("PatchModel", model, attention="auto") is model
    assert run_node("PatchModel", model, attention="off", float32_softmax="on", flash_packages="on") is model
    assert patch_model(model) is model


def test_on_clones_and_off_takes_it_out_again(model):
    before = dict(model.model_options["transformer_options"])
    patched = run_node("PatchModel", model, attention="on", float32_softmax="off", flash_packages="auto")
    assert patched is not model
    assert patched.model is model.model
    assert override(patched) == AttentionOverride("on", "off", "auto")
    assert model.model_options["transformer_options"] == before
    assert patch_model(patched, {"attention": "on", "float32_softmax": "off"}) is patched
    again = patch_model(patched, {"attention": "on"})
    assert override(again) == AttentionOverride("on", "auto", "auto")
    assert KEY not in patch_model(again, {"attention": "off"}).model_options["transformer_options"]
    assert override(again) == AttentionOverride("on", "auto", "auto")
    assert override(again.clone()) is override(again)


def test_auto_patches_a_model_whose_device_is_mps(model):
    moved = model.clone()
    moved.load_device = torch.device("mps")
    assert override(patch_model(moved)) == AttentionOverride()
    assert override(moved) is None


def test_the_environment_goes_first(model, monkeypatch):
    monkeypatch.setenv("ASV_PATCH_SCORES_2_31", "off")
    assert patch_model(model, {"attention": "on"}) is model
    monkeypatch.setenv("ASV_PATCH_SCORES_2_31", "on")
    monkeypatch.setenv("ASV_PATCH_SOFTMAX_HALF", "off")
    assert override(patch_model(model)) == AttentionOverride("on", "off")


def test_an_override_that_was_there_is_kept_and_used(model):
    seen = []

    def other(function, *args, **kwargs):
        seen.append(function.__name__)
        return function(*args, **kwargs)

    theirs = model.clone()
    theirs.model_options["transformer_options"][KEY] = other
    patched = patch_model(patch_model(theirs, {"attention": "on"}), {"attention": "on", "float32_softmax": "on"})
    assert override(patched).previous is other
    options = patched.model_options["transformer_options"]
    q = torch.randn(1, 8, 32)
    core.optimized_attention(q, q, q, 4, transformer_options=options)
    assert len(seen) == 1
    with scaled(gate_elements=0):
        core.optimized_attention(q, q, q, 4, transformer_options=options)
    assert len(seen) == 1
    assert override(patch_model(patched, {"attention": "off"})) is other


def sample(patcher):
    generator = torch.Generator().manual_seed(0)
    latent = torch.zeros(1, 16, 2, 8, 8)
    conditioning = [[torch.randn(1, 20, 4096, generator=generator), {}]]
    noise = comfy.sample.prepare_noise(latent, 0)
    return comfy.sample.sample(patcher, noise, 2, 3.0, "euler", "simple", conditioning, conditioning, latent, seed=0)


def test_sampling_is_the_same_in_blocks(model, plans, caplog):
    """Self- and cross-attention of Wan, both through the override: same picture."""
    caplog.set_level(logging.INFO)
    comfy_attention._announced.clear()
    plain = sample(model)
    assert not plans
    patched = patch_model(model, {"attention": "on", "flash_packages": "off"})
    assert torch.equal(sample(patched), plain)
    assert {plan.method for plan in plans} == {"original"}
    plans.clear()
    with scaled(gate_elements=0, rows=8, keys=7, score_elements=200):
        blocks = sample(patched)
    methods = {plan.method for plan in plans}
    assert methods == {attention_plan.choose(example(blocks)).method}
    torch.testing.assert_close(blocks, plain, rtol=1e-3, atol=1e-4)
    assert sum("Attention on MPS" in record.getMessage() for record in caplog.records) == len(methods)


def example(latent):
    """A request like those of the small model: this torch, head dim 128, float32."""
    version = attention_plan.parse_version(torch.__version__)
    return attention_plan.AttentionRequest(
        1, 2, 32, 32, 128, torch.float32, version, limits=attention_plan.AttentionLimits(gate_elements=0)
    )


def test_chunks_inside_a_model(model, plans, monkeypatch):
    """As on a torch before 2.13."""
    plain = forward(model)
    monkeypatch.setattr(torch, "__version__", "2.10.0")
    monkeypatch.setattr(attention_plan, "MIN_ROWS", 4)
    attention.forget()
    generator = torch.Generator().manual_seed(7)
    latent = torch.randn(1, 16, 2, 8, 8, generator=generator)
    context = torch.randn(1, 20, 4096, generator=generator)
    options = {KEY: AttentionOverride("on")}
    with scaled(gate_elements=0, rows=8, keys=7, score_elements=50):
        found = model.model.diffusion_model(latent, torch.tensor([500.0]), context, transformer_options=options)
    attention.forget()
    assert {(plan.method, plan.rows, plan.keys) for plan in plans} == {("chunks", 4, 7), ("chunks", 4, 7)}
    torch.testing.assert_close(found, plain, rtol=1e-3, atol=1e-4)


FUNCTIONS = ("attention_basic", "attention_sub_quad", "attention_split", "attention_pytorch")


def inputs(layout, key_heads=4):
    generator = torch.Generator().manual_seed(3)

    def noise(length, heads):
        t = torch.randn(2, length, heads, 16, generator=generator)
        return t.transpose(1, 2) if layout["skip_reshape"] else t.flatten(2)

    return noise(33, 4), noise(50, key_heads), noise(50, key_heads)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("skip_reshape", [False, True])
@pytest.mark.parametrize("skip_output_reshape", [False, True])
@pytest.mark.parametrize("mask", [None, (33, 50), (2, 33, 50), (2, 1, 33, 50), (2, 4, 33, 50)])
def test_the_override_does_what_cores_function_does(name, skip_reshape, skip_output_reshape, mask, plans):
    layout = {"skip_reshape": skip_reshape, "skip_output_reshape": skip_output_reshape}
    function = getattr(core, name)
    bias = None if mask is None else torch.randn(mask, generator=torch.Generator().manual_seed(4))
    right = function(*inputs(layout), 4, mask=bias, **layout)
    options = {KEY: AttentionOverride("on")}
    with scaled(gate_elements=0, rows=7, keys=9):
        found = function(*inputs(layout), 4, mask=bias, **layout, transformer_options=options)
        positional = function(
            *inputs(layout), 4, bias, None, skip_reshape, skip_output_reshape, transformer_options=options
        )
    assert len(plans) == 2
    assert found.shape == right.shape
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)
    assert torch.equal(found, positional)


@pytest.mark.parametrize("skip_reshape", [False, True])
def test_scale_and_shared_keys(skip_reshape, plans):
    layout = {"skip_reshape": skip_reshape, "skip_output_reshape": True}
    q, k, v = inputs(layout, key_heads=2)
    options = {KEY: AttentionOverride("on")}
    with scaled(gate_elements=0):
        found = core.optimized_attention(
            q, k, v, 4, **layout, scale=0.5, enable_gqa=True, low_precision_attention=False, transformer_options=options
        )
    by_head = (q, k, v) if skip_reshape else (t.unflatten(-1, (-1, 16)).transpose(1, 2) for t in (q, k, v))
    torch.testing.assert_close(found, reference_attention(*by_head, scale=0.5), rtol=1e-4, atol=1e-5)
    assert len(plans) == 1


def test_calls_that_are_not_understood_go_to_the_function():
    q = torch.zeros(1, 4, 32)
    understood = read_call((q, q, q, 4), {})
    assert (understood.heads, understood.mask, understood.scale) == (4, None, None)
    assert read_call((), {"query": q, "key": q, "value": q, "heads": 4}) == understood
    assert read_call((q, q, q, 4), {"something_new": True}) is None
    assert read_call((q, q, q, 5), {}) is None
    assert read_call((q, q.double(), q, 4), {}) is None
    assert read_call((q, q[:, :, :24], q, 4), {}) is None
    assert read_call((q, q, q, 4), {"skip_reshape": True}) is None
    assert read_call((q, q, q, 4), {"mask": torch.zeros(4)}) is None
    function = AttentionOverride("on")
    with scaled(gate_elements=0):
        assert function(lambda *args, **kwargs: kwargs, q, q, q, 4, something_new=1) == {"something_new": 1}


def test_training_is_left_alone():
    with torch.inference_mode(False), torch.enable_grad(), scaled(gate_elements=0):
        q = torch.randn(1, 4, 32, requires_grad=True)
        options = {KEY: AttentionOverride("on")}
        assert AttentionOverride("on")(lambda *args, **kwargs: "core's", q, q, q, 4) == "core's"
        core.optimized_attention(q, q, q, 4, transformer_options=options).sum().backward()
        assert q.grad is not None


# ---- VAEs


def test_auto_leaves_a_vae_on_the_cpu_alone(vae):
    assert run_node("PatchVAE", vae, attention="auto") is vae
    assert run_node("PatchVAE", vae, attention="off", float32_softmax="on") is vae


def attention_of(vae):
    return {k: v for k, v in vae.patcher.object_patches.items() if k.endswith("optimized_attention")}


def test_a_patched_vae_is_a_copy_and_gives_the_same_frames(vae, plans):
    pixels = torch.rand(5, 64, 48, 3, generator=torch.Generator().manual_seed(0))
    latent = vae.encode(pixels)
    frames = vae.decode(latent)
    blocks = comfy_vae.attention_blocks(vae.first_stage_model)
    assert sorted(blocks) == ["decoder.middle.1", "encoder.middle.1"]
    patched = run_node("PatchVAE", vae, attention="on", float32_softmax="auto")
    assert patched is not vae
    assert patched.first_stage_model is vae.first_stage_model
    assert len(attention_of(patched)) == 2
    assert not attention_of(vae)
    with scaled(gate_elements=0, rows=7):
        torch.testing.assert_close(patched.encode(pixels), latent, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(patched.decode(latent), frames, rtol=1e-3, atol=1e-4)
        computed = len(plans)
        assert computed >= 3
        # The same weights through the VAE that was not patched: core's function is back in its place.
        torch.testing.assert_close(vae.decode(latent), frames, rtol=0, atol=0)
        assert len(plans) == computed
        assert patch_vae(patched, {"attention": "on"}) is patched
        assert not attention_of(patch_vae(patched, {"attention": "off"}))
        again = patch_vae(patched, {"attention": "on", "float32_softmax": "on"})
        again.decode(latent)
        for attention in attention_of(again).values():
            assert attention.original is core_vae.vae_attention()


def test_auto_patches_a_vae_whose_device_is_mps(vae):
    before = vae.patcher.load_device
    vae.patcher.load_device = torch.device("mps")
    try:
        assert {a.attention for a in attention_of(patch_vae(vae)).values()} == {"auto"}
    finally:
        vae.patcher.load_device = before


@pytest.mark.parametrize("shape", [(2, 24, 9, 8), (1, 384, 30), (3, 16, 2, 5, 6)])
def test_vae_attention_is_cores(shape, plans):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(shape, generator=generator) for _ in range(3))
    original = core_vae.normal_attention
    with scaled(gate_elements=0, rows=16, keys=20):
        found = VAEAttention(original, "on")(q, k, v)
    assert len(plans) == 1
    torch.testing.assert_close(found, original(q, k, v), rtol=1e-4, atol=1e-5)


def test_vae_attention_passes_on_what_is_small_or_off():
    q = torch.randn(1, 8, 4, 4)
    assert VAEAttention(lambda q, k, v: "core's", "on")(q, q, q) == "core's"
    with scaled(gate_elements=0):
        assert VAEAttention(lambda q, k, v: "core's")(q, q, q) == "core's"
        assert VAEAttention(lambda q, k, v: "core's", "on")(q, q, q[:, :4]) == "core's"


# ---- UniPC


def test_uni_pc_of_this_core_is_in_float32_and_its_step_is_the_one_we_know():
    """Where the probe finds float64 here, the entry goes; the step itself must still be ours to a rounding."""
    coarse, float32 = (defect.probe(torch.device("cpu"), True) for defect in UNIPC)
    assert coarse.ok and coarse.applicable
    assert float32.applicable
    assert not float32.ok, float32.detail
    assert 0.05 < float32.error < 5


def test_the_cure_gives_uni_pc_its_weights(monkeypatch):
    monkeypatch.setattr(uni_pc.UniPC, "multistep_uni_pc_bh_update", comfy_unipc.update)
    for defect in UNIPC:
        for quick in (True, False):
            result = defect.probe(torch.device("cpu"), quick)
            assert result.ok
            assert result.error < 1e-5


def test_sampling_with_the_cure_goes_where_float64_goes(monkeypatch):
    """uni_pc over a schedule without cancellation: core's float32 step and ours agree."""
    sigmas = torch.tensor([1.0, 0.7, 0.45, 0.28, 0.15, 0.07, 0.02, 0.0])
    noise = torch.randn(1, 4, 2, 6, 6, generator=torch.Generator().manual_seed(0))

    def model(x, sigma, **kwargs):
        return torch.tanh(x) * 0.5 + 0.1 * sigma.view(-1, 1, 1, 1, 1)

    for sampler in (uni_pc.sample_unipc, uni_pc.sample_unipc_bh2):
        right = sampler(model, noise, sigmas.clone(), {}, disable=True)
        with monkeypatch.context() as patch:
            patch.setattr(uni_pc.UniPC, "multistep_uni_pc_bh_update", comfy_unipc.update)
            found = sampler(model, noise, sigmas.clone(), {}, disable=True)
        torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-3)
