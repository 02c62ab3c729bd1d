"""What loading costs in resident memory, and that nothing stays behind over many runs."""

import gc
import re
from types import SimpleNamespace

import comfy.model_management
import comfy.sample
import psutil
import torch
from apple_silicon_video.memory.comfy_models import unload_models
from apple_silicon_video.nodes.memory import MemoryReport
from apple_silicon_video.quantization import comfy_loader
from apple_silicon_video.quantization.gguf import GGUFFile
from small_models import wan_weights, write_full_size_encoder, write_full_size_wan, write_wan_gguf

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
