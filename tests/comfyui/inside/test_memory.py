"""What loading costs in resident memory, that nothing stays behind over many runs, and the memory nodes on a CPU."""

import asyncio
import gc
import re
from types import SimpleNamespace

import comfy.model_management
import comfy.sample
import psutil
import pytest
import torch
from apple_silicon_video.memory.comfy_models import unload_models
from apple_silicon_video.nodes.long_runs import CheckpointSampling, MemoryGovernor
from apple_silicon_video.nodes.memory import FreeMemory, MemoryReport
from apple_silicon_video.nodes.reduce_memory import ReduceMemory
from apple_silicon_video.quantization import comfy_loader
from apple_silicon_video.quantization.gguf import GGUFFile
from small_models import wan_lora, wan_weights, write_full_size_encoder, write_full_size_wan, write_wan_gguf

import nodes

from .wan import apply_lora

MIB = 1 << 20


def resident():
    gc.collect()
    return psutil.Process().memory_info().rss


def small_model(folder):
    path = folder / "small.gguf"
    write_wan_gguf(path, wan_weights("wan2.1-t2v-1.3b", "Q5_K_M"), "Q5_K_M")
    return path


def sample(patcher):
    """Two Euler steps through core's sampler."""
    generator = torch.Generator().manual_seed(0)
    latent = torch.zeros(1, 16, 2, 8, 8)
    conditioning = [[torch.randn(1, 20, 4096, generator=generator), {}]]
    noise = comfy.sample.prepare_noise(latent, 0)
    return comfy.sample.sample(patcher, noise, 2, 1.0, "euler", "simple", conditioning, conditioning, latent, seed=0)


def test_14b_stands_with_less_than_100_mb(tmp_path):
    comfy_loader.load_diffusion_model(small_model(tmp_path))
    path = write_full_size_wan(tmp_path / "14b.gguf", "wan2.1-t2v-14b", "Q3_K_M")
    assert len(GGUFFile(path).tensors) == 1095
    before = resident()
    patcher = comfy_loader.load_diffusion_model(path)
    grown = resident() - before
    assert type(patcher.model.model_config).__name__ == "WAN21_T2V"
    assert patcher.model_size() > 6e9
    assert grown < 100 * MIB, f"{grown / MIB:.0f} MiB"


def test_umt5_xxl_stands_with_a_fraction_of_its_size(tmp_path):
    path = write_full_size_encoder(tmp_path / "umt5.gguf", "Q5_K_M")
    before = resident()
    clip = comfy_loader.load_text_encoder(path)
    grown = resident() - before
    assert clip.cond_stage_model.umt5xxl.num_layers == 24
    assert clip.patcher.model_size() > 3.5e9
    assert grown < 500 * MIB, f"{grown / MIB:.0f} MiB"


def test_30_cycles_of_loading_sampling_and_unloading_are_flat(tmp_path):
    path = small_model(tmp_path)
    levels = []
    for _ in range(30):
        patcher = comfy_loader.load_diffusion_model(path)
        sample(patcher)
        comfy.model_management.unload_all_models()
        del patcher
        comfy.model_management.cleanup_models()
        levels.append(resident())
    growth = max(levels[3:]) - levels[3]
    assert growth < 8 * MIB, [f"{level / MIB:.1f}" for level in levels]


def test_report_names_what_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(MemoryReport, "hidden", SimpleNamespace(unique_id=None))  # what the executor sets
    patcher = comfy_loader.load_diffusion_model(small_model(tmp_path))
    comfy.model_management.load_models_gpu([patcher])
    latent = {"samples": torch.zeros(1)}
    passed, report = MemoryReport.execute(latent).result
    assert passed is latent and "Process: " in report
    assert re.search(r"^Loaded: WAN21, \d+\.\d\d GiB on cpu$", report, re.MULTILINE)
    unload_models()
    assert "Loaded: no models" in MemoryReport.execute().result[1]


def test_free_memory_releases_what_is_chosen(tmp_path, monkeypatch):
    monkeypatch.setattr(FreeMemory, "hidden", SimpleNamespace(unique_id=None))
    plain, other = (comfy_loader.load_diffusion_model(small_model(tmp_path)) for _ in range(2))
    patched = apply_lora(other, wan_lora("wan2.1-t2v-1.3b", "lora", seed=1))
    reference = sample(patched)
    comfy.model_management.load_models_gpu([plain, patched])

    def loaded():
        return {id(entry.model) for entry in comfy.model_management.current_loaded_models}

    assert loaded() == {id(plain), id(patched)}
    latent = {"samples": reference}
    passed, report = FreeMemory.execute(False, True, anything=latent).result
    assert passed is latent and loaded() == {id(plain), id(patched)}
    lines = report.splitlines()
    assert lines[0] == "Unloaded: nothing" and lines[-1] == "No MPS device here"
    assert re.fullmatch(r"Pages of model files in RAM: dropped for [1-9]\d* files", lines[1])
    assert re.fullmatch(r"Process: \d+\.\d\d GiB before, \d+\.\d\d GiB after \([+-]\d+\.\d\d\)", lines[2])
    assert FreeMemory.execute(False, True, drop_patches=True).result[1].startswith("Unloaded: WAN21\n")
    assert loaded() == {id(plain)}
    assert FreeMemory.execute(True, True).result[1].startswith("Unloaded: WAN21\n")
    assert loaded() == set()
    assert torch.equal(sample(patched), reference)


class AnyModel:
    """A node that gives a MODEL, for prompts that are only validated."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "load", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}


MODEL = ["1", 0]
FREE = {"unload_models": True, "empty_cache": True}
WRONG = {
    "drop_caches": (FreeMemory, {**FREE, "drop_caches": "all of them"}),
    "empty_cache": (FreeMemory, {"unload_models": True}),
    "activations": (ReduceMemory, {"model": MODEL, "activations": "yes"}),
    "chunk_gib": (ReduceMemory, {"model": MODEL, "activations": "auto", "chunk_gib": 0.0}),
    "model": (ReduceMemory, {"activations": "auto"}),
    "setting": (MemoryGovernor, {"model": MODEL, "setting": "brutal"}),
    "every": (CheckpointSampling, {"model": MODEL, "every": 0}),
}


@pytest.mark.parametrize("wrong", [*WRONG, None])
def test_wrong_inputs_are_refused_before_the_run(monkeypatch, wrong):
    """By ComfyUI, from the schema: one message, which names the input."""
    import execution

    for kind in (FreeMemory, ReduceMemory, MemoryGovernor, CheckpointSampling):
        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, kind.define_schema().node_id, kind)
    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "AnyModel", AnyModel)
    kind, inputs = WRONG[wrong] if wrong else (CheckpointSampling, {"model": MODEL, "every": 5})
    prompt = {
        "1": {"class_type": "AnyModel", "inputs": {}},
        "2": {"class_type": kind.GET_SCHEMA().node_id, "inputs": inputs},
        "3": {"class_type": "MPSFreeMemory", "inputs": {**FREE, "anything": ["2", 0]}},
    }
    valid, _, _, refused = asyncio.run(execution.validate_prompt("prompt", prompt, None))
    if wrong is None:
        assert valid and refused == {}
        return
    (error,) = refused["2"]["errors"]
    assert wrong in error["details"] and "\n" not in error["message"] + error["details"]
