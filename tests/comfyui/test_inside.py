"""Runs the tests of inside/ once per ComfyUI version, each in a process of its own that imports that ComfyUI."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .trees import VERSIONS, tree

INSIDE = Path(__file__).parent / "inside"
FILES = sorted(path.name for path in INSIDE.glob("test_*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", FILES)
def test_inside(version, name):
    environment = os.environ | {"COMFYUI_DIR": str(tree(version))}
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", str(INSIDE / name)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    print(result.stdout[-8000:], result.stderr[-4000:])
    assert result.returncode == 0, f"{name} fails in ComfyUI {version}"
