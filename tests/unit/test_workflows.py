"""The committed workflow files are what the builder makes, and name files that can be found."""

import json

import build_workflows
import pytest
from PIL import Image
from workflow_plans import planned

FILES = build_workflows.workflow_files()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(build_workflows.WORKFLOWS).as_posix())
def test_committed_file_is_current(path):
    assert path.read_text() == FILES[path], "run scripts/build_workflows.py"


def test_there_are_no_other_files():
    assert set(build_workflows.WORKFLOWS.rglob("*.json")) == set(FILES)


@pytest.mark.parametrize("name", build_workflows.TABLE)
def test_every_model_file_has_a_download_and_is_in_the_note(name):
    graph = json.loads((build_workflows.WORKFLOWS / f"{name}.json").read_text())
    note = next(node["widgets_values"][0] for node in graph["nodes"] if node["type"] == "MarkdownNote")
    loaders = [node for node in graph["nodes"] if node["properties"].get("models")]
    named = {
        value for node in graph["nodes"] for value in node["widgets_values"] if str(value) in build_workflows.FILES
    }
    assert len(loaders) >= 3 and named == {node["widgets_values"][0] for node in loaders}
    for node in loaders:
        (model,) = node["properties"]["models"]
        assert model["name"] == node["widgets_values"][0] == model["url"].rsplit("/", 1)[1]
        assert model["name"] in note and f"models/{model['directory']}" in note


@pytest.mark.parametrize("name", build_workflows.TABLE)
def test_sampler_is_euler_on_a_mac(name):
    prompt = json.loads((build_workflows.WORKFLOWS / "api" / f"{name}.json").read_text())
    samplers = [node["inputs"]["sampler_name"] for node in prompt.values() if "sampler_name" in node["inputs"]]
    assert samplers and set(samplers) == {"euler"}


@pytest.mark.parametrize("name", build_workflows.TABLE)
def test_plan_fits_its_tier_and_stands_in_the_note(name):
    row = build_workflows.TABLE[name]
    made = planned(row)
    assert name.endswith(f"_{row.memory}gb") and made.machine.ram == row.memory << 30
    assert made.verdict == "fits" and made.peak.device <= made.machine.recommended
    note = next(node for node in build_workflows.drawn(row).nodes() if node.kind == "MarkdownNote").widgets["~text"]
    assert all(f"| {stage.name} | {stage.device / (1 << 30):.1f} GiB |" in note for stage in made.stages)


@pytest.mark.parametrize("name", build_workflows.TABLE)
def test_preview_picture_lies_beside_it(name):
    with Image.open(build_workflows.WORKFLOWS / f"{name}.jpg") as picture:
        assert picture.width == 1280 and picture.height > 400


def test_there_are_no_other_pictures():
    assert {path.stem for path in build_workflows.WORKFLOWS.glob("*.jpg")} == set(build_workflows.TABLE)
