"""Every stage of every shipped workflow gives its memory back: the real server on the simulated device.

Free Memory goes behind each stage, on the connection to the next; what is live then is counted to the byte.
"""

import json
from pathlib import Path

import pytest
from apple_silicon_video.tests.comfyui.graphs import rewire
from apple_silicon_video.tests.comfyui.server import server
from apple_silicon_video.tests.comfyui.small_workflows import add_packs, demo, make_models, small_prompt
from apple_silicon_video.tests.comfyui.trees import VERSIONS

NEWEST = max(VERSIONS, key=lambda version: tuple(map(int, version.split("."))))
HERE = Path(__file__).parent
TABLE_BYTES = 1024
STAGES = {
    "MPSEncodePrompts": 0,
    "WanImageToVideo": 2,
    "WanFirstLastFrameToVideo": 2,
    "Wan22ImageToVideoLatent": 0,
    "VAEEncode": 0,
    "KSampler": 0,
    "KSamplerAdvanced": 0,
    "VAEDecode": 0,
    "MPSExtendVideo": 0,
    "MPSSaveVideo": 0,
}
"""What computes or saves -> the output behind which memory is given back."""

AT_REST = {
    "EmptyHunyuanLatentVideo",
    "LoadImage",
    "LoraLoaderModelOnly",
    "ModelSamplingSD3",
    "MPSLastFrames",
    "MPSLoadDiffusionModel",
    "MPSLoadVAE",
    "MPSLoadVideo",
    "MPSMemoryGovernor",
}
"""What makes or passes on a value and puts nothing on the device; what they hold is counted behind the next stage."""


ON_THE_CPU = {"MPSExtendVideo", "MPSSaveVideo"}


def shape(name):
    """Two workflows of one shape differ in numbers, words and quantisations only."""
    prompt = demo.find_workflow(name)[0]
    roles = [demo.role_of(file, kind) for *_, file, kind in demo.model_inputs(prompt)]
    return tuple(node["class_type"] for node in prompt.values()), tuple(roles)


SHAPES = {shape(name): name for name in demo.workflow_names()}


def computes(node):
    """Whether a stage needs the device; a latent without a picture is empty."""
    kind = node["class_type"]
    return kind not in ON_THE_CPU and (kind != "Wan22ImageToVideoLatent" or "start_image" in node["inputs"])


def with_releases(prompt, name):
    """Put Free Memory and a count behind each stage of a graph; the stages' ids in the graph's order."""
    stages = [key for key, node in prompt.items() if node["class_type"] in STAGES]
    for key in stages:
        slot = STAGES[prompt[key]["class_type"]]
        if prompt[key]["class_type"] == "MPSEncodePrompts":
            prompt[key]["inputs"] |= {"positive": name, "keep_on_disk": False}  # a known prompt is not encoded again
        rewire(prompt, key, slot, f"live{key}")
        free = {"unload_models": True, "empty_cache": True, "anything": [key, slot]}
        prompt[f"free{key}"] = {"class_type": "MPSFreeMemory", "inputs": free}
        count = {"value": [f"free{key}", 0], "stage": key, "name": name}
        prompt[f"live{key}"] = {"class_type": "SimulatedLive", "inputs": count}
    return stages


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(folder, file for each role)."""
    folder = tmp_path_factory.mktemp("models")
    return folder, make_models(folder)


@pytest.fixture(scope="module")
def comfy(models, tmp_path_factory):
    base = tmp_path_factory.mktemp("release")
    options = {"launcher": [str(HERE / "launch_comfyui.py")], "arguments": add_packs(base, HERE / "release_nodes.py")}
    environ = {"SIMULATED_TORCH": "2.13", "SIMULATED_RAM_GB": "64"}
    with server(NEWEST, base, models=models[0], environ=environ, **options) as running:
        yield running


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES.values())
def test_nothing_stays_behind_a_stage(comfy, models, name):
    prompt = small_prompt(name, models[1])
    kinds = {node["class_type"] for node in prompt.values()}
    assert kinds <= STAGES.keys() | AT_REST, "say of the new node whether it is a stage"
    demo.provide_sources(comfy, prompt, None)
    stages = with_releases(prompt, name)
    comfy.run(prompt)
    lines = [json.loads(line) for line in (comfy.base / "output" / f"{name}.jsonl").read_text().splitlines()]
    assert sorted(line["stage"] for line in lines) == sorted(stages)
    for line in lines:
        node = prompt[line["stage"]]
        print(node["class_type"], line)
        assert line["beside_tables"] == 0 and line["held"] < TABLE_BYTES
        assert (line["peak"] > TABLE_BYTES) == computes(node)
