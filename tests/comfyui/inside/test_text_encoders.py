"""UMT5 and T5 from GGUF through the pack's loader, against core's encoder on decoded weights."""

import math
from types import SimpleNamespace

import comfy.model_management
import comfy.sd
import comfy.text_encoders.wan
import comfy.utils
import pytest
import torch
from apple_silicon_video.quantization import comfy_loader, tensor
from apple_silicon_video.quantization.comfy_patcher import QuantizedModelPatcher
from apple_silicon_video.quantization.tensor import QuantizedWeight
from comfy_extras import nodes_model_merging
from safetensors.torch import load_file
from small_models import (
    ENCODERS,
    encoder_config,
    encoder_lora,
    encoder_weights,
    write_encoder_gguf,
    write_encoder_reference,
)

PROMPTS = [
    "A red fox walks through fresh snow at sunrise.",
    "一只红狐在清晨的新雪中行走。",
    "",
    "ＦＵＬＬ ﬁ e\u0301 🦊   spaces",
]


def load_pair(folder, name="umt5", recipe="Q5_K_M"):
    """(pack's CLIP from GGUF, core's CLIP from the decoded weights and the original SentencePiece model)."""
    shape = ENCODERS[name]
    weights = encoder_weights(shape, recipe)
    gguf, dense = folder / f"{name}.gguf", folder / f"{name}.safetensors"
    write_encoder_gguf(gguf, shape, weights, recipe)
    write_encoder_reference(dense, shape, weights)
    state_dict = comfy.utils.load_torch_file(str(dense))
    spiece = state_dict.pop("spiece_model")

    target = SimpleNamespace(
        params={},
        clip=comfy.text_encoders.wan.te(dtype_t5=torch.float32),
        tokenizer=comfy.text_encoders.wan.WanT5Tokenizer,
    )
    core = comfy.sd.CLIP(
        target,
        tokenizer_data={"spiece_model": spiece},
        state_dict=[state_dict],
        model_options={"umt5xxl_model_config": encoder_config(shape)},
    )
    return comfy_loader.load_text_encoder(gguf, "wan"), core


def encode(clip, text):
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))[0][0]


@pytest.mark.parametrize(("name", "recipe"), [("umt5", "Q5_K_M"), ("umt5", "Q3_K_M"), ("umt5-2-layers", "Q5_K_M")])
def test_umt5_equals_core(tmp_path, name, recipe):
    ours, core = load_pair(tmp_path, name, recipe)
    assert isinstance(ours.patcher, QuantizedModelPatcher)
    for text in PROMPTS:
        assert ours.tokenize(text) == core.tokenize(text)
        result, reference = encode(ours, text), encode(core, text)
        assert text == "" or reference.std() > 1e-3
        assert torch.equal(result, reference)


def test_only_rows_of_the_prompt_are_decoded(tmp_path, monkeypatch):
    ours, _ = load_pair(tmp_path)
    embedding = ours.cond_stage_model.umt5xxl.transformer.shared
    assert isinstance(embedding.weight, QuantizedWeight)
    decoded = []
    whole = tensor.dequantize

    def watch(blocks, block_format, shape, dtype):
        decoded.append(math.prod(shape))
        return whole(blocks, block_format, shape, dtype)

    monkeypatch.setattr(tensor, "dequantize", watch)
    encode(ours, PROMPTS[0])
    assert decoded and max(decoded) < embedding.weight.numel()


def test_lora_on_the_text_encoder(tmp_path):
    ours, core = load_pair(tmp_path)
    lora = encoder_lora(ENCODERS["umt5"])
    before = encode(ours, PROMPTS[0])
    _, ours_patched = comfy.sd.load_lora_for_models(None, ours, lora, 0, 1.0)
    _, core_patched = comfy.sd.load_lora_for_models(None, core, lora, 0, 1.0)
    result, reference = encode(ours_patched, PROMPTS[0]), encode(core_patched, PROMPTS[0])
    assert not torch.allclose(reference, before, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(result, reference, rtol=1e-3, atol=1e-4)
    assert torch.equal(encode(ours, PROMPTS[0]), before)


def test_core_sees_no_leak(tmp_path, caplog):
    ours, _ = load_pair(tmp_path)
    with caplog.at_level("INFO"):
        encode(ours, PROMPTS[0])
        comfy.model_management.cleanup_models_gc()
        comfy.model_management.load_models_gpu([ours.patcher])
    assert not [record for record in caplog.records if "leak" in record.message]


def test_unload_and_reload(tmp_path):
    ours, _ = load_pair(tmp_path)
    first = encode(ours, PROMPTS[0])
    comfy.model_management.unload_all_models()
    assert torch.equal(encode(ours, PROMPTS[0]), first)


def saved_by_core(clip, folder, monkeypatch):
    """What core's CLIPSave node writes for a CLIP: the encoder, and what lies beside it, in a file each."""
    folder.mkdir()
    monkeypatch.setattr("folder_paths.get_output_directory", lambda: str(folder))
    nodes_model_merging.CLIPSave().save(clip, "encoder")
    paths = sorted(folder.iterdir())
    return [path.name for path in paths], {k: v for path in paths for k, v in load_file(path).items()}


@pytest.mark.parametrize("with_lora", [False, True])
def test_core_saves_decoded_weights(with_lora, tmp_path, monkeypatch):
    """CLIPSave writes what the decoded encoder's would be, LoRA included, also from a copy of the CLIP."""
    ours, core = load_pair(tmp_path)
    if with_lora:
        lora = encoder_lora(ENCODERS["umt5"])
        ours, core = (comfy.sd.load_lora_for_models(None, clip, lora, 0, 0.8)[1] for clip in (ours, core))
    before = encode(ours, PROMPTS[0])
    names, found = saved_by_core(ours.clone(), tmp_path / "ours", monkeypatch)
    expected_names, expected = saved_by_core(core, tmp_path / "core", monkeypatch)
    assert names == expected_names
    assert found.keys() == expected.keys()
    assert found.pop("spiece_model").numel() and expected.pop("spiece_model").numel()  # rebuilt, and the original
    for name, value in expected.items():
        torch.testing.assert_close(found[name].float(), value.float(), rtol=1e-3, atol=1e-4)
    assert torch.equal(encode(ours, PROMPTS[0]), before)
