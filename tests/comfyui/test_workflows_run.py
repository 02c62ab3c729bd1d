"""Every shipped workflow runs to its video in the real ComfyUI, with small models in the places of the large ones."""

import json
from pathlib import Path

import av
import numpy as np
import pytest

from .server import server
from .small_workflows import SIZE, add_packs, demo, make_models, small_prompt
from .trees import VERSIONS

NEWEST = max(VERSIONS, key=lambda version: tuple(map(int, version.split("."))))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(folder, file for each role)."""
    folder = tmp_path_factory.mktemp("models")
    return folder, make_models(folder)


@pytest.fixture(scope="module")
def comfy(models, tmp_path_factory):
    base = tmp_path_factory.mktemp("workflows")
    with server(NEWEST, base, models=models[0], arguments=["--cpu", *add_packs(base)]) as running:
        yield running


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
