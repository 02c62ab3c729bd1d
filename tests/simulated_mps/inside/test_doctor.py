"""The Doctor on the simulated device: each rule turns exactly its own line red, and the patches turn it back."""

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
import pytest
import simulated_mps as sim
import torch
from _pack import ROOT

if os.environ.get("COMFYUI_DIR") is None:
    import fetch_comfyui

    os.environ["COMFYUI_DIR"] = str(fetch_comfyui.fetch())
sys.path.insert(0, os.environ["COMFYUI_DIR"])

import comfy.extra_samplers.uni_pc  # noqa: F401
from apple_silicon_video.mps_patches import attention, attention_plan, doctor, doctor_views, gate, install
from apple_silicon_video.mps_patches.registry import DEFECTS

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
    "expm1-coarse": Case(),
}
NAMES = [name for name, case in CASES.items() if case.since <= TABLE < case.until]


@pytest.fixture(autouse=True)
def clean():
    attention.forget()
    yield
    install.remove()
    attention.forget()


def verdicts(quick=True):
    return {line.id: line.verdict for line in doctor.diagnose("mps", quick).lines}


@pytest.mark.parametrize("name", NAMES)
def test_each_rule_turns_its_own_line_red(name):
    case = CASES[name]
    with ExitStack() as stack:
        stack.enter_context(gate.scaled(**case.gate))
        stack.enter_context(attention_plan.scaled(**case.attention))
        before = verdicts()
        stack.enter_context(sim.rule(name, **case.rule))
        attention.forget()
        bare = verdicts()
        changed = {key for key in before if before[key] != bare[key]}
        assert changed == {name}
        assert bare[name] in RED
        install.apply("mps")
        assert verdicts()[name] == case.verdict


def test_a_right_device_has_no_red_line_but_core_s_own():
    """ComfyUI 0.30 computes UniPC's coefficients in float32, which is wrong on any device."""
    allowed = {"unipc-float32"} | ({"sdpa-materialises"} if TABLE < (2, 13) else set())
    assert {name for name, verdict in verdicts().items() if verdict in RED} <= allowed


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
