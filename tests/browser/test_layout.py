"""The newest front end draws every workflow tidily, classic and as Nodes 2.0, beside the pack's extensions.

Nodes stay in their groups and off each other, everything is in view when the file opens, and nothing is logged as an
error.
"""

import json

import build_workflows
import pytest
from apple_silicon_video.tests.comfyui.trees import VERSIONS

from .pages import FrontEnd

NEWEST = max(VERSIONS, key=lambda version: tuple(map(int, version.split("."))))
SETTING, METER = "Comfy.VueNodes.Enabled", "AppleSiliconVideo.MemoryMeter"
TEXT, LEGIBLE = 14, 8
"""Pixels: size of a node's text at zoom 1, and the least at which the front end still draws it."""

READY = """vue => window.app.graph._nodes.every(node => !vue || document.querySelector(`[data-node-id="${node.id}"]`))
    && [...document.querySelectorAll('video')].every(video => video.readyState)"""
DRAWN = """([vue, BARS]) => {
    const {ds, canvas} = window.app.canvas, origin = canvas.getBoundingClientRect()
    const inGraph = ({left, top, width, height}) => [(left - origin.left) / ds.scale - ds.offset[0],
        (top - origin.top) / ds.scale - ds.offset[1], width / ds.scale, height / ds.scale]
    const box = node => vue ? inGraph(document.querySelector(`[data-node-id="${node.id}"]`).getBoundingClientRect())
        : [...node.boundingRect]
    const {left, top, width, height} = origin
    return {free: inGraph({left, top: top + BARS, width, height: height - BARS}), scale: ds.scale,
        groups: window.app.graph._groups.map(group => [...group._bounding]),
        nodes: window.app.graph._nodes.map(node => [node.title, box(node)])}
}"""
NOTES_FIT = """() => [...document.querySelectorAll('[data-node-id] .comfy-markdown-content')]
    .every(note => note.scrollHeight <= note.clientHeight)"""
TOLERANCE = 1  # pixel of the graph
BARS = 92  # pixels that the front end's own bars take at the top


def workflow(name):
    return json.loads((build_workflows.WORKFLOWS / f"{name}.json").read_text())


def arrangement(name):
    """What the picture of a workflow depends on, without texts and numbers."""
    return json.dumps([[node["type"], node["pos"], node["size"]] for node in workflow(name)["nodes"]])


DISTINCT = {arrangement(name): name for name in build_workflows.TABLE}.values()


def inside(box, other):
    """Whether a box (left, top, width, height) lies within another."""
    return all(
        other[axis] - TOLERANCE <= box[axis] and box[axis] + box[axis + 2] <= other[axis] + other[axis + 2] + TOLERANCE
        for axis in (0, 1)
    )


def overlap(box, other):
    """Whether two boxes have an area in common."""
    return all(
        box[axis] < other[axis] + other[axis + 2] - TOLERANCE and other[axis] < box[axis] + box[axis + 2] - TOLERANCE
        for axis in (0, 1)
    )


def settled(page, vue):
    """The boxes of all nodes once two looks agree."""
    page.wait_for_function(READY, arg=vue)
    before, now = None, page.evaluate(DRAWN, [vue, BARS])
    while now != before:
        page.wait_for_timeout(150)
        before, now = now, page.evaluate(DRAWN, [vue, BARS])
    return now


@pytest.mark.slow
@pytest.mark.parametrize("vue", [False, True], ids=["classic", "nodes-2"])
@pytest.mark.parametrize("comfy", [NEWEST], indirect=True)
def test_nodes_stay_in_their_groups(comfy, browser, vue):
    settings = {SETTING: vue, METER: True}
    try:
        with FrontEnd(browser, comfy.url, settings=settings) as front_end:
            front_end.page.wait_for_selector(".asv-memory-meter")
            for name in DISTINCT:
                front_end.load(workflow(name))
                drawn = settled(front_end.page, vue)
                assert drawn["scale"] * TEXT >= LEGIBLE, name
                assert all(inside(group, drawn["free"]) for group in drawn["groups"]), name
                for number, (title, box) in enumerate(drawn["nodes"]):
                    assert any(inside(box, group) for group in drawn["groups"]), (name, title)
                    others = drawn["nodes"][number + 1 :]
                    assert [other for other, place in others if overlap(box, place)] == [], (name, title)
                if vue:
                    text = front_end.page.locator("body").inner_text()
                    assert all(title in text for title, _ in drawn["nodes"]), name
                    assert front_end.page.evaluate(NOTES_FIT), name
            assert front_end.errors == [] and front_end.dialogs() == []
    finally:
        for key in settings:
            comfy.post(f"/settings/{key}", False)
