"""Cures decided on at the first call of trigger size: the gate, the check, and what is left of them afterwards.

The triggers are scaled down, but counted as too large for a probe at start, as those of 2^31 elements and more are.
"""

from pathlib import Path

import pytest
import simulated_mps as sim
import torch
from apple_silicon_video.mps_patches import doctor, first_use, gate, install, probing
from apple_silicon_video.mps_patches.registry import DEFECTS
from op_cases import CASES, MPS, SCALED, THRESHOLDS, only, owners

WATCHED = ("int-max-dims", "bmm-2-32", "cat-2-31", "index-select-2-31")
WATCHED_CASES = [case for case in CASES if case.defect in WATCHED]
ORIGINALS = owners()
TESTS = Path(__file__).resolve().parents[2]

# Python runs this before the script of a child process; its device is simulated like this one.
SITE = f"""
import sys
sys.path.insert(0, {str(TESTS)!r})
from simulated_mps.environment import install_from_environment
install_from_environment()
"""


@pytest.fixture(autouse=True)
def watched(monkeypatch):
    monkeypatch.setattr(probing, "SCALED", 0)
    with gate.scaled(**SCALED), torch.inference_mode():
        yield
        install.remove()
        assert owners() == ORIGINALS


@pytest.fixture
def told(monkeypatch):
    """What a child process finds is told beforehand, so that one is started by few tests only."""

    def says(right):
        found = probing.ProbeResult(right, 0.0 if right else 9.0, 0.0, "tried out in a process of its own")
        monkeypatch.setattr(first_use, "_in_child", lambda name, limit: found)

    monkeypatch.setattr(first_use, "forget", lambda: None)
    return says


def state(name):
    return install.status().entries[name].state


@pytest.mark.parametrize("case", WATCHED_CASES, ids=[f"{case.defect}-{case.name}" for case in WATCHED_CASES])
def test_a_wrong_device_is_cured_from_the_first_call_on(case, told):
    told(False)
    with sim.rule(case.defect, **case.thresholds):
        assert case.error() > 1e-3
        report = only(case.defect)
        assert report.watching == (case.defect,) and report.active == ()
        assert case.error() <= case.tolerance, "the call that was checked"
        assert state(case.defect) == "patched" and "at its first use" in install.status().entries[case.defect].detail
        assert case.error() <= case.tolerance
        install.remove()
        assert case.error() > 1e-3


@pytest.mark.parametrize("case", WATCHED_CASES, ids=[f"{case.defect}-{case.name}" for case in WATCHED_CASES])
def test_a_right_device_is_let_go(case, told):
    told(True)
    plain = case.run(*(value.to(MPS) for value in case.inputs()))
    replaced = set(only(case.defect).replaced)
    assert replaced and state(case.defect) == "watching"
    found = case.run(*(value.to(MPS) for value in case.inputs()))
    assert torch.equal(found, plain)
    entry = install.status().entries[case.defect]
    assert entry.probe.ok and "at its first use" in entry.detail
    assert set(install.status().replaced) < replaced, "the function that was checked keeps a gate"
    assert torch.equal(case.run(*(value.to(MPS) for value in case.inputs())), plain)


@pytest.mark.parametrize("defect", WATCHED)
def test_all_functions_checked_means_nothing_replaced(defect, told):
    told(True)
    only(defect)
    attributes = list(DEFECTS[defect].cure.first_use)
    for attribute in attributes:
        install._settle_first_use(DEFECTS[defect], attribute, probing.ProbeResult(True, 0.0, 0.0, "right"))
        assert state(defect) == ("not needed" if attribute == attributes[-1] else "watching")
    assert install.status().replaced == () and owners() == ORIGINALS


def test_small_calls_are_neither_checked_nor_changed(monkeypatch):
    def forbidden(*args):
        raise AssertionError("a small call was checked")

    monkeypatch.setattr(first_use, "evidence", forbidden)
    install.apply(MPS)
    assert set(WATCHED) <= set(install.status().watching)
    x = probing.noise((4, 8, 8)).to(MPS)
    index = torch.tensor([1, 0], device=MPS)
    assert torch.equal(torch.cat([x, x]), x.repeat(2, 1, 1)) and torch.equal(torch.stack([x])[0], x)
    assert torch.equal(x.index_select(0, index)[0], x[1]) and torch.bmm(x, x).shape == x.shape
    assert torch.equal(x**2, torch.pow(x, 2)) and set(WATCHED) <= set(install.status().watching)


def verdicts():
    return {name: install.examine(DEFECTS[name], MPS, True)[0] for name in WATCHED}


@pytest.mark.parametrize("right", [True, False])
def test_the_doctor_says_what_was_found_at_first_use(told, right):
    """Quick: a line changes when a call of that size has been made, and only then."""
    told(right)
    assert set(verdicts().values()) == {doctor.NOT_APPLICABLE}, "no patch is installed"
    install.apply(MPS)
    assert set(verdicts().values()) == {doctor.WATCHED}
    x = probing.noise((300, 150)).to(MPS)
    torch.concat([x, x])
    verdict, evidence, _ = install.examine(DEFECTS["cat-2-31"], MPS, True)
    # Where concat was right, cat, concatenate and stack are watched still.
    assert verdict == (doctor.WATCHED if right else doctor.CURED) and "concat: tried out" in evidence.detail
    assert evidence.error == (0.0 if right else 9.0)


# ---- the child process (test_child_probe.py has what it says by itself)


def test_cat_is_tried_out_in_a_child_only(tmp_path, monkeypatch):
    """The whole way: the gate, a real child process, the cure; the bad kernel never runs in this process."""
    (tmp_path / "sitecustomize.py").write_text(SITE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("SIMULATED_TORCH", sim.installed()["torch"])
    monkeypatch.setenv("SIMULATED_RULES", f"cat-2-31:elements={THRESHOLDS['cat-2-31']['elements']}")
    x = probing.noise((300, 150)).to(MPS)
    with sim.rule("cat-2-31", **THRESHOLDS["cat-2-31"]):
        only("cat-2-31")
        sim.reset()
        joined = torch.cat([x, x])
        assert "cat" not in sim.stats().ops and state("cat-2-31") == "patched"
        assert torch.equal(joined.cpu(), torch.cat([x.cpu(), x.cpu()]))


def test_int_max_before_torch_2_9_is_tried_out_in_a_child(monkeypatch, told):
    told(False)
    monkeypatch.setattr(gate, "torch_before", lambda major, minor: (major, minor) > (2, 8))
    with sim.rule("int-max-dims", **THRESHOLDS["int-max-dims"]):
        only("int-max-dims")
        x = probing.noise((300, 300)).to(MPS)
        sim.reset()
        assert torch.equal((x**2).cpu(), x.cpu() ** 2) and state("int-max-dims") == "patched"
        assert "process of its own" in install.status().entries["int-max-dims"].detail


def test_without_a_child_the_cure_is_a_precaution(monkeypatch):
    unable = probing.not_applicable("no process to be had")
    monkeypatch.setattr(first_use, "in_child", lambda name, limit: unable)
    monkeypatch.setattr("apple_silicon_video.mps_patches.cat_2_31.in_child", lambda name, limit: unable)
    case = next(case for case in WATCHED_CASES if case.defect == "cat-2-31")
    with sim.rule("cat-2-31", **case.thresholds):
        only("cat-2-31")
        assert case.error() <= case.tolerance and state("cat-2-31") == "precaution"
    assert case.error() <= case.tolerance
