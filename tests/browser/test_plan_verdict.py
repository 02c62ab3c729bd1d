"""Plan Memory in the real front end: the node takes the colour of its verdict, and nothing is logged as an error."""

import pytest

from .conftest import FULL_SIZE
from .pages import FrontEnd

COLORS = {64: "#1f4d36", 16: "#6b4e12", 8: "#6e2226"}
BUILD = """([file, ram]) => {
    window.app.graph.clear()
    const node = LiteGraph.createNode("MPSPlanMemory")
    window.app.graph.add(node)
    const values = {unet_name: file, width: 1280, height: 720, frames: 121, stop_if: "never", ram_gb: ram}
    for (const widget of node.widgets) if (widget.name in values) widget.value = values[widget.name]
    return Number(node.id)
}"""
COLOR = "([id, color]) => window.app.graph.getNodeById(id)?.color === color"


@pytest.mark.slow
def test_node_takes_the_colour_of_its_verdict(comfy, browser):
    with FrontEnd(browser, comfy.url) as page:
        page.errors.clear()
        for ram, color in COLORS.items():
            node = page.page.evaluate(BUILD, [FULL_SIZE, ram])
            page.queue()
            page.page.wait_for_function(COLOR, arg=[node, color])
        assert page.errors == []
