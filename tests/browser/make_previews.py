"""Makes the preview pictures of the workflows: each one in the real front end, as a JPEG beside its file.

    .venv/bin/python tests/browser/make_previews.py [NAME ...]

The templates menu of ComfyUI shows them. They are made by hand after a workflow has changed, looked at, and committed.
"""

import io
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "scripts"))

from _pack import load_pack  # noqa: E402

load_pack()

import build_workflows  # noqa: E402
import demo  # noqa: E402
from apple_silicon_video.tests.browser.frontends import frontend  # noqa: E402
from apple_silicon_video.tests.browser.pages import FrontEnd, chromium  # noqa: E402
from apple_silicon_video.tests.comfyui.server import server  # noqa: E402
from apple_silicon_video.tests.comfyui.trees import VERSIONS  # noqa: E402
from PIL import Image  # noqa: E402

WIDTH, QUALITY = 1280, 82
MARGIN = 30  # pixels of the picture around the groups
SIDE = 75  # pixels that the front end's own bar takes at the left
FIT = """([margin, side, bar]) => {
    const canvas = window.app.canvas, groups = window.app.graph._groups
    const left = Math.min(...groups.map(g => g._bounding[0])), top = Math.min(...groups.map(g => g._bounding[1]))
    const right = Math.max(...groups.map(g => g._bounding[0] + g._bounding[2]))
    const bottom = Math.max(...groups.map(g => g._bounding[1] + g._bounding[3]))
    const element = canvas.canvas
    const width = element.clientWidth - side - 2 * margin, height = element.clientHeight - bar - 2 * margin
    const scale = Math.min(width / (right - left), height / (bottom - top))
    canvas.ds.scale = scale
    canvas.ds.offset[0] = (margin + side) / scale - left
    canvas.ds.offset[1] = (margin + bar) / scale - top
    canvas.setDirty(true, true)
    return [(right - left) * scale + 2 * margin, (bottom - top) * scale + 2 * margin]
}"""
SETTINGS = {"Comfy.Graph.CanvasInfo": False, "Comfy.Graph.CanvasMenu": False, "Comfy.Minimap.Visible": False}
BAR = 100  # pixels that the front end's own bars take at the top


def main(names: list[str]) -> None:
    """Write the pictures of these workflows, all by default."""
    version = max(VERSIONS, key=lambda version: tuple(map(int, version.split("."))))
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        for name, (directory, *_) in build_workflows.FILES.items():
            (base / "models" / directory).mkdir(parents=True, exist_ok=True)
            (base / "models" / directory / name).touch()
        (base / "input").mkdir()
        Image.new("RGB", (832, 480), "#6b7a99").save(base / "input" / "example.png")
        (base / "input" / "example.mp4").write_bytes(demo.moving_gradient())
        arguments = ["--cpu", "--front-end-root", str(frontend(version))]
        with (
            server(version, base, arguments=arguments) as comfy,
            chromium() as browser,
            FrontEnd(browser, comfy.url, settings=SETTINGS, size=(2560, 1440)) as page,
        ):
            for name in names or build_workflows.TABLE:
                page.load(json.loads((build_workflows.WORKFLOWS / f"{name}.json").read_text()))
                page.page.wait_for_timeout(1500)
                size = page.page.evaluate(FIT, [MARGIN, SIDE, BAR])
                page.page.wait_for_timeout(700)
                box = page.page.locator("#graph-canvas").bounding_box()
                clip = {"x": box["x"] + SIDE, "y": box["y"] + BAR, "width": size[0], "height": size[1]}
                picture = Image.open(io.BytesIO(page.page.screenshot(clip=clip))).convert("RGB")
                picture.thumbnail((WIDTH, WIDTH), Image.Resampling.LANCZOS)
                picture.save(build_workflows.WORKFLOWS / f"{name}.jpg", quality=QUALITY, optimize=True)
                print(f"{name}.jpg {picture.size}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
