"""Every shipped workflow in the real front end of each pinned ComfyUI: complete, quiet, unchanged, and accepted."""

import json

import build_workflows
import pytest

from .pages import FrontEnd

WORKFLOWS = build_workflows.WORKFLOWS


@pytest.fixture(scope="module")
def page(comfy, browser):
    with FrontEnd(browser, comfy.url) as opened:
        yield opened


def inputs(prompt):
    """Each node's inputs, without what the front end adds for its own preview of an uploaded video."""
    return {
        key: {name: value for name, value in node["inputs"].items() if name != "video-preview"}
        for key, node in prompt.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", build_workflows.TABLE)
def test_workflow_opens_unchanged(comfy, page, name):
    shipped = json.loads((WORKFLOWS / f"{name}.json").read_text())
    page.errors.clear()
    page.load(shipped)
    nodes = {node["id"]: node for node in page.nodes()}
    assert [node["type"] for node in nodes.values() if not node["known"]] == []
    assert page.dialogs() == []
    assert page.errors == []
    saved = {node["id"]: node for node in page.workflow()["nodes"]}
    for node in shipped["nodes"]:
        assert saved[node["id"]].get("widgets_values", []) == node["widgets_values"], node["type"]
    assert page.marked() == []

    prompt = page.prompt()
    expected = json.loads((WORKFLOWS / "api" / f"{name}.json").read_text())
    assert inputs(prompt) == inputs(expected)
    comfy.submit(prompt)  # raises if ComfyUI refuses any part
    comfy.post("/queue", {"clear": True})
    comfy.interrupt()
