"""Files of Save Video dropped onto the real front end of each pinned ComfyUI: the graph comes back as it was."""

import json

import pytest
from apple_silicon_video.tests.comfyui.server import server
from apple_silicon_video.tests.comfyui.trees import VERSIONS

from .frontends import frontend
from .pages import FrontEnd

KINDS = {
    "h264-mp4": "video/mp4",
    "hevc-10bit-mp4": "video/mp4",
    "av1-mp4": "video/mp4",
    "prores4444-mov": "video/quicktime",
    "vp9-webm": "video/webm",
    "webp": "image/webp",
    "png-8bit": "image/png",
}
TEXT = 'a fox } { "狐" \\ } \n' + "x" * 20_000
EMPTY = {"last_node_id": 0, "last_link_id": 0, "nodes": [], "links": [], "groups": [], "version": 0.4}
WORKFLOW = EMPTY | {
    "last_node_id": 2,
    "nodes": [
        {"id": 1, "type": "EmptyImage", "pos": [10, 20], "size": [300, 130], "widgets_values": [64, 48, 5, 255]},
        {"id": 2, "type": "Note", "pos": [400, 20], "size": [300, 130], "widgets_values": [TEXT]},
    ],
}


def prompt():
    """One picture saved in every format that can carry a workflow, and once as an H.264 file's first frame."""
    picture = {"width": 64, "height": 48, "batch_size": 5, "color": 255}
    graph = {"1": {"class_type": "EmptyImage", "inputs": picture}}
    for name in KINDS:
        inputs = {"images": ["1", 0], "fps": 16.0, "filename_prefix": name, "format": name, "quality": "standard"}
        graph[name] = {"class_type": "MPSSaveVideo", "inputs": inputs | {"first_frame": name == "h264-mp4"}}
    return graph


@pytest.fixture(scope="module", params=VERSIONS)
def comfy(request, tmp_path_factory):
    arguments = ["--cpu", "--front-end-root", str(frontend(request.param))]
    with server(request.param, tmp_path_factory.mktemp("saved"), arguments=arguments) as running:
        running.run(prompt(), workflow=WORKFLOW)
        yield running


@pytest.mark.slow
def test_a_dropped_file_restores_its_workflow(comfy, browser):
    files = {name: sorted((comfy.base / "output").glob(f"{name}_00001_*")) for name in KINDS}
    first_frame = next(path for path in files["h264-mp4"] if path.suffix == ".png")
    files["h264-mp4"].remove(first_frame)
    dropped = [(files[name][0], kind) for name, kind in KINDS.items()] + [(first_frame, "image/png")]
    with FrontEnd(browser, comfy.url) as page:
        for path, kind in dropped:
            page.load(EMPTY)
            assert page.nodes() == []
            page.drop(str(path / "frame_000003.png" if path.is_dir() else path), kind)
            nodes = {node["id"]: node for node in page.nodes()}
            assert [node["type"] for node in nodes.values()] == ["EmptyImage", "Note"], path.name
            assert list(nodes[1]["widgets"].values())[:3] == [64, 48, 5], path.name
            assert list(nodes[2]["widgets"].values()) == [TEXT], path.name
            read = page.page.evaluate(
                """async ([bytes, name, type]) => {
                const file = new File([new Uint8Array(bytes)], name, {type})
                return (await window.comfyAPI.parser.getWorkflowDataFromFile(file)).prompt
                }""",
                [list((path / "frame_000001.png" if path.is_dir() else path).read_bytes()), path.name, kind],
            )
            assert (json.loads(read) if isinstance(read, str) else read) == prompt(), path.name


@pytest.mark.slow
def test_the_node_shows_what_it_saved(comfy, browser):
    """What the browser is given after saving can be played or drawn by it."""
    graph = prompt()
    outputs = comfy.run(graph | {"1": {**graph["1"], "inputs": graph["1"]["inputs"] | {"color": 128}}})
    with FrontEnd(browser, comfy.url) as page:
        for name, kind in KINDS.items():
            (shown,) = outputs[name]["images"]
            url = f"{comfy.url}/view?filename={shown['filename']}&subfolder={shown['subfolder']}&type={shown['type']}"
            size = page.page.evaluate(
                """([url, tag]) => new Promise((resolve, reject) => {
                const element = document.createElement(tag)
                const done = () => resolve([element.videoWidth || element.width, element.videoHeight || element.height])
                element.onload = element.onloadeddata = done
                element.onerror = () => reject(`cannot be shown: ${url}`)
                element.src = url
                })""",
                [url, "img" if kind == "image/webp" else "video"],
            )
            assert size == [64, 48], name
