"""The environment that prestartup_script.py sets, for Macs of all sizes and whatever the user has set."""

import importlib.util
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "prestartup_script.py"
GIB = 1 << 30


def load():
    spec = importlib.util.spec_from_file_location("prestartup_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


prestartup = load()


@pytest.mark.parametrize("gigabytes", [8, 16, 18, 24, 32, 36, 48, 64, 96, 128, 192, 512])
def test_ceiling_is_85_percent_of_the_memory(gigabytes):
    chosen = prestartup.settings(gigabytes * GIB, {})
    recommended = (2 / 3 if gigabytes <= 36 else 3 / 4) * gigabytes
    high, low = float(chosen[prestartup.HIGH]), float(chosen[prestartup.LOW])
    assert high * recommended == pytest.approx(0.85 * gigabytes, rel=1e-2)
    assert low <= high < 1.7
    assert chosen[prestartup.FALLBACK] == "1"


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"PYTORCH_MPS_HIGH_WATERMARK_RATIO": "0.5"}, {"PYTORCH_MPS_LOW_WATERMARK_RATIO": "0.500"}),
        ({"PYTORCH_MPS_HIGH_WATERMARK_RATIO": "0.0"}, {"PYTORCH_MPS_LOW_WATERMARK_RATIO": "1.000"}),
        ({"PYTORCH_MPS_HIGH_WATERMARK_RATIO": "1.5"}, {"PYTORCH_MPS_LOW_WATERMARK_RATIO": "1.000"}),
        ({"PYTORCH_MPS_LOW_WATERMARK_RATIO": "1.6"}, {}),
        ({"PYTORCH_MPS_HIGH_WATERMARK_RATIO": "1.5", "PYTORCH_MPS_LOW_WATERMARK_RATIO": "0.9"}, {}),
    ],
)
def test_what_the_user_set_stays(environ, expected):
    chosen = prestartup.settings(16 * GIB, environ | {"PYTORCH_ENABLE_MPS_FALLBACK": "0"})
    assert chosen == expected


def test_changes_nothing_elsewhere(monkeypatch):
    before = dict(os.environ)
    load()
    assert dict(os.environ) == before
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    load()
    assert dict(os.environ) == before


def test_sets_the_environment_on_apple_silicon(monkeypatch):
    for name in (prestartup.HIGH, prestartup.LOW, prestartup.FALLBACK):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    load()
    assert float(os.environ[prestartup.LOW]) <= float(os.environ[prestartup.HIGH])
    for name in (prestartup.HIGH, prestartup.LOW, prestartup.FALLBACK):
        monkeypatch.delenv(name)


def test_never_imports_torch():
    code = f"import runpy, sys; runpy.run_path({str(SCRIPT)!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
