"""Nodes 2.0: the newest front end draws the workflows as Vue components, beside the pack's extensions."""

import json

import build_workflows
import pytest
from apple_silicon_video.tests.comfyui.trees import VERSIONS

from .pages import FrontEnd

NEWEST = max(VERSIONS, key=lambda version: tuple(map(int, version.split("."))))
WORKFLOWS = ("wan2.2_extend_a14b_fast_36gb", "wan2.1_v2v_1.3b_16gb")
DRAWN = "count => document.querySelectorAll('[data-node-id]').length >= count"


@pytest.mark.slow
@pytest.mark.parametrize("comfy", [NEWEST], indirect=True)
def test_workflows_are_drawn_without_errors(comfy, browser):
    settings = {"Comfy.VueNodes.Enabled": True, "AppleSiliconVideo.MemoryMeter": True}
    try:
        with FrontEnd(browser, comfy.url, settings=settings) as page:
            page.page.wait_for_selector(".asv-memory-meter")
            for name in WORKFLOWS:
                shipped = json.loads((build_workflows.WORKFLOWS / f"{name}.json").read_text())
                page.load(shipped)
                page.page.wait_for_function(DRAWN, arg=len(shipped["nodes"]))
                titles = page.page.evaluate("() => document.body.innerText")
                assert all(node.get("title", "") in titles for node in shipped["nodes"])
            assert page.errors == [] and page.dialogs() == []

    finally:
        for key in settings:
            comfy.post(f"/settings/{key}", False)
