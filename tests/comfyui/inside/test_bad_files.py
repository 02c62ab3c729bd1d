"""Files that cannot be used, through the pack's loader nodes: one sentence each, and nothing left behind."""

import asyncio
import re

import pytest
import torch
from apple_silicon_video import comfy_entrypoint
from apple_silicon_video.quantization.gguf_writer import GGUFWriter
from safetensors.torch import save_file
from small_models import (
    ENCODERS,
    decoded_state_dict,
    encoder_weights,
    published_lora,
    wan_weights,
    write_encoder_gguf,
    write_vae,
)

WAN = "wan2.1-t2v-1.3b"


@pytest.fixture(scope="module")
def nodes():
    extension = asyncio.run(comfy_entrypoint())
    asyncio.run(extension.on_load())
    return {node.GET_SCHEMA().node_id: node for node in asyncio.run(extension.get_node_list())}


@pytest.fixture
def refusal(nodes, model_folders):
    """refusal(node id, folder, write) -> the sentence with which the node refuses the file that ``write`` makes."""

    def refuse(node_id, folder, write, name="file.gguf", arguments=()):
        path = model_folders[folder] / name
        write(path)
        before = sorted(path.parent.rglob("*"))
        with pytest.raises(Exception) as caught:
            nodes[node_id].execute(name, *arguments)
        sentence = str(caught.value)
        assert name in sentence and sentence.endswith(".")
        assert "\n" not in sentence and len(sentence) < 400
        assert caught.value.__cause__ is None
        assert sorted(path.parent.rglob("*")) == before
        return sentence

    return refuse


def wan_file(path, change=None, architecture="wan"):
    weights = wan_weights(WAN, "Q5_K")
    writer = GGUFWriter(path)
    if architecture:
        writer.metadata("general.architecture", architecture)
    for weight in weights:
        if change is not None:
            weight = change(weight)
        if weight is not None:
            writer.tensor(weight.name, weight.shape, weight.type_name, weight.data)
    writer.write()


def llm(path):
    writer = GGUFWriter(path)
    writer.metadata("general.architecture", "llama")
    writer.metadata("tokenizer.ggml.model", "gpt2")
    for name in ("token_embd.weight", "blk.0.attn_q.weight", "output_norm.weight"):
        writer.tensor(name, (4, 32), "F32", torch.zeros(4, 32))
    writer.write()


def unknown(path):
    writer = GGUFWriter(path)
    writer.metadata("general.architecture", "holodeck")
    writer.tensor("deck.0.weight", (4, 32), "F32", torch.zeros(4, 32))
    writer.write()


def encoder(path, name="umt5"):
    write_encoder_gguf(path, ENCODERS[name], encoder_weights(ENCODERS[name], "Q5_K_M"), "Q5_K_M")


def encoder_without(*names):
    def write(path):
        weights = [w for w in encoder_weights(ENCODERS["umt5"], "Q5_K_M") if w.name not in names]
        write_encoder_gguf(path, ENCODERS["umt5"], weights, "Q5_K_M")

    return write


def truncated(path):
    wan_file(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DIFFUSION_GGUF = {
    "missing": (lambda path: None, "is not in models/diffusion_models"),
    "broken link": (lambda path: path.symlink_to("nowhere"), "is not in models/diffusion_models"),
    "folder": (lambda path: path.mkdir(), "is not in models/diffusion_models"),
    "empty": (lambda path: path.touch(), "empty"),
    "wrong magic": (lambda path: path.write_bytes(b"PK\x03\x04" * 100), "not a GGUF file|zip"),
    "truncated": (truncated, "end|cut off|incomplete|truncated"),
    "language model": (llm, "language model.*llama"),
    "unknown architecture": (unknown, "holodeck"),
    "text encoder": (encoder, r"text encoder.*Load Text Encoder \(MPS\)"),
    "missing block": (
        lambda path: wan_file(path, lambda w: None if w.name.startswith("blocks.0.ffn") else w),
        r"lacks blocks\.0\.ffn\.0\.weight",
    ),
    "missing last block": (
        lambda path: wan_file(path, lambda w: None if w.name.startswith("blocks.1.ffn") else w),
        r"lacks 4 of the weights.*blocks\.1\.ffn\.0\.bias",
    ),
    "missing norm": (
        lambda path: wan_file(path, lambda w: None if w.name == "blocks.1.self_attn.norm_q.weight" else w),
        r"lacks 1 of the weights.*blocks\.1\.self_attn\.norm_q\.weight",
    ),
    "missing modulation": (
        lambda path: wan_file(path, lambda w: None if w.name == "blocks.1.modulation" else w),
        r"blocks\.1\.modulation",
    ),
    "missing bias": (
        lambda path: wan_file(path, lambda w: None if w.name == "blocks.0.ffn.0.bias" else w),
        r"blocks\.0\.ffn\.0\.bias",
    ),
}


@pytest.mark.parametrize("case", DIFFUSION_GGUF)
def test_diffusion_loader_refuses_gguf(refusal, case):
    write, says = DIFFUSION_GGUF[case]
    assert re.search(says, refusal("MPSLoadDiffusionModel", "diffusion_models", write))


def test_wrong_shape_is_named(refusal):
    def write(path):
        writer = GGUFWriter(path)
        writer.metadata("general.architecture", "wan")
        for weight in wan_weights(WAN, "Q5_K"):
            shape = weight.shape
            if weight.name == "blocks.1.ffn.0.weight":
                shape = (shape[0] // 2, shape[1] * 2)
            writer.tensor(weight.name, shape, weight.type_name, weight.data)
        writer.write()

    sentence = refusal("MPSLoadDiffusionModel", "diffusion_models", write)
    assert "blocks.1.ffn.0.weight" in sentence and "(256, 512)" in sentence and "(512, 256)" in sentence


DIFFUSION_SAFETENSORS = {
    "empty": (lambda path: path.touch(), "empty"),
    "garbage": (lambda path: path.write_bytes(b"\x00" * 100), "cannot be read"),
    "cut off": (
        lambda path: (save_file({"a": torch.zeros(9)}, path), path.write_bytes(path.read_bytes()[:40])),
        "read",
    ),
    "lora": (lambda path: save_file(published_lora(WAN), path), "LoRA"),
    "vae": (lambda path: write_vae(path), r"VAE.*Load VAE \(MPS\)"),
    "text encoder": (
        lambda path: save_file({"encoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(4, 4)}, path),
        r"text encoder.*Load Text Encoder \(MPS\)",
    ),
    "unknown": (lambda path: save_file({"deck.0.weight": torch.zeros(4, 4)}, path), "no diffusion model"),
}


@pytest.mark.parametrize("case", DIFFUSION_SAFETENSORS)
def test_diffusion_loader_refuses_safetensors(refusal, case):
    write, says = DIFFUSION_SAFETENSORS[case]
    sentence = refusal("MPSLoadDiffusionModel", "diffusion_models", write, "file.safetensors")
    assert re.search(says, sentence)


ENCODER_GGUF = {
    "diffusion model": (wan_file, r"diffusion model.*Load Diffusion Model \(MPS\)"),
    "diffusion model without architecture": (
        lambda path: wan_file(path, architecture=None),
        r"diffusion model.*Load Diffusion Model \(MPS\)",
    ),
    "plain T5": (lambda path: encoder(path, "t5"), "T5 encoder, and Wan needs a UMT5"),
    "language model": (llm, "'llama'.*only T5 and UMT5 are"),
    "missing weight": (encoder_without("enc.blk.0.ffn_up.weight"), "lacks the encoder weight.*wi_1"),
    "missing norm": (encoder_without("enc.output_norm.weight"), "final_layer_norm"),
    "missing table": (encoder_without("token_embd.weight"), "shared.weight"),
    "empty": (lambda path: path.touch(), "empty"),
}


@pytest.mark.parametrize("case", ENCODER_GGUF)
def test_text_encoder_loader_refuses_gguf(refusal, case):
    write, says = ENCODER_GGUF[case]
    assert re.search(says, refusal("MPSLoadTextEncoder", "text_encoders", write))


@pytest.mark.parametrize("clip_type", ["flux", "sd3", "stable_audio"])
def test_text_encoder_of_another_family_is_refused(refusal, clip_type):
    sentence = refusal("MPSLoadTextEncoder", "text_encoders", encoder, arguments=(clip_type,))
    assert "does not fit the text encoder" in sentence or "choose the type" in sentence


ENCODER_SAFETENSORS = {
    "diffusion model": (
        lambda path: save_file(decoded_state_dict(wan_weights(WAN, "Q5_K")), path),
        r"diffusion model.*Load Diffusion Model \(MPS\)",
    ),
    "vae": (lambda path: write_vae(path), "no text encoder"),
    "garbage": (lambda path: path.write_bytes(b"\x00" * 100), "cannot be read"),
}


@pytest.mark.parametrize("case", ENCODER_SAFETENSORS)
def test_text_encoder_loader_refuses_safetensors(refusal, case):
    write, says = ENCODER_SAFETENSORS[case]
    sentence = refusal("MPSLoadTextEncoder", "text_encoders", write, "file.safetensors")
    assert re.search(says, sentence)


VAE_FILES = {
    "diffusion model": (lambda path: save_file(decoded_state_dict(wan_weights(WAN, "Q5_K")), path), "no VAE"),
    "empty": (lambda path: path.touch(), "empty"),
    "garbage": (lambda path: path.write_bytes(b"\x00" * 100), "cannot be read"),
}


@pytest.mark.parametrize("case", VAE_FILES)
def test_vae_loader_refuses(refusal, case):
    write, says = VAE_FILES[case]
    assert re.search(says, refusal("MPSLoadVAE", "vae", write, "file.safetensors"))


def test_good_files_load_through_the_nodes(nodes, model_folders):
    wan_file(model_folders["diffusion_models"] / "wan.gguf")
    encoder(model_folders["text_encoders"] / "umt5.gguf")
    write_vae(model_folders["vae"] / "vae.safetensors")
    (model,) = nodes["MPSLoadDiffusionModel"].execute("wan.gguf", "bfloat16").result
    (clip,) = nodes["MPSLoadTextEncoder"].execute("umt5.gguf").result
    (vae,) = nodes["MPSLoadVAE"].execute("vae.safetensors", "float32").result
    assert model.model.get_dtype() == torch.bfloat16
    assert clip.tokenize("fox") and vae.vae_dtype == torch.float32
    for node_id, name in (("MPSLoadDiffusionModel", "wan.gguf"), ("MPSLoadTextEncoder", "umt5.gguf")):
        assert name in nodes[node_id].define_schema().inputs[0].options
