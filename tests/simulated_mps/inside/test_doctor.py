"""The Doctor on the simulated device: each rule turns exactly its own line red, and the patches turn it back."""

import dataclasses
import json
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field

import core_tree
import numpy as np
import pytest
import simulated_mps as sim
import torch
from _pack import ROOT

sys.path.insert(0, core_tree.folder())

import comfy.extra_samplers.uni_pc  # noqa: F401
from apple_silicon_video.mps_patches import (
    attention,
    attention_plan,
    doctor,
    doctor_views,
    first_use,
    gate,
    install,
    probing,
)
from apple_silicon_video.mps_patches.registry import DEFECTS, SMALL_PROBE

TABLE = tuple(map(int, sim.installed()["torch"].split(".")[:2]))
RED = (doctor.CURED, doctor.DEFECT)


@dataclass(frozen=True)
class Case:
    """A rule, scaled to what fits a test, with the pack's own limits scaled alike."""

    rule: dict = field(default_factory=dict)
    gate: dict = field(default_factory=dict)
    attention: dict = field(default_factory=dict)
    since: tuple = (2, 6)
    until: tuple = (99, 0)
    verdict: str = doctor.CURED


CASES = {
    "pad-rank-5": Case({"inner": 4096}, {"pad_rank_5": 4096}),
    "interpolate-half-5d": Case(since=(2, 8)),
    "nearest-exact-rounding": Case(),
    "rms-norm-rows": Case({"rows": 4096}, {"rms_norm_rows": 4096}, since=(2, 8)),
    "conv-sliced-weight": Case(),
    "matmul-large-k": Case({"k": 16384}, {"matmul_large_k": 16384}),
    "linear-large-batch": Case({"batch": 512}, {"linear_large_batch": 512}),
    "baddbmm-uninitialised": Case(),
    "cpu-scalar-view": Case(),
    "conv-output-channels": Case({"channels": 1024, "length": 1024}, {"conv_output_channels": 1024}),
    "cat-2-31": Case({"elements": 1 << 20}, {"cat_2_31": (1 << 20) - 1}),
    "index-select-2-31": Case({"elements": 1 << 20}, {"index_select_2_31": (1 << 20) - 1}),
    "sdpa-causal-half": Case(),
    "sdpa-short-query": Case(since=(2, 8), until=(2, 11)),
    "softmax-half": Case(),
    "scores-2-31": Case({"elements": 1 << 22}, attention={"score_elements": 1 << 22}),
    "sdpa-materialises": Case(since=(2, 13)),
    "bmm-2-32": Case({"elements": 1 << 22}, {"bmm_2_32": 1 << 22}),
    "int-max-dims": Case({"dim": 1 << 22}, {"int_max_dims": 1 << 22, "rms_norm_rows": 4096}),
    "buffer-limit": Case({"bytes": 1 << 30}, verdict=doctor.DEFECT),
    "expm1-coarse": Case(),
}
# On macOS 26.2 the version itself is the evidence (test_patches_others.py); what would end this process has no probe.
WITHOUT_A_PROBE = {"conv3d-macos-26-2", "command-buffer"}
NAMES = [name for name, case in CASES.items() if case.since <= TABLE < case.until]


@pytest.fixture(autouse=True)
def clean():
    attention.forget()
    yield
    install.remove()
    attention.forget()


def verdicts(quick=True):
    return {line.id: line.verdict for line in doctor.diagnose("mps", quick).lines}


def verdict(name):
    return doctor._line(DEFECTS[name], torch.device("mps"), True).verdict


@pytest.fixture(scope="module")
def healthy():
    """The verdicts without any rule."""
    found = verdicts()
    attention.forget()
    return found


@pytest.mark.parametrize("name", NAMES)
def test_each_rule_turns_its_own_line_red(name, healthy):
    case = CASES[name]
    with ExitStack() as stack:
        stack.enter_context(gate.scaled(**case.gate))
        stack.enter_context(attention_plan.scaled(**case.attention))
        before = healthy | {name: verdict(name)}
        stack.enter_context(sim.rule(name, **case.rule))
        attention.forget()
        bare = verdicts()
        changed = {key for key in before if before[key] != bare[key]}
        assert changed == {name}
        assert bare[name] in RED
        install.apply("mps")
        assert verdict(name) == case.verdict


def test_every_rule_has_a_case():
    assert set(CASES) | WITHOUT_A_PROBE == set(sim.RULES)


def test_a_right_device_has_no_red_line_but_core_s_own(healthy):
    """ComfyUI 0.30 computes UniPC's coefficients in float32, which is wrong on any device."""
    allowed = {"unipc-float32"} | ({"sdpa-materialises"} if TABLE < (2, 13) else set())
    assert {name for name, found in healthy.items() if found in RED} <= allowed


LARGE = tuple(name for name, defect in DEFECTS.items() if defect.footprint(False) > SMALL_PROBE)


@pytest.mark.parametrize("ram_gb", [8, 16, 64])
def test_full_probes_stay_within_their_bound(ram_gb, monkeypatch):
    """By the allocator's counter, at true sizes, in dry mode: allocations as in earnest, without arithmetic."""
    children = []
    told = probing.not_applicable("not started")
    monkeypatch.setattr(first_use, "_in_child", lambda name, limit: children.append(name) or told)
    sim.mac(ram_gb)
    sim.dry(1 << 16)
    free = torch.mps.recommended_max_memory()
    bound = min(probing.LARGEST_PROBE, probing.LARGEST_SHARE * free)
    ran = set()
    for name in LARGE:
        sim.reset()
        before = sim.stats()
        found = install.run_probe(DEFECTS[name], torch.device("mps"), False)
        peak = sim.stats().peak - before.live
        needed = DEFECTS[name].footprint(False)
        assert not found.failed, found
        assert peak <= min(needed, bound), f"{name} took {peak / 2**20:.0f} MiB"
        assert sim.stats().driver <= before.driver, f"{name} has not released its memory"
        if peak or name in children:
            ran.add(name)
            assert needed <= bound
        else:
            assert needed > bound and "GiB" in found.detail
    expected = {8: {"index-select-2-31", "int-max-dims", "rms-norm-rows", "buffer-limit"}}
    everywhere = {"scores-2-31", "cat-2-31", *expected[8]}
    assert ran == expected.get(ram_gb, everywhere) and set(LARGE) - ran <= {"bmm-2-32", *everywhere}


def test_full_probes_leave_room_for_what_is_loaded():
    sim.mac(64)
    sim.dry(1 << 16)
    rows = int(0.97 * torch.mps.recommended_max_memory()) >> 21
    loaded = [torch.empty(rows, 1 << 20, dtype=torch.uint8, device="mps") for _ in range(2)]
    for name in LARGE:
        sim.reset()
        assert not install.run_probe(DEFECTS[name], torch.device("mps"), False).applicable
        assert sim.stats().peak == sim.stats().live >= sum(part.nbytes for part in loaded)


def test_a_probe_that_fails_has_a_verdict_of_its_own(monkeypatch):
    def broken(device, quick):
        raise ValueError("the kernel has no name")

    defects = {name: DEFECTS[name] for name in ("randomness", "nearest-exact-rounding")}
    defects["randomness"] = dataclasses.replace(defects["randomness"], probe=broken)
    monkeypatch.setattr(doctor, "DEFECTS", defects)
    diagnosis = doctor.diagnose("mps", True)
    line = next(line for line in diagnosis.lines if line.id == "randomness")
    assert line.verdict == doctor.FAILED and line.detail == "ValueError: the kernel has no name"
    table, markdown = doctor_views.to_table(diagnosis), doctor_views.to_markdown(diagnosis)
    assert "probe failed" in table and "ValueError: the kernel has no name" in table
    assert "| probe failed | randomness |" in markdown and "the kernel has no name" in markdown
    assert json.loads(json.dumps(diagnosis.as_dict()))["lines"][0]["detail"] == line.detail
    assert any("its probe failed" in sentence and "no name" in sentence for sentence in diagnosis.advice)
    colour = np.array(doctor_views.COLOURS[doctor.FAILED]) / 255
    assert (np.abs(doctor_views.to_picture(diagnosis) - colour).max(axis=-1) < 0.01).any()


def test_what_is_checked_on_first_use_says_so():
    install.apply("mps", {name: "auto" if name == "cat-2-31" else "off" for name in DEFECTS})
    diagnosis = doctor.diagnose("mps", True)
    line = next(line for line in diagnosis.lines if line.id == "cat-2-31")
    assert line.verdict == doctor.WATCHED and "3 GiB" in line.detail
    assert "checked on first use" in doctor_views.to_table(diagnosis)
    assert diagnosis.count(doctor.WATCHED) == 1


def test_views_say_the_same():
    with sim.rule("interpolate-half-5d"):
        diagnosis = doctor.diagnose("mps", True, memory={"total": 64 << 30}, comfyui="0.30.0", packs=["ComfyUI-GGUF"])
    table, markdown = doctor_views.to_table(diagnosis), doctor_views.to_markdown(diagnosis)
    data = json.loads(json.dumps(diagnosis.as_dict()))
    picture = doctor_views.to_picture(diagnosis)
    for defect in DEFECTS.values():
        assert defect.id in table and f"| {defect.id} |" in markdown
    assert "64.0 GiB" in table and "ComfyUI 0.30.0" in markdown and "pack ComfyUI-GGUF" in table
    assert len(data["lines"]) == len(DEFECTS) and data["machine"]["macOS"] == sim.installed()["macos"]
    assert picture.dtype == np.float32 and picture.shape[0] == 1 and picture.shape[3] == 3
    red = np.array(doctor_views.COLOURS[doctor.DEFECT]) / 255
    if TABLE >= (2, 8):
        assert (np.abs(picture - red).max(axis=-1) < 0.01).any()


def test_advice_comes_in_the_order_of_its_effect():
    with sim.rule("nearest-exact-rounding"):
        advice = doctor.diagnose("mps", True).advice
    title = DEFECTS["nearest-exact-rounding"].title
    assert any(sentence.startswith(title) for sentence in advice)
    if TABLE < doctor.ADVISED_TORCH and torch.__version__.startswith("2.13"):
        assert advice[-1].startswith("Update torch") or "Leave the pack" in advice[-1]


def test_progress_can_stop_it():
    def stop(done, total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        doctor.diagnose("mps", True, progress=stop)


def test_script_says_so_without_mps():
    script = ROOT / "scripts" / "doctor.py"
    result = subprocess.run([sys.executable, str(script), "--quick", "--json"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    data = json.loads(result.stdout)
    assert data["device"] == "none" and {line["verdict"] for line in data["lines"]} == {doctor.NOT_APPLICABLE}
    assert "no MPS device" in data["advice"][0]
