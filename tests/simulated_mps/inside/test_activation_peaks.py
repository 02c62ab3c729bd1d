"""What a Wan forward needs over its weights with fewer activations: full sizes in dry mode, on this op table.

ComfyUI's own models in bfloat16 with the pack's attention, one block of them, since blocks run one after the other.
Peaks in GiB over the weights, batch 1, as counted here; before 2.13, attention itself takes up to 0.5:

| model | size | core's blocks, 2.13 | 2.13, 2.15 | 2.8, 2.10 |
|---|---|---:|---:|---:|
| 1.3B | 832x480x81 | 1.41 | 0.58 | 0.74 |
| 14B | 832x480x81 | 3.16 | 1.43 | 1.61 |
| 14B | 1280x720x81 | 7.30 | 3.11 | 3.47 |

Its price for a block of 14B at 832x480x81: 739 operations instead of 78 and 53.5 GiB read and written instead of 30.9
with prefill kernels; 9,763 instead of 7,916 and 780 GiB instead of 729 without them. Each chunk of queries reads all
keys and values, as each of attention's own blocks does; the rest are norms computed twice, and copies into place.
"""

import gc
import os
import sys
from dataclasses import dataclass, field

import pytest
import simulated_mps as sim
import torch

if os.environ.get("COMFYUI_DIR") is None:
    import fetch_comfyui

    os.environ["COMFYUI_DIR"] = str(fetch_comfyui.fetch())
sys.path.insert(0, os.environ["COMFYUI_DIR"])

import comfy.ldm.wan.model as wan
import comfy.model_management
import comfy.model_patcher
import comfy.ops
from apple_silicon_video.memory import comfy_activations, wan_activations
from apple_silicon_video.memory.comfy_activations import reduce_activations
from apple_silicon_video.memory.wan_activations import Host
from apple_silicon_video.mps_patches import attention
from apple_silicon_video.mps_patches.comfy_attention import patch_model
from apple_silicon_video.quantization import comfy_loader
from small_models import write_full_size_wan

MPS, CPU = torch.device("mps"), torch.device("cpu")
TABLE = tuple(map(int, sim.installed()["torch"].split(".")[:2]))
PREFILL = TABLE >= (2, 13)
GIB = 1 << 30
SIZES = {"1.3B": (1536, 8960, 12), "5B": (3072, 14336, 24), "14B": (5120, 13824, 40), "tiny": (256, 512, 2)}
SMALL, LARGE, FIVE = (832, 480, 81), (1280, 720, 81), (1280, 704, 121)


@dataclass(frozen=True)
class Case:
    """A model at a size; kind "t2v", "i2v" or "vace"; times: entries of the time step, 1 or "frames"."""

    size: str
    video: tuple[int, int, int]
    kind: str = "t2v"
    batch: int = 1
    times: str = ""


@dataclass(frozen=True)
class Figures:
    """One forward: bytes over the weights, operations, bytes they read and wrote, elements of the largest tensor."""

    peak: int
    operations: int
    moved: int
    largest: int
    output: torch.Tensor = field(repr=False)


@pytest.fixture(autouse=True)
def without_gradients(monkeypatch):
    """A 64 GiB Mac: what one attention call may take for temporaries is a constant then."""

    def free(device=None, torch_free_too=False):
        return (40 * GIB, 40 * GIB) if torch_free_too else 40 * GIB

    monkeypatch.setattr(comfy.model_management, "get_free_memory", free)
    attention.forget()
    with torch.inference_mode():
        yield


def patcher_of(case, device=MPS, seed=None):
    """A ModelPatcher around core's model with one block, and VACE's branch with one, on the device."""
    dim, ffn_dim, heads = SIZES[case.size]
    channels = 48 if case.size == "5B" else 36 if case.kind == "i2v" else 16
    options = {"vace_layers": 1, "vace_in_dim": 96} if case.kind == "vace" else {}
    with torch.device("meta"):
        model = (wan.VaceWanModel if case.kind == "vace" else wan.WanModel)(
            dim=dim, ffn_dim=ffn_dim, num_heads=heads, num_layers=1, in_dim=channels, dtype=torch.bfloat16,
            out_dim=48 if case.size == "5B" else 16, operations=comfy.ops.disable_weight_init,
            model_type={"i2v": "i2v", "vace": "vace"}.get(case.kind, "t2v"), **options,
        )  # fmt: skip
    model = model.to_empty(device=device)
    if seed is not None:
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.data.copy_(torch.randn(parameter.shape) * 0.05)
    holder = torch.nn.Module()
    holder.diffusion_model, holder.device = model, device
    return patch_model(comfy.model_patcher.ModelPatcher(holder, device, CPU))


def blank(*shape):
    return torch.empty(shape, dtype=torch.bfloat16, device=MPS)


def random(*shape):
    return torch.randn(shape).bfloat16().to(MPS)


def forward(patcher, case, tensor=blank):
    """One forward of a model whose weights are on the device; counted from here on."""
    loaded = bool(patcher.object_patches_backup)
    if not loaded:
        patcher.patch_model(load_weights=False)
    width, height, frames = case.video
    shrink = 16 if case.size == "5B" else 8
    frames, model, batch = (frames - 1) // 4 + 1, patcher.model.diffusion_model, case.batch
    latent = (frames, height // shrink, width // shrink)
    inputs = {}
    if case.kind == "i2v":
        inputs["clip_fea"] = tensor(batch, 257, 1280)
    if case.kind == "vace":
        inputs |= {"vace_context": tensor(batch, 1, 96, *latent), "vace_strength": [1.0]}
    x, text = tensor(batch, model.patch_embedding.in_channels, *latent), tensor(batch, 512, 4096)
    times = torch.full((batch, frames) if case.times else (batch,), 500.0, device=MPS)
    options = dict(patcher.model_options["transformer_options"])
    gc.collect()
    torch.mps.empty_cache()
    sim.reset()
    before = sim.stats().live
    output = model(x, times, text, transformer_options=options, **inputs)
    stats = sim.stats()
    counts = stats.ops.values()
    if not loaded:
        patcher.unpatch_model(unpatch_weights=False)
    return Figures(
        stats.peak - before, sum(count.calls for count in counts), sum(count.bytes for count in counts),
        max(count.largest for count in counts), output,
    )  # fmt: skip


def measure(case, reduced=True, **options):
    """Figures of a forward in dry mode, in which the blocks must have been found right before."""
    assert not reduced or checked(case)
    attention.attention_version(MPS), attention.half_softmax_is_exact(MPS)
    sim.mac(64)
    sim.dry(1 << 18)
    patcher = patcher_of(case)
    return forward(reduce_activations(patcher, "auto" if reduced else "off", **options), case)


def checked(case):
    """Compare this kind of block with core's on the device, with numbers, once; whether all agreed."""
    small = Case("tiny", (128, 128, 9), case.kind, 1, case.times)
    kind = (wan.VaceWanAttentionBlock if case.kind == "vace" else wan.WanAttentionBlock, case.kind == "i2v")
    if not any((key[0], not key[3]) == kind and key[4] == bool(case.times) for key in comfy_activations._verified):
        forward(reduce_activations(patcher_of(small, seed=0)), small, random)
    return all(comfy_activations._verified.values())


@pytest.mark.parametrize(("kind", "times"), [("t2v", ""), ("t2v", "frames"), ("i2v", ""), ("vace", "")])
def test_on_the_device_with_numbers(kind, times):
    """bfloat16, chunks of 64 tokens."""
    case = Case("tiny", (128, 128, 9), kind, 2, times)
    patcher = patcher_of(case, seed=0)
    torch.manual_seed(1)
    right = forward(patcher, case, random).output.cpu().float()
    torch.manual_seed(1)
    found = forward(reduce_activations(patcher, "auto", 1), case, random).output.cpu().float()
    assert right.std() > 0.1
    assert (found - right).norm() < 0.01 * right.norm()
    assert comfy_activations._verified and all(comfy_activations._verified.values())


LIMITS = [
    (Case("14B", SMALL), 2.4, (1.43, 1.62)),
    (Case("1.3B", SMALL), 1.1, (0.58, 0.75)),
    (Case("14B", LARGE), 5.5, (3.11, 3.47)),
    (Case("14B", SMALL, "i2v"), 2.4, (1.44, 1.63)),
    (Case("14B", SMALL, "vace"), 2.6, (2.37, 2.56)),
    (Case("5B", FIVE), 1.2, (0.82, 1.16)),
    (Case("5B", FIVE, times="frames"), 1.2, (0.75, 1.12)),
    (Case("14B", SMALL, batch=2), 2.4, (2.11, 2.25)),
]
# A block of 14B at 1280x720 is 64,000 operations without prefill kernels: once is enough.
CASES = {(2, 10): LIMITS[:3], (2, 13): LIMITS, (2, 15): LIMITS[:3]}.get(TABLE, LIMITS[:2])


@pytest.mark.parametrize(("case", "limit", "counted"), CASES)
def test_peak_over_the_weights(case, limit, counted):
    figures = measure(case)
    print(f"{case}: {figures.peak / GIB:.3f} GiB, {figures.operations} operations, {figures.moved / GIB:.1f} GiB moved")
    assert figures.largest < 1 << 31
    assert not {rule for rule, *_ in sim.violations()} & {"scores-2-31", "int-max-dims", "buffer-limit", "cat-2-31"}
    assert figures.peak < limit * GIB
    assert figures.peak < (counted[0] if PREFILL else counted[1]) * 1.01 * GIB
    assert sim.stats().dry_computed == 0


if TABLE in ((2, 10), (2, 13)):

    def test_what_it_costs():
        """And what it is worth: core's blocks at the same size."""
        case = Case("14B", SMALL)
        plain, reduced = measure(case, reduced=False), measure(case)
        assert 3.1 * GIB < plain.peak < 3.2 * GIB
        assert reduced.moved < (1.8 if PREFILL else 1.1) * plain.moved
        assert reduced.operations < (plain.operations + 700 if PREFILL else 1.3 * plain.operations)


STAGES = {
    "keys": Case("14B", SMALL),
    "queries": Case("14B", SMALL),
    "cross": Case("14B", SMALL, "i2v"),
    "feed-forward": Case("14B", SMALL),
    "head": Case("5B", FIVE, times="frames"),
}


if TABLE == (2, 13):  # neither depends on the table

    @pytest.mark.parametrize("stage", STAGES)
    def test_each_stage_in_chunks_counts(stage, monkeypatch):
        """The forward needs more as soon as one stage has all tokens at once."""
        assert set(STAGES) == set(wan_activations.WIDTHS)
        case = STAGES[stage]
        peak = measure(case).peak
        chunks = Host.chunks

        def whole(self, x, name, *args, **kwargs):
            return [slice(0, x.shape[1])] if name == stage else chunks(self, x, name, *args, **kwargs)

        monkeypatch.setattr(Host, "chunks", whole)
        assert measure(case).peak > 1.05 * peak

    def test_14b_at_q3_k_while_it_samples(tmp_path):
        """Weights of all 40 blocks on the device, quantised; two blocks run."""
        case = Case("14B", SMALL)
        assert checked(case)
        patcher = comfy_loader.load_diffusion_model(
            write_full_size_wan(tmp_path / "wan.gguf", "wan2.1-t2v-14b", "Q3_K_M"), torch.bfloat16
        )
        attention.attention_version(MPS), attention.half_softmax_is_exact(MPS)
        sim.mac(64)
        sim.dry(1 << 18)
        patcher = reduce_activations(patcher)
        comfy.model_management.load_models_gpu([patcher], force_full_load=True)
        model = patcher.model.diffusion_model
        blocks = model.blocks
        model.blocks = blocks[:2]
        figures = forward(patcher, case)
        model.blocks = blocks
        print(f"{sim.stats().peak / GIB:.2f} GiB in all, {figures.peak / GIB:.2f} over the weights")
        assert figures.peak < 1.75 * GIB
        assert sim.stats().peak < 9.5 * GIB
        comfy.model_management.unload_all_models()
