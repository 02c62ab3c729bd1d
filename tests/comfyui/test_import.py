"""Importing the pack in ComfyUI: no module that ComfyUI has not loaded itself, and no connection."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .trees import VERSIONS, tree

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {
    "accelerate",
    "av",
    "decord",
    "diffusers",
    "gguf",
    "huggingface_hub",
    "matplotlib",
    "numba",
    "pandas",
    "playwright",
    "scipy",
    "sentencepiece",
    "sklearn",
    "tokenizers",
    "torchaudio",
    "torchvision",
    "transformers",
}
"""Modules that take long to import, or that the pack must not need."""

COMFYUI = {"comfyui_version", "comfy_api", "comfy_execution", "execution", "server", "app", "_pack"}


@pytest.mark.parametrize("version", VERSIONS)
def test_the_pack_loads_nothing_heavy_and_opens_no_socket(version):
    """ComfyUI has loaded only its ``nodes`` here, so that more is left for the pack to load than in a real start."""
    command = [sys.executable, str(ROOT / "benchmarks" / "import_time.py"), "--measure", "few"]
    environment = os.environ | {"COMFYUI_DIR": str(tree(version))}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    row = json.loads(result.stdout.splitlines()[-1])
    assert "apple_silicon_video" in row["modules"] and row["pack_seconds"] > 0
    assert not HEAVY & set(row["modules"])
    assert set(row["modules"]) - set(sys.stdlib_module_names) - COMFYUI == {"apple_silicon_video"}
    assert row["connections"] == []
