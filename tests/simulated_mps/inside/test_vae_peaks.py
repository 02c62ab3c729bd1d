"""What Wan's VAEs need over their weights when they stream, in full size in dry mode, against vae_tiles' statements.

ComfyUI's own models in bfloat16 with the pack's attention. GiB over the weights as counted here, 81 frames:

| | core, whole | streamed, whole | streamed, budget 2 GiB |
|---|---:|---:|---:|
| Wan 2.1 decode 1280x720 | 6.23 | 5.84 | 1.67 in 4 tiles |
| Wan 2.1 encode 1280x720 | 4.21 | 3.70 | 1.94 in 2 |
| Wan 2.2 decode 1280x704 | 6.85 | 6.43 | 1.97 in 4 |
| Wan 2.2 encode 1280x704 | 3.29 | 2.49 | 1.34 in 2 |
"""

import sys

import core_tree
import pytest
import simulated_mps as sim
import torch

sys.path.insert(0, core_tree.folder())

import comfy.ldm.wan.vae
import comfy.ldm.wan.vae2_2
import comfy.model_management
import comfy.model_patcher
from apple_silicon_video.memory import vae_tiles
from apple_silicon_video.memory.vae_stages import decode_tiles, encode_tiles
from apple_silicon_video.memory.vae_streaming import wan_kind
from apple_silicon_video.mps_patches import attention
from apple_silicon_video.mps_patches.comfy_vae import ATTRIBUTE, VAEAttention, attention_blocks

GIB = 1 << 30
MPS = torch.device("mps")
SHAPE = {"dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "temperal_downsample": [False, True, True]}
MODELS = {
    "wan2.1": (comfy.ldm.wan.vae.WanVAE, {"dim": 96, "z_dim": 16}),
    "wan2.2": (comfy.ldm.wan.vae2_2.WanVAE, {"dim": 160, "z_dim": 48}),
}
# The peak is reached in the third chunk at the latest: only one op table walks through whole videos.
LONG = sim.installed()["torch"].startswith("2.13")
LENGTH = 81 if LONG else 33
LARGE = {"wan2.1": (1280, 720, LENGTH), "wan2.2": (1280, 704, LENGTH)}
CASES = [(name, operation) for name in MODELS for operation in ("decode", "encode")]


@pytest.fixture(autouse=True)
def dry(monkeypatch):
    """A 64 GiB Mac: what one attention call may take for temporaries is a constant then."""

    def free(device=None, torch_free_too=False):
        return (40 * GIB, 40 * GIB) if torch_free_too else 40 * GIB

    monkeypatch.setattr(comfy.model_management, "get_free_memory", free)
    attention.forget()
    sim.dry(1000)
    with torch.inference_mode():
        yield


def full_size(name, dtype=torch.bfloat16):
    model_class, options = MODELS[name]
    with torch.device("meta"):
        model = model_class(**SHAPE, **options)
    model = model.to(dtype).to_empty(device=MPS).eval()
    for block in attention_blocks(model):
        module = model.get_submodule(block)
        setattr(module, ATTRIBUTE, VAEAttention(getattr(module, ATTRIBUTE)))
    return model


class Nothing:
    """A canvas that keeps nothing."""

    def add(self, first, row, column, tile):
        self.last = tile

    def frames(self, first, count):
        return self.last


def peak(model, operation, size, budget=None, dtype=torch.bfloat16):
    """(bytes over the weights, tiling, frames or latent frames that came out)."""
    kind, (width, height, frames) = wan_kind(model), size
    tiling = vae_tiles.plan_tiles(operation, kind, width, height, frames, dtype, budget)
    rows, columns, count = height // kind.stride, width // kind.stride, (frames + 3) // 4
    sim.reset()
    before, came = sim.stats().live, 0
    if operation == "decode":

        def consume(first, frames):
            nonlocal came
            assert first == came
            came += frames.shape[0]

        def convert(piece):
            return torch.zeros(()).expand(piece.shape[2], *piece.shape[3:], piece.shape[1])

        latent = torch.zeros((), dtype=dtype).expand(1, kind.channels, count, rows, columns)
        decode_tiles(model, kind, latent, tiling, convert, consume, Nothing() if len(tiling) > 1 else None)
    else:

        def fetch(first, last, row, column):
            return torch.zeros((), dtype=dtype).expand(1, 3, last - first, row.size, column.size)

        came = encode_tiles(model, kind, (frames, rows, columns), tiling, fetch).shape[2]
    found = sim.stats().peak - before
    assert sim.stats().live == before and sim.stats().dry_computed == 0
    return found, tiling, came


def stated(model, operation, size, tiling, dtype=torch.bfloat16):
    function = getattr(vae_tiles, f"{operation}_peak_bytes")
    return function(wan_kind(model).name, *size, tiling, dtype)


@pytest.mark.parametrize(("name", "operation"), CASES)
def test_720p_stays_under_two_gib_when_the_budget_asks_for_it(name, operation):
    model = full_size(name)
    found, tiling, came = peak(model, operation, LARGE[name], 2 * GIB)
    assert len(tiling) > 1 and came == (LENGTH if operation == "decode" else LENGTH // 4 + 1)
    assert found < 2 * GIB, f"{found / GIB:.2f}"
    assert stated(model, operation, LARGE[name], tiling) == pytest.approx(found, rel=0.05)


@pytest.mark.parametrize("size", [(832, 480, 1), (480, 832, 17)], ids=str)
@pytest.mark.parametrize(("name", "operation"), CASES)
def test_peaks_are_as_stated(name, operation, size):
    model = full_size(name)
    found, tiling, _ = peak(model, operation, size)
    assert len(tiling) == 1
    excess = stated(model, operation, size, tiling) / found - 1
    assert -0.05 < excess < (0.5 if size[2] == 1 else 0.05)


def test_float32_takes_twice_as_much():
    model = full_size("wan2.1", torch.float32)
    found, tiling, _ = peak(model, "decode", (832, 480, 9), dtype=torch.float32)
    assert stated(model, "decode", (832, 480, 9), tiling, torch.float32) == pytest.approx(found, rel=0.05)


@pytest.mark.parametrize(
    ("name", "operation", "lengths"),
    [("wan2.1", "decode", (81, 481) if LONG else (21, 41)), ("wan2.2", "encode", (21, 41))],
)
def test_the_peak_grows_with_the_latent_alone(name, operation, lengths):
    model = full_size(name)
    short, long = (peak(model, operation, (320, 192, frames))[0] for frames in lengths)
    kind = wan_kind(model)
    added = (lengths[1] - lengths[0]) // 4 * 320 * 192 // kind.stride**2 * kind.channels * 2
    assert 0 <= long - short <= 3 * added, f"{(long - short) / GIB:.3f} GiB more"
