"""The server driver against the real ComfyUI of each pinned version, and the pack's nodes as that server lists them."""

import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest

from .server import PromptError, PromptInterrupted, ServerError, server
from .trees import VERSIONS, tree

HELP_PAGES = Path(__file__).resolve().parents[2] / "web" / "docs"
FIRST_NODES = {"MPSLoadDiffusionModel", "MPSLoadTextEncoder", "MPSLoadVAE", "MPSSaveVideo", "MPSFreeMemory"}

PICTURE = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 48, "batch_size": 1, "color": 255}},
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "picture"}},
}

GUARD = """
import os, runpy, sys
def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        host = arguments[1][0] if event == "socket.connect" and isinstance(arguments[1], tuple) else arguments[0]
        if host not in ("127.0.0.1", "localhost", "::1", None):
            print("NETWORK", event, host, flush=True)
sys.addaudithook(watch)
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(sys.argv[0])
print("GUARDED", flush=True)
runpy.run_path(sys.argv[0], run_name="__main__")
"""

TROUBLE = """
import os, subprocess, time
import comfy.model_management, comfy.utils

class Base:
    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "run", "test", True
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"seed": ("INT", {"default": 0})}}

class Slow(Base):
    def run(self, seed):
        bar = comfy.utils.ProgressBar(2000)
        for _ in range(2000):
            time.sleep(0.05)
            bar.update(1)
            comfy.model_management.throw_exception_if_processing_interrupted()

class Failing(Base):
    def run(self, seed):
        raise ValueError("The file x is broken.\\nmore")

class Dying(Base):
    def run(self, seed):
        os._exit(3)

class Parent(Base):
    def run(self, seed):
        return {"ui": {"pid": [subprocess.Popen(["sleep", "1000"]).pid]}}

NODE_CLASS_MAPPINGS = {cls.__name__: cls for cls in (Slow, Failing, Dying, Parent)}
"""


def snapshot(folder):
    """Every file below a folder with its size and time, but for compiled Python."""
    files = (path for path in folder.rglob("*") if "__pycache__" not in path.parts and path.is_file())
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def alone(kind):
    return {"1": {"class_type": kind, "inputs": {"seed": time.monotonic_ns()}}}


@pytest.fixture(scope="module", params=VERSIONS)
def guarded(request, tmp_path_factory):
    """A server of each version, with every connection attempt in its log; and its tree before the start."""
    base = tmp_path_factory.mktemp(request.param)
    (base / "guard.py").write_text(GUARD)
    before = snapshot(tree(request.param))
    with server(request.param, base, launcher=[str(base / "guard.py")]) as comfy:
        yield comfy, before


@pytest.mark.slow
def test_pack_registers_every_node_that_has_a_help_page(guarded):
    comfy, _ = guarded
    nodes = {
        name: info
        for name, info in comfy.object_info().items()
        if info["python_module"] == "custom_nodes.apple-silicon-video"
    }
    assert set(nodes) == {page.stem for page in HELP_PAGES.glob("*.md")}, comfy.log_text()[-4000:]
    assert set(nodes) >= FIRST_NODES
    assert {info["category"].split("/")[0] for info in nodes.values()} == {"Apple Silicon Video"}


@pytest.mark.slow
def test_no_other_custom_node_is_loaded(guarded):
    comfy, _ = guarded
    modules = {info["python_module"] for info in comfy.object_info().values()}
    assert {name for name in modules if name.startswith("custom_nodes.")} == {"custom_nodes.apple-silicon-video"}


@pytest.mark.slow
def test_prompt_runs_and_names_its_files(guarded):
    comfy, _ = guarded
    heard = []
    outputs = comfy.run(PICTURE, listener=lambda kind, data: heard.append((kind, data.get("node"))))
    (picture,) = comfy.files(outputs, ".png")
    assert picture.parent == comfy.base / "output" and picture.read_bytes()[:4] == b"\x89PNG"
    assert comfy.files(outputs, ".mp4") == []
    assert ("executing", "1") in heard and ("executing", "2") in heard


@pytest.mark.slow
def test_uploaded_image_can_be_loaded(guarded):
    comfy, _ = guarded
    (picture,) = comfy.files(comfy.run(PICTURE))
    name = comfy.upload_image(picture.read_bytes(), "first frame.png")
    load = {"1": {"class_type": "LoadImage", "inputs": {"image": name}}, "2": PICTURE["2"]}
    assert len(comfy.files(comfy.run(load))) == 1


@pytest.mark.slow
def test_refused_prompts_say_why(guarded):
    comfy, _ = guarded
    with pytest.raises(PromptError, match=r"refused the workflow: .*NoSuchNode"):
        comfy.run({"1": {"class_type": "NoSuchNode", "inputs": {}}})
    with pytest.raises(PromptError, match=r"SaveImage \(node 2\): Required input is missing: images"):
        comfy.run({"2": {"class_type": "SaveImage", "inputs": {"filename_prefix": "x"}}})


@pytest.mark.slow
def test_free_is_accepted(guarded):
    comfy, _ = guarded
    comfy.free()
    assert comfy.files(comfy.run(PICTURE))


@pytest.mark.slow
def test_comfyui_folder_and_network_are_left_alone(guarded):
    comfy, before = guarded
    comfy.run(PICTURE)
    assert snapshot(comfy.comfyui) == before
    log = comfy.log_text()
    assert "GUARDED" in log
    assert not re.findall("^NETWORK.*", log, re.MULTILINE)


@pytest.fixture(scope="module")
def trouble(tmp_path_factory):
    """A pack of nodes that are slow, fail, or end the server."""
    folder = tmp_path_factory.mktemp("pack")
    (folder / "__init__.py").write_text(TROUBLE)
    return folder


@pytest.fixture
def comfy(tmp_path, trouble):
    with server(VERSIONS[-1], tmp_path, pack=trouble) as running:
        yield running


@pytest.mark.slow
def test_failures_interruptions_and_time_limits(comfy):
    with pytest.raises(PromptError, match=r"^Failing \(node 1\) failed: The file x is broken$") as failure:
        comfy.run(alone("Failing"))
    assert failure.value.details["exception_type"] == "ValueError"

    stopper = threading.Event()

    def interrupt_at_first_step(kind, _):
        if kind == "progress" and not stopper.is_set():
            stopper.set()
            comfy.interrupt()

    with pytest.raises(PromptInterrupted):
        comfy.run(alone("Slow"), listener=interrupt_at_first_step)
    with pytest.raises(ServerError, match=r"did not end within 0\.5 s"):
        comfy.run(alone("Slow"), timeout=0.5)
    with pytest.raises(ServerError, match=r"ended with status 3 .*comfyui\.log"):
        comfy.run(alone("Dying"))


@pytest.mark.slow
def test_stop_ends_child_processes(comfy):
    (child,) = comfy.run(alone("Parent"))["1"]["pid"]
    os.kill(child, 0)
    comfy.stop()
    comfy.stop()
    with pytest.raises(ServerError, match="not running"):
        comfy.check_alive()
    for _ in range(100):
        if not alive(child):
            return
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the server's child process outlived it")


def alive(pid):
    """Whether a process exists and is more than an entry that nobody has collected."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = f"/proc/{pid}/stat"
    return not os.path.exists(status) or open(status).read().rsplit(")", 1)[1].split()[0] != "Z"


@pytest.mark.slow
def test_failed_start_says_why(tmp_path):
    with pytest.raises(ServerError, match=r"ended with status 2 .*unrecognized arguments: --nonsense.*comfyui\.log"):
        server(VERSIONS[-1], tmp_path, pack=None, arguments=["--nonsense"]).start()
