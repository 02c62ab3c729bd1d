"""The Doctor and the output watch as nodes of a real ComfyUI on the CPU."""

import asyncio

import comfy.sample
import pytest
import torch
from apple_silicon_video import comfy_entrypoint
from apple_silicon_video.mps_patches.registry import DEFECTS
from apple_silicon_video.quantization import comfy_loader
from small_models import wan_weights, write_wan_gguf


@pytest.fixture(scope="module")
def pack():
    extension = asyncio.run(comfy_entrypoint())
    asyncio.run(extension.on_load())
    return {node.GET_SCHEMA().node_id: node for node in asyncio.run(extension.get_node_list())}


@pytest.fixture
def nodes(pack):
    """Node classes as the executor calls them: clones with hidden inputs."""
    return {name: node.PREPARE_CLASS_CLONE(None) for name, node in pack.items()}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "small.gguf"
    write_wan_gguf(path, wan_weights("wan2.1-t2v-1.3b", "Q5_K"), "Q5_K")
    return comfy_loader.load_diffusion_model(path)


def sample(model, poison=None):
    """Three Euler steps; ``poison`` spoils the model's prediction."""
    if poison is not None:
        model = model.clone()
        model.set_model_sampler_cfg_function(lambda arguments: arguments["input"] - poison(arguments["cond_denoised"]))
    generator = torch.Generator().manual_seed(0)
    conditioning = [[torch.randn(1, 20, 4096, generator=generator), {}]]
    latent = torch.zeros(1, 16, 2, 8, 8)
    noise = comfy.sample.prepare_noise(latent, 0)
    return comfy.sample.sample(model, noise, 3, 2.0, "euler", "simple", conditioning, conditioning, latent, seed=0)


def frames():
    ramp = torch.linspace(0, 1, 32)
    return torch.stack([ramp.expand(32, 32), ramp[:, None].expand(32, 32), torch.full((32, 32), 0.4)], -1).repeat(
        9, 1, 1, 1
    )


def test_doctor_reports_every_defect(nodes):
    report, picture = nodes["MPSDoctor"].execute(quick=True).result
    assert all(f"| {name} |" in report for name in DEFECTS)
    assert "no MPS device" in report
    assert picture.shape[0] == 1 and picture.shape[-1] == 3 and 0 <= float(picture.min()) <= float(picture.max()) <= 1


def test_watch_leaves_a_working_run_as_it_is(nodes, model):
    watched, images, report = nodes["MPSWatchOutput"].execute("stop", model, frames()).result
    assert watched is not model and torch.equal(images, frames()) and report == "No trouble found."
    assert torch.equal(sample(watched), sample(model))


def test_watch_stops_at_the_first_broken_step(nodes, model):
    watched = nodes["MPSWatchOutput"].execute("stop", model).result[0]
    with pytest.raises(RuntimeError, match=r"Sampling has gone wrong at sigma .* NaN or infinite; likely cause: .*\.$"):
        sample(watched, poison=lambda x: x * float("nan"))


def test_watch_warns_once_and_goes_on(nodes, model, caplog):
    watched = nodes["MPSWatchOutput"].execute("warn", model).result[0]
    sample(watched, poison=lambda x: x * 1e6)
    warnings = [record.message for record in caplog.records if "gone wrong" in record.message]
    assert len({w.split(":")[1] for w in warnings}) >= 1 and len(warnings) <= 2


def test_watch_names_broken_frames(nodes):
    with pytest.raises(RuntimeError, match="all frames are black"):
        nodes["MPSWatchOutput"].execute("stop", None, torch.zeros(9, 32, 32, 3))
    report = nodes["MPSWatchOutput"].execute("warn", None, torch.zeros(9, 32, 32, 3)).result[2]
    assert "interpolate-half-5d" in report
