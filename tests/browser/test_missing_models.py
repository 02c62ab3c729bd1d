"""A workflow opened without its files: what the real front ends offer for download, and what this pack adds to it.

The front ends list every file of ``properties.models`` with its folder, but their own code (isModelDownloadable, or
MissingModelsWarning in 1.39) gives a Download button to a few suffixes only, and .gguf is none of them. The pack's
loaders carry one of their own then (web/js/missing_files.js), and every name in a workflow's note is a link.
"""

import json
import re

import build_workflows
import pytest
from apple_silicon_video.tests.comfyui.trees import VERSIONS
from published_tables import published_table

from .conftest import FULL_SIZE
from .pages import FrontEnd

FILES, WORKFLOWS = build_workflows.FILES, build_workflows.WORKFLOWS
NEWEST = max(VERSIONS, key=lambda version: tuple(map(int, version.split("."))))
CLICKED = "wan2.2_i2v_a14b_fast_24gb"
BUTTON, OFFER = "download_missing_file", "Download for models/"
DIALOG = ".comfy-missing-models"
PANEL = "[data-testid=error-group-missing-model]"
OVERLAY = "[data-testid=error-overlay-see-errors]"
LIST = f"{DIALOG}, {PANEL}"
PLACE = f"""id => {{
    const node = window.app.graph.getNodeById(id), {{ds, canvas}} = window.app.canvas
    const {{left, top}} = canvas.getBoundingClientRect(), row = node.widgets.find(each => each.name === '{BUTTON}')
    return [left + (node.pos[0] + node.size[0] / 2 + ds.offset[0]) * ds.scale,
            top + (node.pos[1] + row.last_y + 10 + ds.offset[1]) * ds.scale]
}}"""
LABELS = f"""() => window.app.graph._nodes.flatMap(node => (node.widgets || [])
    .filter(widget => widget.name === '{BUTTON}').map(widget => [Number(node.id), widget.label]))"""


def workflow(name):
    return json.loads((WORKFLOWS / f"{name}.json").read_text())


def wanted(name):
    """File name -> node of the first loader that names it."""
    nodes = workflow(name)["nodes"]
    return {model["name"]: node for node in reversed(nodes) for model in node["properties"].get("models", ())}


def url(node):
    return node["properties"]["models"][0]["url"]


DISTINCT = {frozenset(wanted(name)): name for name in build_workflows.TABLE}.values()


@pytest.mark.parametrize("name", FILES)
def test_address_and_size(name):
    """Of the form that the hub serves files under; as large as the tensors that the plans of memory know."""
    hub = r"https://huggingface\.co/[\w.-]+/[\w.-]+/resolve/main/([\w.-]+/)*"
    assert re.fullmatch(hub + re.escape(name), FILES[name].url)
    size = sum(entry.nbytes for entry in published_table(name).entries.values()) / 1e9
    assert FILES[name].gigabytes == pytest.approx(size, abs=0.05)


@pytest.fixture
def empty(comfy):
    """The server while none of the workflows' files is there."""
    files = [comfy.base / "models" / file.directory / name for name, file in FILES.items()]
    for file in files:
        file.unlink(missing_ok=True)
    yield comfy
    for file in files:
        file.touch()


class Hub:
    """Stands in for the network: gives a file for every address of the hub, and notes which were saved."""

    def __init__(self, page):
        self.page, self.saved = page, []
        page.context.on("page", lambda opened: opened.on("download", self._saved))
        page.on("download", self._saved)
        page.context.route("https://huggingface.co/**", self._answer)

    def _saved(self, download):
        self.saved.append(download.url)

    def _answer(self, route):
        headers = {"content-disposition": "attachment", "access-control-allow-origin": "*"}
        route.fulfill(status=200, headers=headers, content_type="application/octet-stream", body="x")

    def after(self, click, urls):
        """Click, and wait until these addresses have been saved as files."""
        before = len(self.saved)
        click()
        for _ in range(100):
            if len(self.saved) >= before + len(urls):
                break
            self.page.wait_for_timeout(50)
        assert sorted(self.saved[before:]) == sorted(urls)


def listed(page, expected):
    """File name -> folder in the front end's own list of missing files, once it is as expected or seconds have gone."""
    page.locator(f"{LIST}, {OVERLAY}").first.wait_for()
    if page.locator(OVERLAY).count() and not page.locator(PANEL).count():
        page.locator(OVERLAY).click()
    for _ in range(100):
        if (found := read(page.locator(LIST).inner_text())) == expected:
            break
        page.wait_for_timeout(100)
    return found


def read(text):
    """Our files -> folder: "folder / name", a heading "folder (2)", or the line below the name.

    The front end's own default graph may have left a file of its own in the list.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    folder, found = None, {}
    for number, line in enumerate(lines):
        if heading := re.fullmatch(r"(\w+) \(\d+\)", line):
            folder = heading[1]
        name = re.search(r"(?:(\w+) / )?(\S+\.(?:gguf|safetensors))(?: \(\d+\))?$", line)
        if name and name[2] in FILES:
            found[name[2]] = name[1] or folder or lines[number + 1].split()[0]
    return found


def offered(page):
    """Our files that the front end's own list has a working Download button for -> that button."""
    found = {}
    for button in page.locator(f"{DIALOG} button:has-text('Download'), [data-testid=missing-model-download]").all():
        name = re.split(r"[ /]", button.get_attribute("aria-label") or button.get_attribute("title"))[-1]
        if name in FILES and button.is_enabled():
            found[name] = button
    return found


@pytest.mark.slow
def test_every_missing_file_is_listed_and_can_be_had(empty, browser):
    settings = {"Comfy.Workflow.ShowMissingModelsWarning": True, "Comfy.Minimap.Visible": False}
    with FrontEnd(browser, empty.url, settings=settings, online=True) as front_end:
        page, hub = front_end.page, Hub(front_end.page)
        for name in [*(name for name in DISTINCT if name != CLICKED), CLICKED]:
            files = wanted(name)
            front_end.load(workflow(name))
            folders = {file: FILES[file].directory for file in files}
            assert listed(page, folders) == folders, name
            buttons = offered(page)
            assert set(buttons) == {file for file in files if file.endswith(".safetensors")}, name
            ours = [node for node in files.values() if node["type"].startswith("MPS")]
            labels = {node["id"]: f"{OFFER}{node['properties']['models'][0]['directory']}" for node in ours}
            assert dict(page.evaluate(LABELS)) == labels, name
            if name != CLICKED:
                page.keyboard.press("Escape")
                page.locator(DIALOG).wait_for(state="detached")

        for file, button in buttons.items():
            hub.after(button.click, [FILES[file].url])
        page.keyboard.press("Escape")
        page.locator(DIALOG).wait_for(state="detached")
        for node in ours:
            hub.after(lambda node=node: page.mouse.click(*page.evaluate(PLACE, node["id"])), [url(node)])
        links = page.locator(".comfy-markdown a")
        named = {link.inner_text(): link.get_attribute("href") for link in links.all()}
        assert named == {file: FILES[file].url for file in files}
        hub.after(links.first.click, [links.first.get_attribute("href")])

        kept = {node["id"]: node.get("widgets_values", []) for node in front_end.workflow()["nodes"]}
        assert kept == {node["id"]: node["widgets_values"] for node in workflow(CLICKED)["nodes"]}
        assert BUTTON not in json.dumps(front_end.prompt())
        assert front_end.errors == []


@pytest.mark.slow
@pytest.mark.parametrize("comfy", [NEWEST], indirect=True)
def test_the_button_in_nodes_2(empty, browser):
    """It is a Vue component, leaves when the file has come or another is chosen, and opens the hub's addresses only."""
    setting = "Comfy.VueNodes.Enabled"
    try:
        with FrontEnd(browser, empty.url, settings={setting: True}, online=True) as front_end:
            page, hub = front_end.page, Hub(front_end.page)
            shipped = workflow(CLICKED)
            front_end.load(shipped)
            ours = [node for node in wanted(CLICKED).values() if node["type"].startswith("MPS")]
            for node in ours:
                button = page.locator(f"[data-node-id='{node['id']}'] button", has_text=OFFER)
                hub.after(button.click, [url(node)])
                folder = empty.base / "models" / node["properties"]["models"][0]["directory"]
                page.get_by_text(f"move it to {folder} and press R").first.wait_for()
            assert front_end.errors == []

            there, *missing = ours
            model = there["properties"]["models"][0]
            (empty.base / "models" / model["directory"] / model["name"]).touch()
            page.keyboard.press("r")
            page.locator(f"[data-node-id='{there['id']}'] button", has_text=OFFER).wait_for(state="detached")
            assert sorted(id for id, _ in page.evaluate(LABELS)) == sorted(node["id"] for node in missing)
            assert page.locator("[data-node-id] button", has_text=OFFER).count() == len(missing)

            loader = page.locator(f"[data-node-id='{missing[-1]['id']}']")
            loader.locator("[role=combobox]").first.click()
            page.locator("[role=option]", has_text=FULL_SIZE).click()
            loader.locator("button", has_text=OFFER).wait_for(state="detached")

            for node, address in zip(missing, ("javascript:alert(1)", "https://example.com/a.gguf"), strict=False):
                shipped["nodes"][node["id"] - 1]["properties"]["models"][0]["url"] = address
            front_end.load(shipped)
            assert [id for id, _ in page.evaluate(LABELS)] == [node["id"] for node in missing[2:]]
    finally:
        empty.post(f"/settings/{setting}", False)


@pytest.mark.slow
def test_the_button_in_chinese(empty, browser):
    setting = "Comfy.Locale"
    try:
        with FrontEnd(browser, empty.url, settings={setting: "zh"}) as front_end:
            front_end.load(workflow(CLICKED))
            ours = [node for node in wanted(CLICKED).values() if node["type"].startswith("MPS")]
            folders = {node["id"]: node["properties"]["models"][0]["directory"] for node in ours}
            labels = {node: f"下载（放入 models/{folder}）" for node, folder in folders.items()}
            assert dict(front_end.page.evaluate(LABELS)) == labels
            assert front_end.errors == []
    finally:
        empty.post(f"/settings/{setting}", "en")
