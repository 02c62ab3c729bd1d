"""Wan with fewer activations against core's own blocks on the CPU: bits, other people's patches, decoding once."""

import logging

import comfy.ldm.wan.model as core
import comfy.ldm.wan.model_animate
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sample
import comfy.sd
import pytest
import torch
from apple_silicon_video.memory import comfy_activations, wan_activations
from apple_silicon_video.memory.comfy_activations import activation_budget, reduce_activations
from apple_silicon_video.memory.wan_activations import ActivationBudget, Modulation
from apple_silicon_video.mps_patches.attention_plan import scaled
from apple_silicon_video.mps_patches.comfy_attention import AttentionOverride
from apple_silicon_video.nodes.reduce_memory import NODES
from apple_silicon_video.quantization import comfy_ops
from small_models import VARIANTS, decoded_state_dict, wan_lora, wan_shape, wan_weights

from .wan import apply_lora, pair

T2V = "wan2.1-t2v-1.3b"
OVERRIDE = "optimized_attention_override"
LEAST = 1  # bytes: chunks of 64 tokens
WHOLE = 1 << 50


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.inference_mode():
        yield


def load(variant=T2V, dtype=torch.float32):
    weights = decoded_state_dict(wan_weights(variant, "F16"), dtype)
    return comfy.sd.load_diffusion_model_state_dict(weights, model_options={"dtype": dtype})


@pytest.fixture(scope="module")
def model():
    with torch.inference_mode():
        return load()


def noise(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs_of(shape, dtype, batch):
    inputs = {}
    if shape.image_embedding:
        inputs["clip_fea"] = noise(batch, shape.first_last_tokens or 257, 1280, dtype=dtype, seed=1)
    if shape.vace_layers:
        context = noise(batch, 1, shape.vace_in_dim, 3, 16, 16, dtype=dtype, seed=2)
        inputs |= {"vace_context": context, "vace_strength": [0.8]}
    if shape.reference_channels:
        inputs["reference_latent"] = noise(batch, shape.reference_channels, 16, 16, dtype=dtype, seed=3)
    if shape.camera_channels:
        inputs["camera_conditions"] = noise(batch, shape.camera_channels, 3, 128, 128, dtype=dtype, seed=4)
    return inputs


def step(patcher, variant=T2V, dtype=torch.float32, batch=1, times=None, **options):
    """One forward pass over 192 tokens, as a sampler makes it."""
    comfy.model_management.load_models_gpu([patcher], force_full_load=True)
    shape = wan_shape(variant)
    latent, text = noise(batch, shape.in_dim, 3, 16, 16, dtype=dtype), noise(batch, 32, 4096, dtype=dtype, seed=9)
    time = torch.full((batch,), 500.0) if times is None else times
    own = {**patcher.model_options["transformer_options"], **options}
    run = patcher.model.diffusion_model
    return run(latent, time, text, transformer_options=own, **inputs_of(shape, dtype, batch))


@pytest.fixture
def attention_rows(monkeypatch):
    """Queries of each call of core's attention by a Wan block."""
    seen = []
    attention = core.optimized_attention

    def spy(q, *args, **kwargs):
        seen.append(tuple(q.shape[:2]))
        return attention(q, *args, **kwargs)

    monkeypatch.setattr(core, "optimized_attention", spy)
    return seen


# ---- equal to core


EVERY = [(name, torch.float32) for name in VARIANTS]
KINDS = [(name, torch.bfloat16) for name in (T2V, "wan2.1-i2v-14b", "wan2.1-vace-14b", "wan2.2-ti2v-5b")]


@pytest.mark.parametrize("variant, dtype", EVERY + KINDS)
def test_every_variant_equals_core_bit_for_bit(variant, dtype, attention_rows):
    patcher = load(variant, dtype)
    right = step(patcher, variant, dtype, batch=2)
    for budget in (WHOLE, LEAST):
        reduced = reduce_activations(patcher, "on", budget)
        assert len(reduced.object_patches) == len(patcher.object_patches) + 3 + bool(wan_shape(variant).vace_layers)
        attention_rows.clear()
        assert torch.equal(step(reduced, variant, dtype, batch=2), right)
        # self-attention has one batch entry at a time, cross-attention both
        lengths = {rows for batch, rows in attention_rows if batch == 1 and rows < 257}
        assert max(lengths) >= 192 if budget == WHOLE else max(lengths) <= 128
    assert all(comfy_activations._verified.values())


def test_a_time_step_for_each_frame_and_each_token(model):
    """TI2V's: one entry for each latent frame of 64 tokens, or for each of the 192 tokens."""
    for times in (torch.tensor([[0.0, 500.0, 700.0]]), torch.linspace(1, 900, 192)[None]):
        right = step(model, times=times)
        assert (right - step(model)).std() > 0.01
        for budget in (WHOLE, LEAST):
            assert torch.equal(step(reduce_activations(model, "on", budget), times=times), right)


def test_modulation_of_runs_that_do_not_divide_the_tokens():
    """S2V's: core repeats each entry once more than fits and cuts the end."""
    table, embedding = noise(1, 6, 8), noise(2, 7, 6, 8, seed=1)
    for tokens in (20, 21, 27):
        x = torch.empty(2, tokens, 8)
        for index, right in enumerate((table.unsqueeze(0) + embedding).unbind(2)):
            right = core.repeat_e(right, x)
            modulation = Modulation(table, embedding, tokens)
            for start in range(0, tokens, 6):
                rows = slice(start, min(tokens, start + 6))
                assert torch.equal(modulation.part(index, rows), right[:, rows])
                assert torch.equal(modulation.part(index, rows, slice(1, 2)), right[1:, rows])


def built(name, device="cpu", **options):
    """A model of one of core's other classes with random weights, in a ModelPatcher."""
    owner = comfy.ldm.wan.model_animate if name == "AnimateWanModel" else core
    model = getattr(owner, name)(
        dim=256, ffn_dim=512, num_heads=2, num_layers=2, in_dim=16, text_dim=64, dtype=torch.float32,
        operations=comfy.ops.disable_weight_init, device=device, **options,
    )  # fmt: skip
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.05)
    holder = torch.nn.Module()
    holder.diffusion_model = model
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(holder, cpu, cpu)


def blocks_patched(patcher):
    return [name for name in reduce_activations(patcher, "on").object_patches if ".blocks." in name]


def test_speech_to_video_equals_core():
    patcher = built("WanModel_S2V", audio_inject_layers=[0])
    inputs = (noise(1, 16, 3, 16, 16), torch.tensor([500.0]), noise(1, 32, 64))
    more = {"reference_latent": noise(1, 16, 1, 16, 16, seed=5), "reference_motion": noise(1, 16, 5, 16, 16, seed=6)}
    right = patcher.model.diffusion_model(*inputs, **more)
    reduced = reduce_activations(patcher, "on", LEAST)
    assert len(blocks_patched(patcher)) == 2
    reduced.patch_model(load_weights=False)
    assert torch.equal(patcher.model.diffusion_model(*inputs, **more), right)


def test_animate_is_patched_and_humo_is_not():
    assert len(blocks_patched(built("AnimateWanModel", "meta", model_type="i2v"))) == 2
    assert blocks_patched(built("HumoWanModel", "meta")) == []


# ---- choices


def test_auto_on_and_off(model):
    assert reduce_activations(model) is model
    assert reduce_activations(model, "off") is model
    moved = model.clone()
    moved.load_device = torch.device("mps")
    assert reduce_activations(moved).object_patches.keys() > model.object_patches.keys()
    reduced = reduce_activations(model, "on")
    assert reduced.model is model.model and activation_budget(model) is None
    assert reduce_activations(reduced, "on") is reduced
    other = reduce_activations(reduced, "on", LEAST)
    assert activation_budget(other).temporary_bytes == LEAST
    assert activation_budget(reduced).temporary_bytes == wan_activations.DEFAULT_BYTES
    plain = reduce_activations(reduced, "off")
    assert plain.object_patches == model.object_patches and activation_budget(plain) is None
    right = step(model)
    for patcher in (reduced, plain, reduced, model):
        assert torch.equal(step(patcher), right)


def test_other_models_come_back_as_they_are():
    holder = torch.nn.Module()
    holder.diffusion_model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    patcher = comfy.model_patcher.ModelPatcher(holder, torch.device("mps"), torch.device("cpu"))
    assert reduce_activations(patcher, "on") is patcher


def test_the_node(model):
    (node,) = NODES
    schema = node.GET_SCHEMA()
    assert schema.node_id == "MPSReduceMemory"
    assert node.execute(model, activations="auto").result[0] is model
    reduced = node.execute(model, activations="on", chunk_gib=0.5).result[0]
    assert activation_budget(reduced).temporary_bytes == 512 << 20
    assert node.execute(reduced, activations="off").result[0].object_patches == model.object_patches


def test_chunks_follow_the_budget_while_sampling(model, attention_rows):
    reduced = reduce_activations(model, "on", WHOLE)
    right = step(reduced)
    few = len(attention_rows)
    activation_budget(reduced.clone()).temporary_bytes = LEAST
    assert torch.equal(step(reduced), right)
    many = len(attention_rows) - few
    assert many == 3 * few
    step(reduced, **{comfy_activations.BUDGET: ActivationBudget(WHOLE)})
    assert len(attention_rows) == 2 * few + many


def test_through_cores_sampler_with_a_lora(model):
    """cfg with both prompts in one batch."""
    latent = torch.zeros(1, 16, 3, 16, 16)
    positive, negative = ([[noise(1, 20, 4096, seed=seed), {}]] for seed in (1, 2))

    def sample(patcher):
        first = comfy.sample.prepare_noise(latent, 0)
        return comfy.sample.sample(
            patcher, first, 2, 5.0, "euler", "simple", positive, negative, latent, seed=0, disable_pbar=True
        )

    lora = wan_lora(T2V, "lora")
    right = sample(apply_lora(model, lora))
    assert torch.equal(sample(reduce_activations(apply_lora(model, lora), "on", LEAST)), right)
    assert torch.equal(sample(apply_lora(reduce_activations(model, "on", LEAST), lora)), right)
    assert not torch.equal(sample(reduce_activations(model, "on", LEAST)), right)


# ---- quantised weights


@pytest.mark.parametrize("with_lora", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_each_weight_is_decoded_once(tmp_path, monkeypatch, batch, with_lora):
    quantised, _ = pair(tmp_path)
    if with_lora:
        quantised = apply_lora(quantised, wan_lora(T2V, "lora"))
    decoded = []
    decode = comfy_ops.QuantizedOps.Linear.decoded_weight

    def spy(self, *args):
        decoded.append(self)
        return decode(self, *args)

    monkeypatch.setattr(comfy_ops.QuantizedOps.Linear, "decoded_weight", spy)
    right = step(quantised, batch=batch)
    before = len(decoded)
    reduced = reduce_activations(quantised, "on", LEAST)
    step(reduced, batch=batch)
    decoded.clear()
    assert torch.equal(step(reduced, batch=batch), right)
    assert len(decoded) == before == len(set(decoded))


def test_interrupt_within_a_block(tmp_path, monkeypatch):
    reduced = reduce_activations(pair(tmp_path)[0], "on", LEAST)
    step(reduced)
    chunks = []
    addcmul = torch.addcmul

    def spy(*args, **kwargs):
        chunks.append(1)
        if len(chunks) == 10:
            comfy.model_management.interrupt_current_processing()
        return addcmul(*args, **kwargs)

    monkeypatch.setattr(wan_activations.torch, "addcmul", spy)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        step(reduced)
    assert 10 <= len(chunks) <= 11
    monkeypatch.undo()
    step(reduced)


def test_a_check_between_chunks(model):
    """Keys, queries, cross-attention and feed-forward of two blocks in three chunks each."""
    calls = []
    reduced = reduce_activations(model, "on", LEAST)
    step(reduced)

    def check():
        calls.append(1)
        if len(calls) == 30:
            raise InterruptedError

    assert step(reduced, **{comfy_activations.CHECK: lambda: calls.append(1)}).shape == (1, 16, 3, 16, 16)
    assert len(calls) == 2 * 4 * 3
    calls.clear()
    calls.extend([1] * 20)
    with pytest.raises(InterruptedError):
        step(reduced, **{comfy_activations.CHECK: check})
    assert len(calls) == 30


# ---- other people's patches


def test_attention_patches_see_everything(model, attention_rows):
    seen = []

    def attn1(args):
        seen.append({name: tuple(args[name].shape) for name in ("x", "q", "k")})
        return args["x"] + 0.1 * args["q"].flatten(2)

    def attn2(args):
        seen.append({"x": tuple(args["x"].shape)})
        kept.append((args["x"], args["x"].clone()))
        return args["x"]

    kept = []
    patches = {"patches": {"attn1_patch": [attn1], "attn2_patch": [attn2]}}
    right = step(model, batch=2, **patches)
    expected, wrong = seen[:], step(model, batch=2)
    seen.clear()
    kept.clear()
    attention_rows.clear()
    assert torch.equal(step(reduce_activations(model, "on", LEAST), batch=2, **patches), right)
    assert not torch.equal(right, wrong)
    assert seen == expected and seen[0]["q"] == (2, 192, 2, 128)
    assert all(torch.equal(now, then) for now, then in kept)
    assert (2, 192) in attention_rows and (2, 64) in attention_rows


def test_a_replaced_block_and_its_input(model):
    inputs = []

    def replace(args, more):
        inputs.append((args["img"], args["img"].clone()))
        out = more["original_block"](args)
        return {"img": out["img"] * 1.01}

    replaced = {"patches_replace": {"dit": {("double_block", 1): replace}}}
    right = step(model, **replaced)
    assert torch.equal(step(reduce_activations(model, "on", LEAST), **replaced), right)
    assert all(torch.equal(now, then) for now, then in inputs)


def test_another_attention_override_gets_whole_calls(model):
    seen = []

    def other(function, q, *args, **kwargs):
        seen.append(tuple(q.shape[:2]))
        return function(q, *args, **kwargs)

    reduced = reduce_activations(model, "on", LEAST)
    right = step(model, batch=2)
    for override in (other, AttentionOverride(previous=other)):
        seen.clear()
        assert torch.equal(step(reduced, batch=2, **{OVERRIDE: override}), right)
        assert seen == [(2, 192)] * 4


def test_the_packs_own_override_gets_rows(model):
    with scaled(gate_elements=0):
        own = {OVERRIDE: AttentionOverride(attention="on")}
        right = step(model, batch=2, **own)
        found = step(reduce_activations(model, "on", LEAST), batch=2, **own)
    assert (found - right).norm() < 1e-5 * right.norm()


class Scaled:
    """A forward method that somebody put on a layer: core's, times a factor."""

    def __init__(self, module, factor=1.1):
        self.module, self.factor, self.shapes = module, factor, []

    def __call__(self, x, *args, **kwargs):
        self.shapes.append(tuple(x.shape[:2]))
        return type(self.module).forward(self.module, x, *args, **kwargs) * self.factor


@pytest.mark.parametrize("layer", ["self_attn", "cross_attn", "ffn", "norm3", "cross_attn.q", ""])
def test_a_patched_layer_keeps_its_patch(model, layer):
    block = model.model.diffusion_model.blocks[1]
    name = ".".join(part for part in ("diffusion_model.blocks.1", layer, "forward") if part)
    patch = Scaled(block.get_submodule(layer))
    theirs = model.clone()
    theirs.add_object_patch(name, patch)
    right = step(theirs)
    patch.shapes.clear()
    later = reduce_activations(model, "on", LEAST)
    later.add_object_patch(name, patch)
    for reduced in (reduce_activations(theirs, "on", LEAST), later):
        assert torch.equal(step(reduced), right)
        assert layer not in ("self_attn", "cross_attn", "ffn", "") or set(patch.shapes) == {(1, 192)}
    assert not torch.equal(step(model), right)


def test_hooks_run(model):
    calls = []
    attention = model.model.diffusion_model.blocks[0].self_attn
    reduced = reduce_activations(model, "on", LEAST)
    right = step(model)
    step(reduced)  # the check on first use calls core's attention too
    handle = attention.register_forward_hook(lambda module, args, out: calls.append(out.shape))
    try:
        assert torch.equal(step(reduced), right)
    finally:
        handle.remove()
    assert calls == [(1, 192, 256)]


# ---- the check on first use, and what is left to core


@pytest.mark.parametrize("variant", [T2V, "wan2.1-vace-14b"])
def test_a_block_that_differs_is_left_to_core(monkeypatch, caplog, variant):
    monkeypatch.setattr(comfy_activations, "_verified", {})
    patcher = load(variant)
    right = step(patcher, variant)

    def wrong(block, x, modulation, host, out):
        return forward(block, x, modulation, host, out).mul_(1.01)

    forward = wan_activations._feed_forward
    monkeypatch.setattr(wan_activations, "_feed_forward", wrong)
    reduced = reduce_activations(patcher, "on", LEAST)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(step(reduced, variant), right)
        assert torch.equal(step(reduced, variant), right)
    kinds = 2 if wan_shape(variant).vace_layers else 1
    assert [message.split(":")[0] for message in caplog.messages] == ["Fewer activations"] * kinds
    assert not any(comfy_activations._verified.values())


def test_gradients_go_through_cores_own(attention_rows):
    with torch.inference_mode(False), torch.enable_grad():
        patcher = load()
        step(reduce_activations(patcher, "on", LEAST))
    assert set(attention_rows) == {(1, 192)}
