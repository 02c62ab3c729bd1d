"""Every command in README.md, run as it is written, in the files that the registry's archive holds.

What a command needs is made small beforehand under the name that README uses. A command that no table here has fails.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import apple_silicon_video.tests.scripts_path  # noqa: F401
import numpy as np
import pytest
from apple_silicon_video.tests.archive import ROOT, archive_files, unpack_archive
from apple_silicon_video.tests.readme import blocks, commands
from PIL import Image

from .trees import VERSIONS, tree

import small_models as make  # isort: skip

ELSEWHERE = {
    "cd ComfyUI/custom_nodes": "tests/comfyui/test_server.py::test_pack_registers_every_node_that_has_a_help_page",
    "git clone <this repository> apple-silicon-video": (
        "tests/comfyui/test_server.py::test_pack_registers_every_node_that_has_a_help_page"
    ),
    "scripts/demo.sh": "tests/comfyui/test_demo.py::test_demo_ends_with_a_playable_video",
    "scripts/demo.sh --models ComfyUI/models": (
        "tests/comfyui/test_demo.py::test_models_of_the_user_run_under_their_own_names"
    ),
    "scripts/demo.sh --models ComfyUI/models --workflow wan2.1_t2v_1.3b_16gb": (
        "tests/comfyui/test_demo.py::test_models_of_the_user_run_under_their_own_names"
    ),
    "scripts/test.sh": ".ci/run",
}
"""Commands that other tests run (in custom_nodes lies a link there); scripts/test.sh is what runs all of them."""

SMALLER = {"python benchmarks/run.py": " --small --only open"}
"""What is added to commands that would take minutes; tests/unit/test_benchmarks.py runs the other benchmarks."""

RESULTS = {
    "scripts/demo.sh --help": (r"^usage: .*--models", ()),
    "python scripts/gguf.py quantize model.safetensors model-Q5_K_M.gguf --type Q5_K_M": (
        "model-Q5_K_M.gguf",
        ("model-Q5_K_M.gguf",),
    ),
    "python scripts/gguf.py inspect model-Q5_K_M.gguf": (r"head\.head\.bias", ()),
    "python scripts/gguf.py dequantize model-Q5_K_M.gguf head.head.bias bias.npy --dtype float32": ("", ("bias.npy",)),
    "python scripts/video.py encode pictures clip.mp4 --fps 16": (r"clip\.mp4: 64x48, 9 frames at 16", ("clip.mp4",)),
    "python scripts/video.py info clip.mp4": (r"64 ?x ?48", ()),
    "python scripts/video.py frames clip.mp4 --start 0 --count 5 --out first-frames": ("5 frames", ("first-frames",)),
    "python scripts/plan_memory.py --model model.safetensors --width 832 --height 480 --frames 81 --ram 16": (
        r"fits on a 16 GB Mac",
        (),
    ),
    "python scripts/plan_memory.py --model model.safetensors --width 832 --height 480 --frames 81 --macs": (
        r"128",
        (),
    ),
    "python benchmarks/run.py": ("Opening GGUF files", ()),
    "python benchmarks/import_time.py": (r'"pack_seconds": \d', ()),
    "python scripts/doctor.py --quick": (r"^verdict +defect", ()),
    "python scripts/doctor.py --markdown": (r"^\|", ()),
    "python scripts/build_workflows.py": ("", ()),
    "python scripts/build_readme.py": ("", ()),
}
"""Command -> what it prints (a regular expression), and what it makes."""

TEST_RUN = re.compile(r"scripts/test\.sh (\S+)")
RUN_HERE = [block for block in blocks() if not set(block) <= set(ELSEWHERE)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The archive's files with a small Wan model and nine pictures beside them."""
    path = tmp_path_factory.mktemp("apple-silicon-video")
    unpack_archive(path)
    weights = make.wan_weights("wan2.1-t2v-1.3b", "F16")
    make.write_wan_reference(path / "model.safetensors", weights)
    (path / "pictures").mkdir()
    for number in range(9):
        pixels = np.full((48, 64, 3), 20 * number, np.uint8)
        Image.fromarray(pixels).save(path / "pictures" / f"{number:03}.png")
    return path


def contents(folder):
    """What each file of the archive holds in an unpacked one."""
    return {file: (folder / file).read_bytes() for file in archive_files() if (folder / file).exists()}


def shell(command, folder):
    """Run a command as a terminal in that folder would, with this Python and the newest ComfyUI."""
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "COMFYUI_DIR": str(tree(VERSIONS[-1])),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("block", RUN_HERE, ids=lambda block: block[0])
def test_commands_run_as_written(block, folder):
    before = contents(folder)
    for command in block:
        if command in ELSEWHERE:
            continue
        printed, made = RESULTS[command]
        result = shell(command + SMALLER.get(command, ""), folder)
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
        assert re.search(printed, result.stdout, re.MULTILINE | re.DOTALL), f"{command}\n{result.stdout}"
        assert all((folder / name).exists() for name in made), command
    assert contents(folder) == before


def test_every_command_is_in_a_table():
    known = set(ELSEWHERE) | set(RESULTS)
    unknown = [command for command in commands() if command not in known and not TEST_RUN.fullmatch(command)]
    assert unknown == []
    assert known <= set(commands()) and set(SMALLER) <= set(RESULTS)


def test_tests_that_are_named_exist():
    for command in commands():
        if found := TEST_RUN.fullmatch(command):
            assert (ROOT / found[1]).exists(), command
    for place in ELSEWHERE.values():
        file, _, function = place.partition("::")
        assert f"def {function}(" in (ROOT / file).read_text() if function else (ROOT / file).is_file(), place
