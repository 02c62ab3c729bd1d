"""The real ComfyUI server on the simulated device: the shipped workflows, and the same frames as on the CPU."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from apple_silicon_video.tests.comfyui.graphs import I2V, T2V, nodes, rewire, small, with_lora, with_tensor, workflow
from apple_silicon_video.tests.comfyui.server import server
from apple_silicon_video.tests.comfyui.trees import VERSIONS
from PIL import Image
from small_models import make_set

COMFYUI = max(VERSIONS, key=lambda version: tuple(map(int, version.split("."))))
TABLES = ("2.8", "2.10", "2.13", "2.15")
HERE = Path(__file__).parent
WITNESS = HERE.parent / "comfyui" / "witness_nodes.py"
VARIANTS = {T2V: ["wan2.1-t2v-1.3b"], I2V: ["wan2.2-i2v-a14b-high", "wan2.2-i2v-a14b-low"]}
RUNS = {"text to video": (T2V, False), "image to video": (I2V, False), "lora": (T2V, True)}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return folder, make_set("test", folder)


def start(base, models, **options):
    """A server of the newest version with the test's own nodes."""
    (base / "custom_nodes").mkdir()
    for source in (WITNESS, HERE / "stats_node.py"):
        shutil.copy(source, base / "custom_nodes")
    packs = ["apple-silicon-video", "witness_nodes.py"]
    if "launcher" in options:
        packs.append("stats_node.py")
    arguments = [*options.pop("arguments"), "--whitelist-custom-nodes", *packs]
    return server(COMFYUI, base, models=models[0], arguments=arguments, **options)


def picture():
    y, x = np.mgrid[0:64, 0:64] / 63
    pixels = np.stack([x, y, np.hypot(x - 0.5, y - 0.5) < 0.3], axis=-1)
    buffer = io.BytesIO()
    Image.fromarray((pixels * 255).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def graph(models, run, image):
    """The workflow of a run with small models, everything in float32."""
    name, lora = RUNS[run]
    files = models[1]["files"]
    names = {
        "diffusion_models": [Path(files[f"{variant}-Q5_K_M"]).name for variant in VARIANTS[name]],
        "text_encoder": Path(files["umt5-Q5_K_M"]).name,
        "vae": Path(files["vae"]).name,
    }
    made = small(workflow(name)[0], names, image)
    if lora:
        made = with_lora(made, Path(files[f"{VARIANTS[name][0]}-published"]).name)
    for node in made.values():
        if node["class_type"] in ("MPSLoadDiffusionModel", "MPSLoadVAE"):
            node["inputs"]["dtype"] = "float32"
    return made


def frames(comfy, made, label):
    path = comfy.files(comfy.run(with_tensor(made, label)), ".npy")[0]
    return np.load(path)


@pytest.fixture(scope="module")
def on_the_cpu(models, tmp_path_factory):
    """run -> frames, computed by the same server on the CPU."""
    with start(tmp_path_factory.mktemp("cpu"), models, arguments=["--cpu"]) as comfy:
        image = comfy.upload_image(picture(), "first.png")
        return {run: frames(comfy, graph(models, run, image), "cpu") for run in RUNS}


@pytest.fixture(scope="module", params=TABLES)
def on_mps(request, models, tmp_path_factory):
    options = {"launcher": [str(HERE / "launch_comfyui.py")], "arguments": []}
    environ = {"SIMULATED_TORCH": request.param, "SIMULATED_RAM_GB": "64"}
    with start(tmp_path_factory.mktemp(f"mps-{request.param}"), models, environ=environ, **options) as comfy:
        yield comfy, comfy.upload_image(picture(), "first.png")


@pytest.mark.slow
def test_server_runs_on_mps(on_mps):
    comfy, _ = on_mps
    log = comfy.log_text()
    assert "Device: mps" in log and "Set vram state to: SHARED" in log


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_same_frames_as_on_the_cpu(on_mps, on_the_cpu, models, run):
    comfy, image = on_mps
    made = graph(models, run, image)
    sampler = next(key for key in made if made[key]["class_type"].startswith("KSampler"))
    latent, slot = made[sampler]["inputs"]["latent_image"]
    rewire(made, latent, slot, "reset")
    made["reset"] = {"class_type": "SimulatedReset", "inputs": {"value": [latent, slot]}}
    (decode,) = nodes(made, "VAEDecode")
    made["stats"] = {"class_type": "SimulatedStats", "inputs": {"value": [decode, 0], "name": "counters"}}

    found = frames(comfy, made, "mps")
    expected = on_the_cpu[run]
    assert found.shape == expected.shape and expected.std() > 0.02
    assert 10 * np.log10(1 / max(np.mean((found - expected) ** 2), 1e-20)) > 50

    counters = json.loads((comfy.base / "output" / "counters.json").read_text())
    assert counters["ops"] and not counters["fell_back"]
    assert not counters["float64_attempts"]
