"""The governor in a real sampling on the simulated device: it trims, shrinks and stops, and the run can go on."""

import sys

import core_tree
import pytest
import simulated_mps as sim
import torch

sys.path.insert(0, core_tree.folder())

import comfy.model_management
import comfy.sample
from apple_silicon_video.memory import governor
from apple_silicon_video.memory.checkpoints import CheckpointStore
from apple_silicon_video.memory.comfy_activations import activation_budget, reduce_activations
from apple_silicon_video.memory.comfy_checkpoints import with_checkpoints
from apple_silicon_video.memory.comfy_governor import govern
from apple_silicon_video.quantization import comfy_loader
from small_models import wan_weights, write_wan_gguf

STEPS = 5


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.setattr(governor, "PERIOD", 0)
    path = tmp_path / "wan.gguf"
    write_wan_gguf(path, wan_weights("wan2.1-t2v-1.3b", "Q5_K_M"), "Q5_K_M")
    yield reduce_activations(comfy_loader.load_diffusion_model(path, torch.float32))
    comfy.model_management.unload_all_models()
    comfy.model_management.current_loaded_models.clear()


def sample(model, callback=None):
    generator = torch.Generator().manual_seed(0)
    latent = torch.zeros(1, 16, 2, 16, 16)
    text = [[torch.randn(1, 20, 4096, generator=generator), {}]]
    noise = comfy.sample.prepare_noise(latent, 0)
    arguments = [model, noise, STEPS, 1.0, "euler", "simple", text, text, latent]
    return comfy.sample.sample(*arguments, seed=0, callback=callback).cpu()


def test_run_is_stopped_before_the_limit_and_goes_on_after(model, tmp_path):
    reference = sample(model)
    told = []
    watched = govern(with_checkpoints(model, CheckpointStore(tmp_path / "store"), "model", 1, told.append), "strict")
    budget = activation_budget(watched)
    before = budget.temporary_bytes

    def shortage(step, *_):
        if step == 2:
            sim.limits(recommended_bytes=torch.mps.driver_allocated_memory() // 2)

    with pytest.raises(governor.MemoryStop, match=r"^Sampling was stopped because .* queue it again to go on"):
        sample(watched, callback=shortage)
    assert budget.temporary_bytes == before
    sim.limits()
    result = sample(watched)
    assert told == ["Going on after step 2 of 5."]
    torch.testing.assert_close(result, reference, rtol=1e-4, atol=1e-5)


def test_cache_is_trimmed_and_chunks_shrink_while_sampling(model, caplog):
    caplog.set_level("INFO")
    watched = govern(model, "careful")
    budget, seen = activation_budget(watched), []

    def shortage(step, *_):
        seen.append(budget.temporary_bytes)
        if step == 0:
            junk = torch.empty(300 << 20, dtype=torch.uint8, device="mps")
            del junk
            sim.limits(recommended_bytes=torch.mps.driver_allocated_memory())
        if step == 1:
            sim.limits(recommended_bytes=torch.mps.current_allocated_memory())

    sample(watched, callback=shortage)
    assert "trimmed the MPS cache" in caplog.text
    assert seen[0] == seen[1] == budget.temporary_bytes > seen[2] >= governor.LEAST_TEMPORARY


def test_off_takes_the_watch_away(model):
    watched = govern(govern(model, "strict"), "off")
    sim.limits(recommended_bytes=1 << 20)
    assert torch.isfinite(sample(watched)).all()
