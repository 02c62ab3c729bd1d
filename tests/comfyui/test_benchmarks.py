"""The benchmark of loading, at tiny size, in the newest of the pinned ComfyUI versions."""

import json
import os
import subprocess
import sys
from pathlib import Path

from .trees import VERSIONS, tree

RUN = Path(__file__).resolve().parents[2] / "benchmarks" / "run.py"


def test_loading_is_measured(tmp_path):
    command = [sys.executable, str(RUN), "--small", "--only", "load", "--json", str(tmp_path / "load.json")]
    environment = os.environ | {"COMFYUI_DIR": str(tree(VERSIONS[-1]))}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "load.json").read_text())["sections"]["load"]
    assert [row["loader"] for row in rows] == ["the pack", "core"]
    for row in rows:
        assert row["seconds"] > 0 and row["model_bytes"] > 0 and row["peak_bytes"] >= row["resident_bytes"]
    assert rows[0]["file_bytes"] == rows[1]["file_bytes"] > rows[0]["largest_tensor_bytes"]
    assert "Loading models into ComfyUI" in result.stdout


def test_a_failing_measurement_is_named(tmp_path):
    environment = os.environ | {"COMFYUI_DIR": str(tmp_path)}
    command = [sys.executable, str(RUN), "--small", "--only", "load"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "COMFYUI_DIR" in result.stderr.splitlines()[-1] and "Traceback" not in result.stderr
