"""Drives ComfyUI's real front end in Chromium: opens it, loads graphs, and reads what it made of them."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, ConsoleMessage, Page, TimeoutError, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
APPLICATIONS = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
)
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.Workflow.ShowMissingModelsWarning": False}
READY = "window.app && window.app.graph && window.app.extensionManager && window.app.vueAppReady !== false"
FOREIGN = ("Failed to load resource", "Content Security Policy")
"""Errors that are none of a graph's: files that need not be there, and the sizes of models on the network."""

PATIENCE = 120_000  # ms


def executable() -> str:
    """Chromium's path: $CHROMIUM, the first of the usual names on the path, or a Mac's application."""
    found = [os.environ.get("CHROMIUM"), *map(shutil.which, NAMES), *filter(os.path.exists, APPLICATIONS)]
    path = next(filter(None, found), None)
    assert path, "Chromium is missing: install it, or set CHROMIUM to its path."
    return path


@contextmanager
def chromium() -> Iterator[Browser]:
    """A headless browser."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable(), args=ARGUMENTS)
        try:
            yield browser
        finally:
            browser.close()


class FrontEnd:
    """One page with ComfyUI in it; ``errors`` collects uncaught errors and the console's error messages."""

    def __init__(
        self,
        browser: Browser,
        url: str,
        *,
        settings: dict[str, Any] | None = None,
        size: tuple[int, int] = (1920, 1080),
        online: bool = False,
    ) -> None:
        """Open the front end at ``url`` with ``settings`` stored on its server, and wait until it is ready.

        ComfyUI's --disable-api-nodes, which the tests' servers run with, forbids the page other addresses than its own;
        ``online`` lifts that.
        """
        viewport = {"width": size[0], "height": size[1]}
        self.page: Page = browser.new_page(viewport=viewport, bypass_csp=online)
        self.errors: list[str] = []
        self.page.set_default_timeout(PATIENCE)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", self._heard)
        for key, value in (SETTINGS | (settings or {})).items():
            self.page.request.post(f"{url}/settings/{key}", data=json.dumps(value))
        self.page.goto(url)
        self.page.wait_for_function(READY)
        self.page.wait_for_load_state("networkidle")  # it looks for its default graph's missing files until then
        self.errors.clear()  # asking for the graph too early is one

    def close(self) -> None:
        """Close the page."""
        self.page.close()

    def __enter__(self) -> "FrontEnd":
        """Nothing more to open."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the page."""
        self.close()

    def _heard(self, message: ConsoleMessage) -> None:
        if message.type == "error" and not any(words in message.text for words in FOREIGN):
            self.errors.append(message.text)

    def load(self, workflow: dict[str, Any]) -> None:
        """Load a workflow in the UI's format, as opening its file does."""
        self.page.evaluate("workflow => window.app.loadGraphData(workflow)", workflow)

    def drop(self, path: str, kind: str) -> None:
        """Hand a file to the front end's own reader, as dropping it onto the canvas does."""
        content = list(Path(path).read_bytes())
        script = """async ([bytes, name, type]) => {
            await window.app.handleFile(new File([new Uint8Array(bytes)], name, {type}))
        }"""
        self.page.evaluate(script, [content, os.path.basename(path), kind])

    def nodes(self) -> list[dict[str, Any]]:
        """Every node: type, title, whether the front end knows it, its widgets by name, its size and place."""
        return self.page.evaluate("""() => window.app.graph._nodes.map(node => ({
            id: Number(node.id), type: node.type, title: node.title,
            known: node.type in LiteGraph.registered_node_types,
            widgets: Object.fromEntries((node.widgets || []).map(widget => [widget.name, widget.value])),
            size: [node.size[0], node.size[1]], pos: [node.pos[0], node.pos[1]]
        }))""")

    def marked(self) -> list[str]:
        """The types of the nodes that stay marked as faulty; files are looked for in the background."""
        with suppress(TimeoutError):
            self.page.wait_for_function("() => window.app.graph._nodes.every(node => !node.has_errors)", timeout=20_000)
        return self.page.evaluate(
            "() => window.app.graph._nodes.filter(node => node.has_errors).map(node => node.type)"
        )

    def workflow(self) -> dict[str, Any]:
        """The graph as the front end would save it."""
        return self.page.evaluate("() => window.app.graph.serialize()")

    def prompt(self) -> dict[str, Any]:
        """The graph in API format, as the front end would queue it."""
        return self.page.evaluate("async () => (await window.app.graphToPrompt()).output")

    def queue(self) -> None:
        """Press Run."""
        self.page.evaluate("() => window.app.queuePrompt(0, 1)")

    def dialogs(self) -> list[str]:
        """The text of every dialog that stands open."""
        return self.page.evaluate("""() => [...document.querySelectorAll('.p-dialog, .comfy-modal, [role=dialog]')]
            .filter(element => element.offsetParent !== null && element.innerText.trim())
            .map(element => element.innerText)""")

    def screenshot(self, path: str) -> None:
        """Save what the window shows."""
        self.page.screenshot(path=path)
