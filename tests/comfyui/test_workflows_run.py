"""Every shipped workflow runs to its video in the real ComfyUI, with small models in the places of the large ones."""

import json
import shutil
from pathlib import Path

import apple_silicon_video.tests.scripts_path  # noqa: F401
import av
import numpy as np
import pytest
from small_models import make_set, wan_weights, write_wan_gguf

from .server import server
from .trees import VERSIONS

import demo  # isort: skip

NEWEST = max(VERSIONS, key=lambda version: tuple(map(int, version.split("."))))
SMALL_5B = "small-wan2.2-ti2v-5b.gguf"
NARROW_VAE = Path(__file__).parent / "narrow_vae.py"
SIZE = {"width": 64, "height": 64, "length": 9, "frame_limit": 9}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(folder, file for each role): the demo's small models and those of Wan 2.2 5B."""
    folder = tmp_path_factory.mktemp("models")
    substitutions = dict(make_set("demo", folder)["substitutions"])
    write_wan_gguf(folder / "diffusion_models" / SMALL_5B, wan_weights("wan2.2-ti2v-5b", "Q5_K_M"), "Q5_K_M")
    return folder, substitutions | {"diffusion_model_ti2v": SMALL_5B, "vae_2.2": narrow_vae_file()}


def narrow_vae_file():
    """The file that narrow_vae.py writes."""
    return next(line.split('"')[1] for line in NARROW_VAE.read_text().splitlines() if line.startswith("FILE = "))


@pytest.fixture(scope="module")
def comfy(models, tmp_path_factory):
    base = tmp_path_factory.mktemp("workflows")
    (base / "custom_nodes").mkdir()
    shutil.copy(NARROW_VAE, base / "custom_nodes")
    arguments = ["--cpu", "--whitelist-custom-nodes", "apple-silicon-video", NARROW_VAE.name]
    with server(NEWEST, base, models=models[0], arguments=arguments) as running:
        yield running


def small_prompt(name, substitutions):
    prompt = demo.made_small(demo.find_workflow(name)[0], substitutions)
    for node in prompt.values():
        node["inputs"] |= {key: value for key, value in SIZE.items() if isinstance(node["inputs"].get(key), int)}
        if "filename_prefix" in node["inputs"]:
            node["inputs"]["filename_prefix"] = name  # two sizes of one workflow would be the same small prompt
    return prompt


@pytest.mark.slow
@pytest.mark.parametrize("name", demo.workflow_names())
def test_workflow_ends_with_its_video(comfy, models, name):
    prompt = small_prompt(name, models[1])
    demo.provide_sources(comfy, prompt, None)
    ui = json.loads((Path(demo.WORKFLOWS) / f"{name}.json").read_text())
    (path,) = comfy.files(comfy.run(prompt, workflow=ui), ".mp4")
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
        assert json.loads(container.metadata["workflow"]) == ui
        assert stream.average_rate == (24 if "5b" in name else 16)
    expected = 2 * SIZE["length"] - 1 if "extend" in name else SIZE["length"]
    assert frames.shape == (expected, SIZE["height"], SIZE["width"], 3)
    assert frames.std() > 3
