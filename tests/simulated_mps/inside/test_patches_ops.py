"""The process-wide cures on the simulated device: each defect without its patch, the right result with it.

Rules begin at their true sizes where the tensors are small; the triggers of 2^31 and 2^32 elements are scaled down.
"""

import json
import os
import platform
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import simulated_mps as sim
import torch
import torch.nn.functional as F
from apple_silicon_video.mps_patches import gate, install, int_max, probing
from apple_silicon_video.mps_patches.registry import DEFECTS

MPS = torch.device("mps")
SMALL = 1 << 16
SCALED = {
    "cat_2_31": SMALL,
    "index_select_2_31": SMALL,
    "bmm_2_32": SMALL,
    "int_max_dims": SMALL,
    "rms_norm_rows": 4096,
}
# The rules' thresholds to match.
THRESHOLDS = {
    "cat-2-31": {"elements": SMALL},
    "index-select-2-31": {"elements": SMALL},
    "bmm-2-32": {"elements": SMALL},
    "int-max-dims": {"dim": SMALL},
    "rms-norm-rows": {"rows": 4096},
}
# What a right result may be off by, relative to the largest value; 0 where the cure only moves numbers.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}
MOVES = ("pad-rank-5", "interpolate-half-5d", "nearest-exact-rounding", "cat-2-31", "index-select-2-31")


@dataclass
class Case:
    """A computation that the rule of the same name spoils: ``run`` on noise of ``shapes``."""

    defect: str
    name: str
    run: Callable[..., torch.Tensor]
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype = torch.float32

    @property
    def tolerance(self):
        return 0.0 if self.defect in MOVES else TOLERANCES[self.dtype]

    @property
    def thresholds(self):
        return THRESHOLDS.get(self.defect, {})

    def inputs(self):
        return [probing.noise(shape, self.dtype, seed) for seed, shape in enumerate(self.shapes)]

    def expected(self):
        """On the CPU; in float64 where the operation rounds."""
        inputs = self.inputs()
        return self.run(*(value.double() for value in inputs) if self.tolerance else inputs)

    def error(self):
        """The device's error, relative to the largest value; inf where it raises."""
        try:
            actual = self.run(*(value.to(MPS) for value in self.inputs()))
        except (RuntimeError, NotImplementedError):
            return float("inf")
        assert actual.dtype == self.dtype
        return probing.relative_error(actual, self.expected())


def pad(*amounts, **options):
    return lambda x: F.pad(x, amounts, **options)


def interpolate(*args, **options):
    return lambda x: F.interpolate(x, *args, **options)


def call(name, home=torch):
    """The function of this name, looked up when it is called."""
    return lambda *inputs: getattr(home, name)(*inputs)


def table_entry(operation):
    """``operation`` of an mps tensor and an entry of a table on the CPU (or of two CPU tensors)."""
    return lambda x: operation(x, probing.noise((8,)).to(x.cpu().dtype)[3])


def in_buffer(operation):
    """``operation`` on a slice of its input."""
    return lambda x: operation(x[-1])


def added(x, y):
    nan = torch.full((1, 1, 1), float("nan"), dtype=x.dtype, device=x.device)
    return torch.baddbmm(nan, x, y, beta=0, alpha=0.5)


def empty_added(x, y):
    return torch.baddbmm(torch.empty(1, 1, 1, dtype=x.dtype, device=x.device), x, y, beta=0)


def rows(x):
    return F.rms_norm(x, (4,), eps=1e-6)


HALF, BF16 = torch.float16, torch.bfloat16
K = 32767
WIDE = (65536 + 3, 2, 3)
CASES = [
    Case("pad-rank-5", "time", pad(0, 0, 0, 0, 2, 0), ((1, 2, 3, 256, 256),)),
    Case("pad-rank-5", "all sides, bfloat16", pad(1, 1, 1, 1, 2, 0, value=0.5), ((1, 2, 2, 256, 257),), BF16),
    Case("pad-rank-5", "nn.ConstantPad3d", torch.nn.ConstantPad3d((0, 0, 0, 0, 1, 1), 0.0), ((1, 1, 2, 256, 256),)),
    Case(
        "pad-rank-5", "constant_pad_nd", lambda x: torch.constant_pad_nd(x, [0, 0, 0, 0, 1, 0]), ((1, 1, 2, 256, 256),)
    ),
    Case("interpolate-half-5d", "factors", interpolate(scale_factor=[1.0, 2.0, 2.0]), ((1, 2, 3, 4, 5),), HALF),
    Case("interpolate-half-5d", "size", interpolate((3, 9, 8), None, "nearest"), ((1, 2, 3, 4, 5),), BF16),
    Case("interpolate-half-5d", "nn.Upsample", torch.nn.Upsample(scale_factor=2), ((1, 2, 3, 4, 5),), HALF),
    Case("nearest-exact-rounding", "2-D", interpolate((3, 11), mode="nearest-exact"), ((1, 2, 6, 20),)),
    Case("nearest-exact-rounding", "3-D", interpolate((2, 3, 11), mode="nearest-exact"), ((1, 2, 2, 6, 20),)),
    Case("nearest-exact-rounding", "factor", interpolate(scale_factor=0.5, mode="nearest-exact"), ((1, 2, 10, 25),)),
    Case("rms-norm-rows", "float32", rows, ((8200, 4),)),
    Case("rms-norm-rows", "bfloat16, heads", rows, ((2, 3000, 2, 4),), BF16),
    Case("rms-norm-rows", "nn.RMSNorm", torch.nn.RMSNorm(4, 1e-6, False), ((8200, 4),), HALF),
    Case("matmul-large-k", "bmm", call("bmm"), ((2, 16, K), (2, K, 16))),
    Case("matmul-large-k", "linear", call("linear", F), ((2, 16, 2 * K), (16, 2 * K), (16,)), BF16),
    Case("matmul-large-k", "@", lambda x, y: x @ y.mT, ((2, 2, 16, K), (2, 2, 16, K)), HALF),
    Case("matmul-large-k", "einsum", lambda x, y: torch.einsum("bik,bjk->bij", x, y), ((2, 16, K), (2, 16, K)), HALF),
    Case("matmul-large-k", "addmm", call("addmm"), ((16, 16), (16, K), (K, 16))),
    Case("matmul-large-k", "Tensor.mm", call("mm", torch.Tensor), ((16, K), (K, 16))),
    Case("bmm-2-32", "bmm", lambda x, y: torch.bmm(x, y.mT), ((4, 150, 128), (4, 150, 128)), HALF),
    Case("bmm-2-32", "matmul", lambda x, y: x @ y.mT, ((2, 2, 150, 128), (2, 2, 150, 128))),
    Case("linear-large-batch", "3-D", call("linear", F), (WIDE, (4, 3), (4,))),
    Case("linear-large-batch", "half", call("linear", F), (WIDE, (4, 3), (4,)), HALF),
    Case(
        "conv-sliced-weight", "slice", lambda x, w: F.conv2d(x, w[:, :, 1], padding=1), ((1, 4, 9, 9), (5, 4, 3, 3, 3))
    ),
    Case("conv-sliced-weight", "half", lambda x, w: torch.conv2d(x, w[:, 1:4]), ((1, 3, 9, 9), (5, 6, 3, 3)), HALF),
    Case("cat-2-31", "columns", lambda x, y: torch.cat([x, y], 1), ((300, 150), (300, 170))),
    Case("cat-2-31", "rows", lambda x, y: torch.concat([x, y]), ((300, 150), (200, 150)), BF16),
    Case("cat-2-31", "stack", lambda x, y: torch.stack([x, y], -1), ((300, 150), (300, 150))),
    Case(
        "index-select-2-31",
        "rows",
        lambda x: x.index_select(0, torch.tensor([999, 0, 500], device=x.device)),
        ((1000, 70),),
    ),
    Case(
        "index-select-2-31",
        "columns",
        lambda x: torch.index_select(x, 1, torch.tensor([69, 0], device=x.device)),
        ((1000, 70),),
    ),
    Case(
        "index-select-2-31",
        "embedding",
        lambda x: F.embedding(torch.tensor([[999, 1]], device=x.device), x),
        ((1000, 70),),
        HALF,
    ),
    Case("baddbmm-uninitialised", "NaN", added, ((2, 5, 7), (2, 7, 3))),
    Case("baddbmm-uninitialised", "empty, half", empty_added, ((2, 5, 7), (2, 7, 3)), HALF),
    Case("cpu-scalar-view", "x * table[3]", table_entry(lambda x, s: x * s), ((4, 5),)),
    Case("cpu-scalar-view", "table[3] - x", table_entry(lambda x, s: s - x), ((4, 5),)),
    Case("cpu-scalar-view", "x.div_", table_entry(lambda x, s: x.clone().div_(s)), ((4, 5),)),
    Case("cpu-scalar-view", "torch.add", table_entry(call("add")), ((4, 5),)),
    Case("conv-output-channels", "conv1d", call("conv1d", F), ((1, 2, 3), (WIDE[0], 2, 1))),
    Case("conv-output-channels", "length", lambda x, w: F.conv1d(x, w, padding=1), ((1, 2, 70000), (3, 2, 3))),
    Case("conv-output-channels", "transposed", call("conv_transpose1d", F), ((1, 2, 3), (2, WIDE[0], 1))),
    Case(
        "conv-output-channels",
        "transposed length",
        lambda x, w: F.conv_transpose1d(x, w, stride=4, padding=1),
        ((1, 2, 20000), (2, 3, 8)),
    ),
    Case("int-max-dims", "pow", lambda x: x**2, ((300, 300),)),
    Case("int-max-dims", "pow of a slice", in_buffer(lambda x: x.pow(2)), ((300, 300),)),
    Case("int-max-dims", "bmm", call("bmm"), ((3, 200, 150), (3, 150, 4))),
    Case("int-max-dims", "baddbmm", call("baddbmm"), ((3, 200, 4), (3, 200, 150), (3, 150, 4))),
    Case("int-max-dims", "cat of slices", in_buffer(lambda x: torch.cat([x, x])), ((3, 300, 300),)),
    Case("int-max-dims", "repeat", in_buffer(lambda x: x.repeat(2, 1)), ((3, 300, 300),)),
]
IDS = [f"{case.defect}-{case.name}" for case in CASES]
MINE = tuple(dict.fromkeys(case.defect for case in CASES))


def owners():
    return {
        (path, name): (owner, getattr(owner, name), name in vars(owner))
        for defect in DEFECTS.values()
        for path, name in (defect.cure.targets if defect.cure else ())
        if path.startswith("torch") and (owner := install._owner(path, name)) is not None
    }


ORIGINALS = owners()


@pytest.fixture(autouse=True)
def scaled_and_removed():
    with gate.scaled(**SCALED), torch.inference_mode():
        yield
        install.remove()
        assert owners() == ORIGINALS


def only(defect_id, choice="auto"):
    """One patch by its probe, all others off."""
    return install.apply(MPS, {name: choice if name == defect_id else "off" for name in DEFECTS})


@pytest.mark.parametrize("case", CASES, ids=IDS)
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


@pytest.mark.parametrize("quick", [True, False])
def test_every_probe_passes_on_a_healthy_device(quick):
    for name in (*MINE, "float64", "generator-placement", "randomness", "quantised-dtype", "conv3d-macos-26-2"):
        found = install.run_probe(DEFECTS[name], MPS, quick)
        assert found.ok and found.applicable, (name, found)


@pytest.mark.parametrize("rule", MINE)
def test_a_rule_turns_exactly_its_own_line_red(rule, monkeypatch):
    thresholds = THRESHOLDS.get(rule, {})
    if rule == "int-max-dims":  # beyond what the other probes use
        thresholds = {"dim": 1 << 22}
        monkeypatch.setitem(gate.LIMITS, rule, 1 << 22)
    others = (*MINE, "float64", "generator-placement", "randomness", "quantised-dtype", "conv3d-macos-26-2")
    with sim.rule(rule, **thresholds):
        red = {name for name in others if not install.run_probe(DEFECTS[name], MPS, True).ok}
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


def test_triggers_too_large_for_a_quick_probe_are_prevented():
    with gate.scaled(cat_2_31=1 << 31, index_select_2_31=1 << 31, bmm_2_32=1 << 32, int_max_dims=1 << 31):
        report = install.apply(MPS)
        expected = {"bmm-2-32", "int-max-dims"}
        if gate.torch_before(2, 14):
            expected |= {"cat-2-31", "index-select-2-31"}
        assert {name for name in report.active if report.entries[name].state == "preventive"} == expected
        assert set(report.active) & set(MINE) == expected


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


# ---- what the device refuses by design, and the cures that are off unless switched on


def test_float64_is_refused_until_switched_on():
    wide = torch.arange(4, dtype=torch.float64) / 3
    narrow, wide_complex = torch.ones(4, device=MPS), torch.ones(2, dtype=torch.complex128)
    calls = {
        "to": lambda: wide.to(MPS),
        "to by keyword": lambda: wide.to(device="mps"),
        "to another": lambda: wide.to(narrow.to(torch.float32)).to("mps", torch.float64),
        "upcast": lambda: narrow.to(torch.float64),
        "double": lambda: narrow.double(),
        "type": lambda: narrow.type(torch.float64),
        "arange": lambda: torch.arange(4, dtype=torch.float64, device=MPS),
        "array": lambda: torch.tensor(wide.numpy(), device=MPS),
        "like": lambda: torch.zeros_like(wide, device=MPS),
        "complex": lambda: wide_complex.to(MPS),
    }
    for name, call in calls.items():
        with pytest.raises(TypeError, match="float64"):
            print(name, call())
    assert install.apply(MPS).entries["float64"].state == "off"
    only("float64", "on")
    for name, call in calls.items():
        assert call().dtype in (torch.float32, torch.complex64) and call().is_mps, name
    assert torch.equal(wide.to(MPS).cpu(), wide.float())
    assert wide.to(torch.float64) is wide and wide.double().dtype == torch.float64
    assert torch.arange(3, dtype=torch.float64).dtype == torch.float64
    assert narrow.to(torch.float16).dtype == torch.float16 and wide.to("cpu", torch.float32).dtype == torch.float32


def test_generators_elsewhere_are_refused_until_switched_on():
    def cpu_generator():
        return torch.Generator().manual_seed(3)

    with pytest.raises(RuntimeError):
        torch.randn(8, generator=cpu_generator(), device=MPS)
    only("generator-placement", "on")
    drawn = torch.randn(8, generator=cpu_generator(), device="mps")
    assert drawn.is_mps and torch.equal(drawn.cpu(), torch.randn(8, generator=cpu_generator()))
    filled = torch.empty(8, device=MPS).uniform_(0, 1, generator=cpu_generator())
    assert torch.equal(filled.cpu(), torch.empty(8).uniform_(0, 1, generator=cpu_generator()))
    assert torch.randn(8, generator=torch.Generator("mps").manual_seed(3)).device.type == "cpu"
    assert torch.randn(8, generator=torch.Generator("mps").manual_seed(3), device=MPS).is_mps


def test_noise_of_ancestral_samplers_can_match_the_cpu(monkeypatch):
    """A stand-in for comfy.k_diffusion.sampling: its noise comes from the device's generator, as in core."""

    def default_noise_sampler(x, seed=None):
        return lambda sigma, sigma_next: torch.full_like(x, -1)

    module = types.ModuleType("comfy.k_diffusion.sampling")
    module.default_noise_sampler = types.FunctionType(
        default_noise_sampler.__code__, {"__name__": module.__name__, "torch": torch}, "default_noise_sampler"
    )
    for name in ("comfy", "comfy.k_diffusion"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    only("randomness", "on")
    for dtype in (torch.float32, torch.float16):
        latents = torch.zeros(1, 4, 3, dtype=dtype, device=MPS)
        sample = module.default_noise_sampler(latents, seed=5)
        generator = torch.Generator().manual_seed(6)
        for _ in range(2):
            assert torch.equal(sample(1.0, 0.5).cpu(), torch.randn(1, 4, 3, generator=generator).to(dtype))
        assert sample(1.0, 0.5).is_mps and sample(1.0, 0.5).dtype == dtype
    assert module.default_noise_sampler(torch.zeros(2), seed=5)(1, 0).eq(-1).all()
    install.remove()
    assert module.default_noise_sampler(latents, seed=5)(1, 0).eq(-1).all()


def test_largest_buffer_is_reported():
    defect = DEFECTS["buffer-limit"]
    assert install.run_probe(defect, MPS, True).ok
    with sim.rule("buffer-limit", bytes=1 << 30):
        assert install.examine(defect, MPS, True)[0] == "defect, not cured"


def test_macos_26_2_is_reported(monkeypatch):
    monkeypatch.setattr(platform, "mac_ver", lambda *_: ("26.2.1", ("", "", ""), "arm64"))
    verdict, bare, _ = install.examine(DEFECTS["conv3d-macos-26-2"], MPS, True)
    assert verdict == "defect, not cured" and "26.2" in bare.detail


def test_slices_are_copied_out_of_large_buffers():
    buffer = torch.ones(3, 300, 300, device=MPS)
    with gate.scaled(int_max_dims=SMALL):
        assert gate.extent(buffer[1]) == buffer.numel() and gate.extent(int_max._own(buffer[1, :5])) == 1500


# ---- another custom node's upsampling step, in a process of its own

NODE = '''
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import interpolate

FACTORS = [1.0, 2.0, 2.0]


class UpsamplingStep(nn.Module):
    """Doubles height and width of [batch, channels, frames, height, width], then a convolution per frame."""

    def __init__(self, channels, style):
        super().__init__()
        self.style = style
        self.layer = nn.Upsample(scale_factor=tuple(FACTORS), mode="nearest")
        self.conv = nn.Conv3d(channels, channels, (1, 3, 3), padding=(0, 1, 1))

    def forward(self, video):
        if self.style == "attribute":
            video = F.interpolate(video, scale_factor=FACTORS, mode="nearest")
        elif self.style == "name":
            video = interpolate(video, scale_factor=FACTORS, mode="nearest")
        else:
            video = self.layer(video)
        return video, self.conv(video)


NODE_CLASS_MAPPINGS = {"OtherPackUpsampling": UpsamplingStep}
'''

PROCESS = """
import importlib.util, json, sys
import torch

tests, scripts, node, order = sys.argv[1:]
sys.path += [tests, scripts]
from simulated_mps.environment import install_from_environment
install_from_environment()
torch.set_num_threads(1)

def load_node():
    name = node.replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, node)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.NODE_CLASS_MAPPINGS["OtherPackUpsampling"]

def load_ours():
    from _pack import load_pack
    load_pack()
    from apple_silicon_video.mps_patches import install
    return install.apply()

found, step = {}, None
for part in order.split(","):
    if part == "node":
        step = load_node()
    if part == "ours":
        found["active"] = load_ours().active
with torch.inference_mode():
    video = torch.randn(1, 4, 3, 8, 10, generator=torch.Generator().manual_seed(0)).half()
    right = video.repeat_interleave(2, 3).repeat_interleave(2, 4)
    for style in ("attribute", "name", "layer"):
        torch.manual_seed(1)
        model = step(4, style).half()
        doubled, frames = model.to("mps")(video.to("mps"))
        expected = model.to("cpu").conv(right).float()
        found[style] = {
            "black": bool((doubled == 0).all()),
            "doubled": bool(torch.equal(doubled.cpu(), right)),
            "error": (frames.cpu().float() - expected).abs().max().item(),
        }
print(json.dumps(found))
"""


@pytest.mark.parametrize("order", ["node", "ours,node", "node,ours"])
def test_upsampling_of_another_pack(tmp_path, order):
    node = tmp_path / "custom_nodes" / "other_pack" / "__init__.py"
    node.parent.mkdir(parents=True)
    node.write_text(NODE)
    tests = Path(__file__).resolve().parents[2]
    arguments = [str(tests), str(tests.parent / "scripts"), str(node), order]
    environment = {"SIMULATED_RULES": "interpolate-half-5d", "SIMULATED_TORCH": sim.installed()["torch"]}
    result = subprocess.run(
        [sys.executable, "-c", PROCESS, *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.splitlines()[-1])
    if order == "node":
        assert all(found[style]["black"] for style in ("attribute", "name", "layer"))
        return
    assert "interpolate-half-5d" in found["active"]
    for style in ("attribute", "name", "layer"):
        assert found[style]["doubled"] and not found[style]["black"] and found[style]["error"] < 2e-3, (style, found)
