"""Every shipped workflow runs to its video in the real ComfyUI, with small models in the places of the large ones."""

import json
from pathlib import Path

import apple_silicon_video.tests.scripts_path  # noqa: F401
import av
import numpy as np
import pytest
from small_models import make_set

from .server import server
from .trees import VERSIONS

import demo  # isort: skip

NEWEST = max(VERSIONS, key=lambda version: tuple(map(int, version.split("."))))
SIZE = {"width": 64, "height": 64, "length": 9, "frame_limit": 9}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(folder, manifest) of the demo's small models."""
    folder = tmp_path_factory.mktemp("models")
    return folder, make_set("demo", folder)


@pytest.fixture(scope="module")
def comfy(models, tmp_path_factory):
    with server(NEWEST, tmp_path_factory.mktemp("workflows"), models=models[0]) as running:
        yield running


def small_prompt(name, manifest):
    prompt = demo.made_small(demo.find_workflow(name)[0], manifest["substitutions"])
    for node in prompt.values():
        node["inputs"] |= {key: value for key, value in SIZE.items() if isinstance(node["inputs"].get(key), int)}
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
    expected = 2 * SIZE["length"] - 1 if "extend" in name else SIZE["length"]
    assert frames.shape == (expected, SIZE["height"], SIZE["width"], 3)
    assert frames.std() > 3 and stream.average_rate == (24 if "5b" in name else 16)
