"""The child process that sets off what would harm this one: its answers, with the simulated device and without."""

import os
from pathlib import Path

import pytest
from apple_silicon_video.mps_patches import child_probe, first_use

LIMIT = 1 << 16
THRESHOLDS = {"cat-2-31": "elements", "int-max-dims": "dim"}

# Python runs this before the script of a child process.
SITE = f"""
import sys
sys.path.insert(0, {str(Path(__file__).resolve().parents[1])!r})
from simulated_mps.environment import install_from_environment
install_from_environment()
"""


@pytest.fixture(autouse=True)
def fresh():
    first_use.forget()
    yield
    first_use.forget()


@pytest.fixture
def simulated(tmp_path, monkeypatch):
    """Child processes have the simulated device, with the rules of a text."""

    def with_rules(rules):
        (tmp_path / "sitecustomize.py").write_text(SITE)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
        monkeypatch.setenv("SIMULATED_RULES", rules)
        first_use.forget()

    return with_rules


@pytest.mark.parametrize("name", THRESHOLDS)
def test_right_and_wrong_devices(name, simulated):
    simulated("")
    right = first_use.in_child(name, LIMIT)
    assert right.ok and right.applicable and "process of its own" in right.detail
    assert first_use.in_child(name, LIMIT) is right, "a process is started twice for one answer"
    simulated(f"{name}:{THRESHOLDS[name]}={LIMIT}")
    wrong = first_use.in_child(name, LIMIT)
    assert not wrong.ok and wrong.applicable and wrong.error > 0


def test_without_mps_there_is_no_evidence():
    found = first_use.in_child("cat-2-31", LIMIT)
    assert found.ok and not found.applicable and "no MPS device" in found.detail


def test_a_child_that_is_ended_is_evidence_and_one_that_cannot_run_is_none(tmp_path, monkeypatch):
    scripts = {
        "abort": ("import os, signal; os.kill(os.getpid(), signal.SIGABRT)", False, True, "signal 6"),
        "broken": ("raise SystemExit('no torch here')", True, False, "no torch here"),
        "unable": ('print(\'{"unable": "no device"}\')', True, False, "no device"),
        "silent": ("", True, False, "no output"),
    }
    for number, (name, (text, ok, applicable, said)) in enumerate(scripts.items()):
        script = tmp_path / f"{name}.py"
        script.write_text(text)
        monkeypatch.setattr(child_probe, "__file__", str(script))
        found = first_use.in_child("cat-2-31", number)
        assert (found.ok, found.applicable) == (ok, applicable) and said in found.detail, (name, found)
    monkeypatch.setattr(first_use.sys, "executable", str(tmp_path / "missing"))
    assert not first_use.in_child("cat-2-31", 99).applicable
