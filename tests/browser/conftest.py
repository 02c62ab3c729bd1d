"""One Chromium for all browser tests of a worker, and one server for each pinned ComfyUI with its own front end."""

import apple_silicon_video.tests.scripts_path  # noqa: F401
import build_workflows
import pytest
from apple_silicon_video.tests.comfyui.server import server
from apple_silicon_video.tests.comfyui.trees import VERSIONS
from PIL import Image
from small_models import write_full_size_wan

from .frontends import frontend
from .pages import chromium

import demo  # isort: skip

FULL_SIZE = "full-size-14b-Q3_K_M.gguf"
"""A sparse file of a real model's size, for what only reads its table."""


@pytest.fixture(scope="session")
def browser():
    with chromium() as running:
        yield running


@pytest.fixture(scope="session", params=VERSIONS)
def comfy(request, tmp_path_factory):
    """A server whose model folders list every file that the workflows name; the files themselves are empty."""
    base = tmp_path_factory.mktemp(f"browser-{request.param}")
    for name, (directory, *_) in build_workflows.FILES.items():
        (base / "models" / directory).mkdir(parents=True, exist_ok=True)
        (base / "models" / directory / name).touch()
    (base / "input").mkdir()
    Image.new("RGB", (64, 64)).save(base / "input" / "example.png")
    (base / "input" / "example.mp4").write_bytes(demo.moving_gradient())
    write_full_size_wan(base / "models" / "diffusion_models" / FULL_SIZE, "wan2.1-t2v-14b", "Q3_K_M", "sparse")
    arguments = ["--cpu", "--front-end-root", str(frontend(request.param))]
    with server(request.param, base, arguments=arguments) as running:
        yield running
