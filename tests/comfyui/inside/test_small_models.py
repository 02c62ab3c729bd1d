"""The small models as core alone sees them: recognised, complete, well-behaved, and worth looking at."""

import logging

import comfy.lora
import comfy.lora_convert
import comfy.model_detection
import comfy.ops
import comfy.sample
import comfy.sd
import comfy.text_encoders.t5
import comfy.text_encoders.wan
import comfy.utils
import pytest
import torch
from small_models import (
    ADAPTERS,
    ENCODERS,
    VARIANTS,
    decoded_state_dict,
    encoder_config,
    encoder_lora,
    encoder_weights,
    published_lora,
    transformers_name,
    wan_lora,
    wan_shape,
    wan_weights,
    write_encoder_reference,
    write_vae,
    write_wan_reference,
)

T2V = "wan2.1-t2v-1.3b"


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Core's CLIP of the one-layer UMT5, through core's own loader."""
    shape = ENCODERS["umt5"]
    path = tmp_path_factory.mktemp("umt5") / "umt5.safetensors"
    write_encoder_reference(path, shape, encoder_weights(shape, "Q5_K_M"))
    options = {"umt5xxl_model_config": encoder_config(shape)}
    return comfy.sd.load_clip([str(path)], clip_type=comfy.sd.CLIPType.WAN, model_options=options)


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    path = write_vae(tmp_path_factory.mktemp("vae") / "vae.safetensors")
    return comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(path)))


def conditioning(clip, text):
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_is_recognised_complete_and_well_behaved(tmp_path, variant):
    weights = wan_weights(variant, "Q5_K_M")
    path = write_wan_reference(tmp_path / "wan.safetensors", weights)
    state_dict = comfy.utils.load_torch_file(str(path))
    config = comfy.model_detection.model_config_from_unet(state_dict, "")
    assert type(config).__name__ == VARIANTS[variant].comfy_class

    model = comfy.sd.load_diffusion_model(str(path)).model.diffusion_model
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == {
        weight.name: weight.shape for weight in weights
    }
    shape = wan_shape(variant)
    generator = torch.Generator().manual_seed(0)

    def noise(*size):
        return torch.randn(*size, generator=generator)

    inputs = {}
    if shape.image_embedding:
        inputs["clip_fea"] = noise(1, shape.first_last_tokens or 257, 1280)
    if shape.vace_layers:
        inputs |= {"vace_context": noise(1, 1, shape.vace_in_dim, 3, 8, 8), "vace_strength": [1.0]}
    if shape.reference_channels:
        inputs["reference_latent"] = noise(1, shape.reference_channels, 8, 8)
    if shape.camera_channels:
        inputs["camera_conditions"] = noise(1, shape.camera_channels, 3, 64, 64)
    latent, text, step = noise(1, shape.in_dim, 3, 8, 8), noise(1, 32, 4096), torch.tensor([500.0])
    out = model(latent, step, text, **inputs)
    assert out.shape == (1, shape.out_dim, 3, 8, 8)
    assert 0.5 < out.std() < 2 and out.abs().max() < 20
    assert (model(latent, step, noise(1, 32, 4096), **inputs) - out).std() > 0.05
    assert (model(latent, step / 5, text, **inputs) - out).std() > 0.1
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor):
            assert (model(latent, step, text, **{**inputs, name: -value}) - out).std() > 0.01, name


def test_umt5_loads_through_cores_loader(clip):
    assert isinstance(clip.cond_stage_model, comfy.text_encoders.wan.WanT5Model)
    tokens = [int(token) for token, *_ in clip.tokenize("A red fox walks. 一只猫 🦊")["umt5xxl"][0]]
    assert len(tokens) == 512 and tokens[-1] == 0
    pieces = [token for token in tokens if token != 0]
    assert pieces[-1] == 1 and 3 not in pieces
    ours, empty = conditioning(clip, "A red fox walks. 一只猫 🦊")[0][0], conditioning(clip, "")[0][0]
    assert ours.shape == (1, 512, 4096) and 0.5 < ours[0, : len(pieces)].std() < 2
    assert (ours[0, 0] - empty[0, 0]).std() > 0.1


def test_t5_loads_strictly():
    shape = ENCODERS["t5"]
    options = {"is_gated_act": True, "dense_act_fn": "gelu_pytorch_tanh", "model_type": "t5"}
    config = {**encoder_config(shape), **options}
    model = comfy.text_encoders.t5.T5(config, torch.float32, "cpu", comfy.ops.disable_weight_init)
    weights = encoder_weights(shape, "Q5_K_M")
    model.load_state_dict({transformers_name(weight.name): weight.decoded() for weight in weights}, strict=True)
    out, _ = model(torch.tensor([[5, 9, 42, 1]]), None)
    assert 0.5 < out.std() < 2


def test_sampled_video_shows_moving_shapes(clip, vae):
    state_dict = decoded_state_dict(wan_weights(T2V, "Q5_K_M"))
    model = comfy.sd.load_diffusion_model_state_dict(state_dict)
    positive, negative = conditioning(clip, "A red fox"), conditioning(clip, "")
    latent = torch.zeros(1, 16, 3, 12, 20)
    noise = comfy.sample.prepare_noise(latent, 0)
    sampled = comfy.sample.sample(model, noise, 4, 5.0, "uni_pc", "simple", positive, negative, latent, seed=0)
    assert 0.5 < sampled.std() < 10
    frames = vae.decode(sampled)[0]
    assert frames.shape == (9, 96, 160, 3)
    assert min(frame.std(dim=(0, 1)).mean() for frame in frames) > 0.02
    assert ((frames <= 0) | (frames >= 1)).float().mean() < 0.01
    assert (frames[:, 1:] - frames[:, :-1]).abs().mean() < 0.1 * frames.std()
    assert (frames[1:] - frames[:-1]).abs().mean() > 0.01


def test_vae_carries_a_picture_through(vae):
    square = torch.zeros(5, 128, 128, 3)
    square[:, 32:96, 32:96] = 1.0
    encoded = vae.encode(square)
    assert encoded.shape == (1, 16, 2, 16, 16)
    assert encoded[0, :, -1].std(dim=(1, 2)).mean() > 0.1
    last, inverted = vae.decode(encoded)[0, -1], vae.decode(vae.encode(1 - square))[0, -1]
    inside, outside = last[48:80, 48:80].mean(dim=(0, 1)), last[8:24, 8:24].mean(dim=(0, 1))
    assert (inside - outside).abs().max() > 0.01
    assert (last - inverted).abs().mean() > 0.01


PATCHES = {
    "lora": "LoRAAdapter",
    "loha": "LoHaAdapter",
    "lokr": "LoKrAdapter",
    "glora": "GLoRAAdapter",
    "oft": "OFTAdapter",
    "boft": "BOFTAdapter",
    "diff": "diff",
    "w-norm": "diff",
    "diff-bias": "diff",
    "set": "set",
}


@pytest.fixture(scope="module")
def dense_model():
    return comfy.sd.load_diffusion_model_state_dict(decoded_state_dict(wan_weights(T2V, "F16"))).model


def applied(tensors, key_map, weights, caplog):
    """Patches that core makes of a LoRA file and their relative changes; core logs whatever it cannot use."""
    with caplog.at_level(logging.WARNING):
        patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(dict(tensors)), key_map)
        changes = {}
        for key, patch in patches.items():
            weight = weights[key].float()
            patched = comfy.lora.calculate_weight([(1.0, patch, 1.0, None, None)], weight.clone(), key)
            changes[key] = float((patched - weight).norm() / weight.norm())
    assert caplog.messages == []
    return patches, changes


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapter_changes_every_weight_it_names(dense_model, caplog, adapter):
    modules = ["blocks.0.self_attn.norm_q", "blocks.1.norm3"] if adapter == "w-norm" else None
    tensors = wan_lora(T2V, adapter, modules)
    key_map = comfy.lora.model_lora_keys_unet(dense_model, {})
    patches, changes = applied(tensors, key_map, dense_model.state_dict(), caplog)
    assert len(patches) == (len(modules) if modules else 20)
    expected = PATCHES[adapter if adapter in PATCHES else adapter.split("-")[0]]
    assert {patch[0] if isinstance(patch, tuple) else type(patch).__name__ for patch in patches.values()} == {expected}
    assert min(changes.values()) > 0.02 and max(changes.values()) < 4


@pytest.mark.parametrize("style", ["kohya", "videox-fun"])
def test_key_styles_mean_the_same_weights(dense_model, caplog, style):
    key_map = comfy.lora.model_lora_keys_unet(dense_model, {})
    weights = dense_model.state_dict()
    patches, _ = applied(wan_lora(T2V, "lora", key_style=style), key_map, weights, caplog)
    assert patches.keys() == applied(wan_lora(T2V, "lora"), key_map, weights, caplog)[0].keys()


def test_published_lora_reaches_every_parameter(dense_model, caplog):
    key_map = comfy.lora.model_lora_keys_unet(dense_model, {})
    _, changes = applied(published_lora(T2V), key_map, dense_model.state_dict(), caplog)
    assert changes.keys() == {key for key in dense_model.state_dict() if key.startswith("diffusion_model.")}
    assert min(changes.values()) > 0.02 and max(changes.values()) < 4


def test_text_encoder_lora(clip, caplog):
    model = clip.cond_stage_model
    key_map = comfy.lora.model_lora_keys_clip(model, {})
    _, changes = applied(encoder_lora(ENCODERS["umt5"]), key_map, model.state_dict(), caplog)
    assert len(changes) == 7 and min(changes.values()) > 0.02 and max(changes.values()) < 1
