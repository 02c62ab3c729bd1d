"""Cures that are off unless switched on, what is reported only, and another custom node in a process of its own."""

import json
import os
import platform
import subprocess
import sys
import types
from pathlib import Path

import pytest
import simulated_mps as sim
import torch
from apple_silicon_video.mps_patches import install
from apple_silicon_video.mps_patches.registry import DEFECTS
from op_cases import MPS, only


@pytest.fixture(autouse=True)
def removed():
    with torch.inference_mode():
        yield
        install.remove()


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
