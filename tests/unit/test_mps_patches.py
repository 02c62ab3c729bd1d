"""The table of MPS defects, and switching their cures on and off on a machine that is told it has an MPS device."""

import dataclasses
import functools
import logging
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from apple_silicon_video.mps_patches import install, probing, registry
from apple_silicon_video.mps_patches.registry import DEFECTS, Cure, Defect, FirstUse, ProbeResult

torch.set_num_threads(1)


@pytest.fixture
def fake_device(monkeypatch):
    """install.apply believes that there is an MPS device; probes get the CPU."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "empty_cache", lambda: None)
    yield torch.device("mps")
    install.remove()


def forbidden(*args, **kwargs):
    raise AssertionError("must not be called")


def noise(*shape):
    return probing.noise(shape)


def test_table_is_complete():
    for name, defect in DEFECTS.items():
        assert name == defect.id and defect.kind in ("process", "model", "loader", "advice")
        assert defect.title and defect.symptom and defect.trigger and defect.cause and defect.affected and defect.advice
        assert defect.kind in ("process", "model") or defect.cure is None
        if defect.cure is not None and defect.cure.first_use is not None:
            assert set(defect.cure.first_use) == {attribute for _, attribute in defect.cure.targets}
        if defect.reference:
            module, _, function = defect.reference.rpartition(".")
            package = "quantization" if module.startswith("quantization") else "mps_patches"
            found = __import__(f"apple_silicon_video.{package}.{module.split('.')[-1]}", fromlist=[function])
            assert callable(getattr(found, function)), defect.reference


def test_every_target_exists_or_belongs_to_comfyui():
    for defect in DEFECTS.values():
        for path, name in defect.cure.targets if defect.cure else ():
            known = install._owner(path, name) is not None
            assert known or path.startswith("comfy") or name.startswith("__i"), (path, name)
            assert callable(defect.cure.maker(name))


def identities():
    """Every target of every cure, and what is there."""
    found = {}
    for defect in DEFECTS.values():
        for path, name in defect.cure.targets if defect.cure else ():
            owner = install._owner(path, name)
            if owner is not None:
                found[path, name] = (getattr(owner, name), name in vars(owner))
    return found


def test_without_an_mps_device_nothing_is_probed_or_replaced(monkeypatch):
    monkeypatch.setattr(install, "run_probe", forbidden)
    before = identities()
    assert len(before) > 90
    for device in (None, "mps", "cpu", torch.device("cpu")):
        assert install.apply(device, dict.fromkeys(DEFECTS, "on")) == install.Report()
    assert identities() == before and install.status() == install.Report()


TOY = types.ModuleType("toy_functions")


def toy(x):
    return x + 1


def add_toy(monkeypatch, healthy=lambda: False, cured_result=True, **options):
    """A table of one defect, of the function toy_functions.toy; its probe says what ``healthy`` says."""
    TOY.toy = types.FunctionType(toy.__code__, {"__name__": "toy_functions"}, "toy")
    monkeypatch.setitem(sys.modules, "toy_functions", TOY)

    def probe(device, quick):
        good = healthy() or (cured_result and TOY.toy(1) == 20)
        return ProbeResult(good, 0.0 if good else 1.0, 0.0, "measured", applicable=options.get("applicable", True))

    targets = (("toy_functions", "toy"),)
    cure = Cure(targets, lambda original: lambda x: original(x) * 10, options.get("first_use"))
    text = dict.fromkeys(("symptom", "trigger", "cause", "affected", "seam", "advice", "reference"), "")
    defect = Defect(id="toy-defect", title="Toy", upstream=(), probe=probe, cure=cure, **text)
    monkeypatch.setattr(install, "DEFECTS", {"toy-defect": defect})
    return TOY.toy, defect


def test_a_defect_is_patched_verified_and_unpatched(monkeypatch, fake_device, caplog):
    original, defect = add_toy(monkeypatch)
    caplog.set_level(logging.INFO)
    report = install.apply(fake_device)
    assert report.active == ("toy-defect",) and report.replaced == ("toy_functions.toy",)
    assert report.entries["toy-defect"].state == "patched" and TOY.toy(1) == 20
    assert caplog.text.count("toy-defect") == 1
    stand_in = TOY.toy
    assert install.apply(fake_device) == report and TOY.toy is stand_in
    assert install.examine(defect, fake_device, True)[0] == "defect, cured"
    with install.suspended():
        assert stand_in(1) == 2
    install.remove()
    assert TOY.toy is original and stand_in(1) == 2 and install.status() == install.Report()


def test_a_healthy_function_is_left_alone(monkeypatch, fake_device):
    original, defect = add_toy(monkeypatch, healthy=lambda: True)
    report = install.apply(fake_device)
    assert report.entries["toy-defect"].state == "not needed" and report.replaced == () and TOY.toy is original
    assert install.examine(defect, fake_device, True)[0] == "pass"


def test_a_cure_that_does_not_cure_stays_off(monkeypatch, fake_device, caplog):
    original, defect = add_toy(monkeypatch, cured_result=False)
    assert install.apply(fake_device).entries["toy-defect"].state == "not cured" and TOY.toy is original
    assert "it stays off" in caplog.text
    assert install.examine(defect, fake_device, True)[0] == "defect, not cured"


def test_without_evidence_nothing_is_installed(monkeypatch, fake_device):
    original, defect = add_toy(monkeypatch, applicable=False)
    assert install.apply(fake_device).entries["toy-defect"].state == "not applicable" and TOY.toy is original
    assert install.examine(defect, fake_device, True)[0] == "not applicable"


def watched_toy(monkeypatch, check):
    """A toy whose quick probe does not apply: calls with 7 and more are of trigger size."""
    checked = []

    def counted(function, args, kwargs):
        checked.append(function(*args, **kwargs))
        return check(*args)

    first_use = {"toy": FirstUse(lambda x: x >= 7, counted)}
    return *add_toy(monkeypatch, applicable=False, first_use=first_use), checked


@pytest.mark.parametrize("right", [True, False])
def test_the_first_call_of_trigger_size_decides(monkeypatch, fake_device, caplog, right):
    caplog.set_level(logging.INFO)
    found = ProbeResult(right, 0.0 if right else 3.0, 1.0, "compared")
    original, defect, checked = watched_toy(monkeypatch, lambda x: found)
    report = install.apply(fake_device)
    assert report.watching == ("toy-defect",) and report.active == () and TOY.toy is not original
    assert "checked on first use" in report.entries["toy-defect"].detail and not caplog.text
    assert install.examine(defect, fake_device, True)[0] == "checked on first use"
    assert TOY.toy(1) == 2 and TOY.toy(6) == 7 and checked == []
    assert install.apply(fake_device) == report
    stand_in = TOY.toy
    assert stand_in(7) == (8 if right else 80) and checked == [8]
    assert caplog.text.count("at its first use, toy: compared") == 1
    entry = install.status().entries["toy-defect"]
    assert entry.state == ("not needed" if right else "patched") and entry.probe == found
    verdict, evidence, _ = install.examine(defect, fake_device, True)
    assert verdict == ("pass" if right else "defect, cured") and evidence.error == found.error
    assert (TOY.toy is original) is right, "a right function keeps a gate"
    assert [stand_in(9), TOY.toy(9)] == [10 if right else 100] * 2 and checked == [8]
    assert install.apply(fake_device).entries["toy-defect"] == entry and caplog.text.count("first use") == 1
    install.remove()
    assert TOY.toy is original and stand_in(9) == 10


def test_a_check_without_evidence_keeps_the_cure(monkeypatch, fake_device, caplog):
    def check(x):
        raise ValueError("no such row")

    _, defect, checked = watched_toy(monkeypatch, check)
    install.apply(fake_device)
    assert [TOY.toy(7), TOY.toy(7)] == [80, 80] and checked == [8]
    assert install.status().entries["toy-defect"].state == "precaution" and "no such row" in caplog.text
    assert install.examine(defect, fake_device, True)[0] == "checked on first use"


def test_out_of_memory_in_a_check_is_the_caller_s(monkeypatch, fake_device):
    def check(x):
        raise torch.OutOfMemoryError("no memory")

    watched_toy(monkeypatch, check)
    install.apply(fake_device)
    with pytest.raises(torch.OutOfMemoryError):
        TOY.toy(7)
    assert install.status().watching == ("toy-defect",)


def test_switching_a_watched_patch(monkeypatch, fake_device):
    original, _, checked = watched_toy(monkeypatch, lambda x: ProbeResult(True, 0.0, 1.0, "compared"))
    install.apply(fake_device)
    assert install.apply(fake_device, {"toy-defect": "on"}).active == ("toy-defect",) and TOY.toy(1) == 20
    assert install.apply(fake_device, {"toy-defect": "off"}).replaced == () and TOY.toy is original
    assert TOY.toy(7) == 8 and checked == []


def test_each_function_of_a_defect_has_its_own_first_use(monkeypatch, fake_device):
    original, defect, _ = watched_toy(monkeypatch, lambda x: ProbeResult(x > 7, 0.0, 1.0, "compared"))
    other = TOY.other = types.FunctionType(toy.__code__, {"__name__": "toy_functions"}, "other")
    cure = dataclasses.replace(
        defect.cure,
        targets=(("toy_functions", "toy"), ("toy_functions", "other")),
        first_use={"toy": defect.cure.first_use["toy"], "other": defect.cure.first_use["toy"]},
    )
    monkeypatch.setattr(install, "DEFECTS", {"toy-defect": dataclasses.replace(defect, cure=cure)})
    install.apply(fake_device)
    assert TOY.other(8) == 9 and TOY.other is other and TOY.toy is not original
    assert install.status().entries["toy-defect"].state == "watching"
    assert TOY.toy(7) == 80 and install.status().entries["toy-defect"].state == "patched"


def test_a_broken_probe_patches_nothing_and_says_so(monkeypatch, fake_device, caplog):
    def healthy():
        raise ValueError("no such shape")

    original, defect = add_toy(monkeypatch, healthy=healthy)
    entry = install.apply(fake_device).entries["toy-defect"]
    assert entry.state == "probe failed" and entry.detail == "ValueError: no such shape" and TOY.toy is original
    assert "no such shape" in caplog.text
    verdict, bare, _ = install.examine(defect, fake_device, True)
    assert verdict == "probe failed" and bare.failed and not bare.applicable


def test_a_probe_without_the_memory_is_not_run(monkeypatch, fake_device):
    _, defect = add_toy(monkeypatch, healthy=forbidden)
    large = dataclasses.replace(defect, footprint=lambda quick: 1 << 40)
    found = install.run_probe(large, fake_device, False)
    assert not found.applicable and not found.failed and "1024.0 GiB" in found.detail


def test_choices_and_the_environment(monkeypatch, fake_device, caplog):
    original, defect = add_toy(monkeypatch, healthy=lambda: True)
    assert install.apply(fake_device, {"toy-defect": "on"}).active == ("toy-defect",)
    assert install.apply(fake_device, {"toy-defect": "off"}).active == () and TOY.toy is original
    monkeypatch.setenv("ASV_PATCH_TOY_DEFECT", "ON")
    assert install.apply(fake_device, {"toy-defect": "off"}).active == ("toy-defect",)
    monkeypatch.setenv("ASV_PATCH_TOY_DEFECT", "maybe")
    assert install.choice_for(defect) == "auto" and "must be auto, on or off" in caplog.text
    assert install.apply(fake_device).active == () and TOY.toy is original


def test_another_packs_patch_is_left_in_place(monkeypatch, fake_device, caplog):
    caplog.set_level(logging.INFO)
    original, defect = add_toy(monkeypatch)
    scope = {"functools": functools, "original": original, "__name__": "ComfyUI-AppleSilicon-FP8.patches"}
    code = compile("def theirs(x):\n    return original(x) + 100", "patches.py", "exec")
    theirs = types.FunctionType(code.co_consts[0], scope, "theirs")
    functools.update_wrapper(theirs, original)
    TOY.toy = theirs
    report = install.apply(fake_device, {"toy-defect": "on"})
    assert report.entries["toy-defect"].state == "left to another pack" and TOY.toy is theirs
    assert "ComfyUI-AppleSilicon-FP8.patches has replaced toy_functions.toy" in caplog.text
    other = TOY.other = types.FunctionType(toy.__code__, {"__name__": "toy_functions"}, "other")
    cure = dataclasses.replace(defect.cure, targets=(("toy_functions", "toy"), ("toy_functions", "other")))
    monkeypatch.setattr(install, "DEFECTS", {"toy-defect": dataclasses.replace(defect, cure=cure)})
    install.remove()
    report = install.apply(fake_device)
    assert report.replaced == ("toy_functions.other",) and TOY.toy is theirs and TOY.other(1) == 20
    assert "which is left to it" in report.entries["toy-defect"].detail
    install.remove()
    assert TOY.other is other


def test_a_wrapper_put_over_ours_survives_removal(monkeypatch, fake_device):
    add_toy(monkeypatch)
    install.apply(fake_device)
    ours = TOY.toy

    def over(x):
        return ours(x) + 1000

    TOY.toy = over
    install.remove()
    assert TOY.toy is over and over(1) == 1002


def test_names_imported_before_are_rebound_and_restored(monkeypatch, fake_device):
    original, _ = add_toy(monkeypatch)
    pack = types.ModuleType("custom_nodes.other_pack")
    pack.toy, pack.mine, pack.table = original, lambda x: x, {"toy": original}
    monkeypatch.setitem(sys.modules, "custom_nodes.other_pack", pack)
    mine = pack.mine
    install.apply(fake_device)
    assert pack.toy(1) == 20 and pack.toy is TOY.toy and pack.mine is mine and pack.table["toy"] is original
    install.remove()
    assert pack.toy is original


def test_torch_methods_come_back_as_they_were(fake_device):
    before = identities()
    choices = {name: "on" for name, defect in DEFECTS.items() if defect.cure is not None}
    report = install.apply(fake_device, choices)
    assert len(report.replaced) > 90
    after = identities()
    assert all(after[key][0] is not before[key][0] for key in before)
    x = noise(3, 4)
    assert torch.equal(x @ x.T, torch.mm(x, x.T)) and torch.equal(2 * x - x, x) and (x**2).shape == x.shape
    assert F.interpolate(x[None, None], scale_factor=2).shape == (1, 1, 6, 8)
    install.remove()
    assert identities() == before
    assert "matmul" not in vars(torch.Tensor)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torch_script_still_compiles_patched_functions(fake_device):
    choices = {name: "on" for name, defect in DEFECTS.items() if defect.cure is not None}
    install.apply(fake_device, choices)

    def step(x: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.pad(x, [1, 1])
        x = torch.nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")
        return torch.matmul(x, x.transpose(-1, -2))

    scripted = torch.jit.script(step)
    assert torch.allclose(scripted(noise(1, 2, 3)), step(noise(1, 2, 3)))
    torch.jit.script(torch.nn.Sequential(torch.nn.Conv1d(2, 3, 1), torch.nn.Linear(4, 4), torch.nn.RMSNorm(4)))


def test_registry_imports_nothing_until_it_is_read():
    table = registry._Table()
    assert table._entries == {} and len(table) == len(DEFECTS)
