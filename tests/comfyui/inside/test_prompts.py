"""Encode Prompts: the same values as core's nodes, the encoder gone afterwards, and not loaded for a known prompt."""

import gc
import weakref
from types import SimpleNamespace

import comfy.model_management
import folder_paths
import pytest
import torch
from apple_silicon_video.memory import comfy_prompts
from apple_silicon_video.memory.comfy_models import unload_models
from apple_silicon_video.memory.comfy_prompts import encode_prompts
from apple_silicon_video.memory.prompt_cache import PromptCache
from apple_silicon_video.nodes.folders import register_gguf_folders
from apple_silicon_video.nodes.prompts import EncodePrompts
from apple_silicon_video.quantization import comfy_loader
from small_models import ENCODERS, encoder_weights, write_encoder_gguf

import nodes

POSITIVE, NEGATIVE = "A red fox walks through fresh snow.", "静止, blurry"


@pytest.fixture
def encoder(model_folders, monkeypatch):
    monkeypatch.setattr(EncodePrompts, "hidden", SimpleNamespace(unique_id=None))  # what the executor sets
    register_gguf_folders()
    path = model_folders["text_encoders"] / "umt5.gguf"
    shape = ENCODERS["umt5"]
    write_encoder_gguf(path, shape, encoder_weights(shape, "Q5_K_M"), "Q5_K_M")
    return path


@pytest.fixture
def loaded(monkeypatch):
    """Weak references to every CLIP that was loaded."""
    clips = []
    load = comfy_loader.load_text_encoder

    def watched(*arguments, **options):
        clip = load(*arguments, **options)
        clips.append(weakref.ref(clip.cond_stage_model))
        return clip

    monkeypatch.setattr(comfy_loader, "load_text_encoder", watched)
    return clips


@pytest.fixture
def user(tmp_path, monkeypatch):
    folder = tmp_path / "user"
    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(folder))
    return folder


def run(positive=POSITIVE, negative=NEGATIVE, **options):
    return EncodePrompts.execute("umt5.gguf", "wan", positive, negative, **options).result


def equal(ours, reference):
    """Conditionings with the same tensors and the same other entries, bit for bit."""
    ((tensor, facts),), ((expected, expected_facts),) = ours, reference
    assert torch.equal(tensor, expected) and facts.keys() == expected_facts.keys()
    for key, value in expected_facts.items():
        assert torch.equal(facts[key], value) if isinstance(value, torch.Tensor) else facts[key] == value


@pytest.mark.parametrize("keep", [True, False])
def test_values_are_those_of_core_with_and_without_the_disk(encoder, user, loaded, keep):
    clip = comfy_loader.load_text_encoder(encoder, "wan")
    reference = [nodes.CLIPTextEncode().encode(clip, text)[0] for text in (POSITIVE, NEGATIVE)]
    assert reference[0][0][0].std() > 1e-3
    del clip
    loaded.clear()
    for _ in range(2):
        for ours, expected in zip(run(keep_on_disk=keep), reference, strict=True):
            equal(ours, expected)
    assert len(loaded) == (1 if keep else 2)
    assert user.exists() == keep


def test_only_the_unknown_prompt_is_encoded(encoder, user, loaded):
    run()
    entries = set(user.rglob("*.safetensors"))
    assert len(loaded) == 1 and len(entries) == 2
    run(positive="Another one.")
    assert len(loaded) == 2 and len(set(user.rglob("*.safetensors"))) == 3
    assert entries < set(user.rglob("*.safetensors"))
    assert POSITIVE.encode() not in b"".join(path.read_bytes() for path in entries)


def test_encoder_is_released_and_other_models_stay(encoder, user, loaded):
    bystander = comfy_loader.load_text_encoder(encoder, "wan")
    nodes.CLIPTextEncode().encode(bystander, "loaded before")
    run()
    gc.collect()
    assert loaded[-1]() is None
    held = [entry.model for entry in comfy.model_management.current_loaded_models]
    assert len(held) == 1 and held[0] is bystander.patcher
    unload_models()


def test_encoder_is_released_after_a_failure(encoder, user, loaded, monkeypatch):
    stopped = comfy.model_management.InterruptProcessingException
    monkeypatch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", _raiser(stopped))
    with pytest.raises(stopped):
        run()
    gc.collect()
    assert loaded[0]() is None and comfy.model_management.current_loaded_models == []
    assert not user.exists()


def _raiser(error):
    def fail():
        raise error

    return fail


def test_another_encoder_file_or_setting_is_another_entry(encoder, user, loaded):
    cache = PromptCache(user)

    def encoded(options):
        return encode_prompts(["x"], encoder, lambda: comfy_loader.load_text_encoder(encoder, "wan"), options, cache)

    assert encoded({"type": "wan"}).loaded_encoder
    assert not encoded({"type": "wan"}).loaded_encoder
    assert encoded({"type": "sd3"}).loaded_encoder
    shape = ENCODERS["umt5"]
    write_encoder_gguf(encoder, shape, encoder_weights(shape, "Q3_K_M"), "Q3_K_M")
    assert encoded({"type": "wan"}).loaded_encoder


def test_embeddings_are_not_kept(encoder, user, loaded):
    run(positive="embedding:style of a fox")
    run(positive="embedding:style of a fox")
    assert len(loaded) == 2 and len(list(user.rglob("*.safetensors"))) == 1


def test_cache_is_in_the_user_folder(user):
    assert comfy_prompts.default_cache().folder == user / "apple-silicon-video" / "prompts"


def test_missing_encoder_is_one_sentence(model_folders, user):
    register_gguf_folders()
    with pytest.raises(FileNotFoundError, match=r"umt5\.gguf is not in models/text_encoders .* put it there"):
        run()
    assert EncodePrompts.fingerprint_inputs("umt5.gguf") == "missing"
