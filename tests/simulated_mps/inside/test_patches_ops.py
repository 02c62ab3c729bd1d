"""The process-wide cures on the simulated device: each defect without its patch, the right result with it."""

import pytest
import simulated_mps as sim
import torch
import torch.nn.functional as F
from apple_silicon_video.mps_patches import gate, install, int_max, probing
from apple_silicon_video.mps_patches.registry import DEFECTS, SMALL_PROBE
from op_cases import CASES, MINE, MPS, SCALED, SMALL, THRESHOLDS, only, owners

ORIGINALS = owners()


@pytest.fixture(autouse=True)
def scaled_and_removed():
    with gate.scaled(**SCALED), torch.inference_mode():
        yield
        install.remove()
        assert owners() == ORIGINALS


@pytest.mark.parametrize("case", CASES, ids=[f"{case.defect}-{case.name}" for case in CASES])
def test_defect_and_cure(case):
    healthy = case.error()
    assert healthy <= case.tolerance
    with sim.rule(case.defect, **case.thresholds):
        before = case.error()
        assert before > max(10 * case.tolerance, 1e-3), "the rule does not show"
        report = only(case.defect)
        assert report.entries[case.defect].state == "patched" and report.active == (case.defect,)
        after = case.error()
        print(f"{case.defect:24} {case.name:24} before {before:8.2g}  after {after:8.2g}")
        assert after <= case.tolerance
        assert only(case.defect) == report and case.error() == after
        install.remove()
        assert case.error() == pytest.approx(before, rel=0.5)
    only(case.defect, "on")
    assert case.error() <= case.tolerance


def test_without_rules_nothing_is_replaced():
    report = install.apply(MPS)
    assert not [name for name in report.replaced if name.startswith("torch")]
    for name in MINE:
        assert report.entries[name].state == "not needed", report.entries[name]
    assert owners() == ORIGINALS


OTHERS = ("float64", "generator-placement", "randomness", "quantised-dtype", "conv3d-macos-26-2")
SDPA = ("softmax-half", "sdpa-causal-half", "sdpa-short-query")


@pytest.mark.parametrize("quick", [True, False])
def test_every_probe_passes_on_a_healthy_device_within_its_footprint(quick):
    for name in (*MINE, *OTHERS, *SDPA):
        sim.reset()
        found = install.run_probe(DEFECTS[name], MPS, quick)
        assert found.ok and found.applicable, (name, found)
        assert sim.stats().peak <= max(SMALL_PROBE, DEFECTS[name].footprint(quick)), name


@pytest.mark.parametrize("rule", MINE)
def test_a_rule_turns_exactly_its_own_line_red(rule, monkeypatch):
    thresholds = THRESHOLDS.get(rule, {})
    if rule in ("int-max-dims", "bmm-2-32"):  # beyond what the other probes use
        thresholds = dict.fromkeys(thresholds, 1 << 22)
        monkeypatch.setitem(gate.LIMITS, rule, 1 << 22)
    with sim.rule(rule, **thresholds):
        red = {name for name in (*MINE, *OTHERS) if not install.run_probe(DEFECTS[name], MPS, True).ok}
        assert red == {rule}
        report = install.apply(MPS)
        assert rule in report.active and set(report.active) & set(MINE) == {rule}
        assert install.examine(DEFECTS[rule], MPS, True)[0] == "defect, cured"
        install.remove()
        assert install.examine(DEFECTS[rule], MPS, True)[0] == "defect, not cured"


@pytest.mark.parametrize("rule", ["pad-rank-5", "rms-norm-rows", "matmul-large-k", "linear-large-batch"])
def test_full_probes_at_true_sizes(rule):
    with gate.scaled(rms_norm_rows=1 << 21):
        defect = DEFECTS[rule]
        quick = rule == "rms-norm-rows"
        assert install.run_probe(defect, MPS, quick).ok
        with sim.rule(rule):
            assert not install.run_probe(defect, MPS, quick).ok
            only(rule, "on")
            assert install.run_probe(defect, MPS, quick).ok


def test_all_patches_together_change_nothing_else():
    """With every cure of this pack's table in place, a small network gives what it gave."""

    def network(x):
        x = F.pad(x, (1, 1, 1, 1, 2, 0))
        x = F.conv3d(x, probing.noise((4, 2, 3, 3, 3), seed=5).to(x.device), padding=0)
        x = F.interpolate(x, scale_factor=(1, 2, 2), mode="nearest-exact")
        tokens = F.rms_norm(x.flatten(2).mT, (4,), torch.ones(4, device=x.device))
        scores = torch.baddbmm(torch.empty(1, 1, 1, device=x.device), tokens, tokens.mT, beta=0, alpha=0.5)
        mixed = torch.einsum("bij,bjd->bid", scores.softmax(-1), tokens) @ probing.noise((4, 4)).to(x.device)
        return torch.cat([mixed, tokens * probing.noise((3,))[1]], -1).index_select(1, torch.arange(9, device=x.device))

    video = probing.noise((1, 2, 3, 6, 8))
    plain = network(video.to(MPS)).cpu()
    processes = [name for name, defect in DEFECTS.items() if defect.kind == "process" and name != "expm1-coarse"]
    report = install.apply(MPS, dict.fromkeys(processes, "on"))
    assert set(processes) - set(report.active) <= {"unipc-float32", "randomness"}
    assert probing.relative_error(network(video.to(MPS)), plain) < 1e-6
    assert probing.relative_error(network(video), plain) < 1e-5


def test_slices_are_copied_out_of_large_buffers():
    buffer = torch.ones(3, 300, 300, device=MPS)
    with gate.scaled(int_max_dims=SMALL):
        assert gate.extent(buffer[1]) == buffer.numel() and gate.extent(int_max._own(buffer[1, :5])) == 1500
