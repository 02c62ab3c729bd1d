"""Text to video and image to video through the real server, against core's own loaders on the same weights."""

import io
import json
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from small_models import ENCODERS, encoder_config, make_set

from .graphs import (
    I2V,
    SIZE,
    T2V,
    nodes,
    rewire,
    small,
    with_core_loaders,
    with_lora,
    with_tensor,
    with_text_nodes,
    workflow,
)
from .server import server
from .trees import VERSIONS

RECIPES = ("Q3_K_M", "Q5_K_M")
VARIANTS = {T2V: ["wan2.1-t2v-1.3b"], I2V: ["wan2.2-i2v-a14b-high", "wan2.2-i2v-a14b-low"]}
WITNESS = Path(__file__).parent / "witness_nodes.py"


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """(folder, manifest) of the small models."""
    folder = tmp_path_factory.mktemp("models")
    return folder, make_set("test", folder)


@pytest.fixture(scope="module", params=VERSIONS)
def comfy(request, models, tmp_path_factory):
    base = tmp_path_factory.mktemp(f"comfyui-{request.param}")
    (base / "custom_nodes").mkdir()
    shutil.copy(WITNESS, base / "custom_nodes" / "witness_nodes.py")
    arguments = ["--cpu", "--whitelist-custom-nodes", "apple-silicon-video", "witness_nodes.py"]
    with server(request.param, base, models=models[0], arguments=arguments) as running:
        yield running


@pytest.fixture(scope="module")
def first_frame(comfy):
    """Name of an uploaded picture with structure."""
    y, x = np.mgrid[0:64, 0:64] / 63
    pixels = np.stack([x, y, (np.hypot(x - 0.5, y - 0.5) < 0.3)], axis=-1)
    buffer = io.BytesIO()
    Image.fromarray((pixels * 255).astype(np.uint8)).save(buffer, "PNG")
    return comfy.upload_image(buffer.getvalue(), "first frame.png")


def names(models, name, recipe):
    files = models[1]["files"]
    return {
        "diffusion_models": [Path(files[f"{variant}-{recipe}"]).name for variant in VARIANTS[name]],
        "text_encoder": Path(files[f"umt5-{recipe}"]).name,
        "vae": Path(files["vae"]).name,
    }


def references(models):
    """File name -> name of the file with the same weights decoded."""
    files = models[1]["files"]
    return {
        Path(path).name: Path(files[f"{role}-decoded"]).name
        for role, path in files.items()
        if f"{role}-decoded" in files
    }


def frames(comfy, graph, name):
    (path,) = comfy.files(comfy.run(with_tensor(graph, name)), ".npy")
    return np.load(path)


def psnr(ours, reference):
    return 10 * np.log10(1 / max(np.mean((ours - reference) ** 2), 1e-20))


def check_equal(comfy, models, graph, label):
    """Frames of the pack equal those of core within float32 (PSNR above 50 dB), and are neither flat nor broken."""
    config = encoder_config(ENCODERS["umt5"])
    ours = frames(comfy, graph, f"{label}-ours")
    core = frames(comfy, with_core_loaders(graph, references(models), config), f"{label}-core")
    assert ours.shape == (SIZE["length"], SIZE["height"], SIZE["width"], 3)
    assert np.isfinite(ours).all() and core.std() > 0.02
    assert psnr(ours, core) > 50
    return ours, core


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", [T2V, I2V])
def test_equals_core(comfy, models, first_frame, name, recipe, lora):
    api, _ = workflow(name)
    graph = small(api, names(models, name, recipe), first_frame)
    if lora:
        file = Path(models[1]["files"][f"{VARIANTS[name][0]}-published"]).name
        plain = frames(comfy, graph, "plain")
        ours, _ = check_equal(comfy, models, with_lora(graph, file), "lora")
        assert psnr(ours, plain) < 40
    else:
        check_equal(comfy, models, graph, "plain")


@pytest.mark.slow
def test_lora_on_model_and_text_encoder_and_tiled_decoding(comfy, models):
    api, _ = workflow(T2V)
    graph = with_text_nodes(small(api, names(models, T2V, "Q5_K_M")))
    model, clip = nodes(graph, "MPSLoadDiffusionModel")[0], nodes(graph, "MPSLoadTextEncoder")[0]
    rewire(graph, model, 0, "lora")
    for key in nodes(graph, "CLIPTextEncode"):
        graph[key]["inputs"]["clip"] = ["lora", 1]
    file = Path(models[1]["files"]["umt5-lora"]).name
    inputs = {"model": [model, 0], "clip": [clip, 0], "lora_name": file, "strength_model": 1.0, "strength_clip": 1.0}
    graph["lora"] = {"class_type": "LoraLoader", "inputs": inputs}
    (decode,) = nodes(graph, "VAEDecode")
    graph[decode]["class_type"] = "VAEDecodeTiled"
    graph[decode]["inputs"] |= {"tile_size": 64, "overlap": 16, "temporal_size": 8, "temporal_overlap": 4}
    check_equal(comfy, models, graph, "tiled")


@pytest.mark.slow
def test_merged_models(comfy, models):
    api, _ = workflow(T2V)
    chosen = names(models, T2V, "Q5_K_M")
    graph = small(api, chosen)
    (model,) = nodes(graph, "MPSLoadDiffusionModel")
    other = names(models, T2V, "Q3_K_M")["diffusion_models"][0]
    rewire(graph, model, 0, "merge")
    graph["other"] = {"class_type": "MPSLoadDiffusionModel", "inputs": {"unet_name": other, "dtype": "auto"}}
    inputs = {"model1": [model, 0], "model2": ["other", 0], "ratio": 0.6}
    graph["merge"] = {"class_type": "ModelMergeSimple", "inputs": inputs}
    check_equal(comfy, models, graph, "merge")


@pytest.mark.slow
@pytest.mark.parametrize("name", [T2V, I2V])
def test_saved_video_plays_and_carries_the_workflow(comfy, models, first_frame, name):
    api, ui = workflow(name)
    graph = small(api, names(models, name, "Q5_K_M"), first_frame)
    heard = []
    outputs = comfy.run(graph, workflow=ui, listener=lambda kind, data: heard.append((kind, data)))
    (path,) = comfy.files(outputs, ".mp4")
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert stream.codec_context.name == "h264" and stream.average_rate == 16
        prompt = json.loads(container.metadata["prompt"])
        assert {key: node["inputs"] for key, node in prompt.items()} == {k: n["inputs"] for k, n in graph.items()}
        assert json.loads(container.metadata["workflow"]) == ui
    assert len(decoded) == SIZE["length"] and decoded[0].shape == (SIZE["height"], SIZE["width"], 3)
    assert np.stack(decoded).std() > 5
    assert any(kind == "progress" or kind == "progress_state" for kind, _ in heard)


@pytest.mark.slow
@pytest.mark.parametrize("name", [T2V, I2V])
def test_workflow_file_fits_the_nodes(comfy, name):
    """Widgets and sockets of the UI file are those that the nodes of this ComfyUI declare, in their order."""
    api, ui = workflow(name)
    info = comfy.object_info()
    seeds = {"seed", "noise_seed"}
    for node in ui["nodes"]:
        if node["type"] == "MarkdownNote":
            continue
        declared = info[node["type"]]["input"]
        ordered = [*declared.get("required", {}).items(), *declared.get("optional", {}).items()]
        sockets = {entry["name"] for entry in node["inputs"]}
        widgets = []
        for key, spec in ordered:
            kind = spec[0]
            if isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"):
                widgets.append(key)
                widgets += ["control_after_generate"] if key in seeds else []
                widgets += ["upload"] if node["type"] == "LoadImage" else []
        values = dict(zip(widgets, node["widgets_values"], strict=True))
        prompt = api[str(node["id"])]["inputs"]
        assert {k: v for k, v in values.items() if k in prompt} == {k: v for k, v in prompt.items() if k not in sockets}
        assert sockets <= {key for key, _ in ordered}
        outputs = [entry["type"] for entry in node["outputs"]]
        assert outputs == info[node["type"]]["output"]
