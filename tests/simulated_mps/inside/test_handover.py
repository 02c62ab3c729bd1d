"""What is on the device while workflows sample: one expert at a time, and less than Metal's recommended working set.

Experts follow each other through core's KSamplerAdvanced. For the working set, dry mode runs files of the published
sizes with the settings of the workflow table; the ceiling is the allocator's own, a byte more is an error.
"""

import gc
import sys

import core_tree
import pytest
import simulated_mps as sim
import torch

sys.path.insert(0, core_tree.folder())

import comfy.hooks
import comfy.lora
import comfy.patcher_extension
import comfy.sd
import comfy.utils
import full_size_sampling as full
from apple_silicon_video.memory.comfy_runs import WRAPPER_KEY
from apple_silicon_video.quantization import low_rank
from full_size_sampling import blank, load_full, load_small, management, sample
from small_models import wan_lora
from workflow_table import TABLE as WORKFLOWS

TABLE = tuple(map(int, sim.installed()["torch"].split(".")[:2]))
HIGH, LOW = "wan2.2-t2v-a14b-high", "wan2.2-t2v-a14b-low"
SMALL, FULL = (128, 128, 9), (832, 480, 81)
GIB = 1 << 30
PART = 16 << 10  # bytes


@pytest.fixture(autouse=True)
def plenty(monkeypatch):
    """So much free memory that core never unloads a model by itself."""
    monkeypatch.setattr(management, "get_free_memory", full.free_memory(lambda: 1 << 50))
    with torch.inference_mode():
        yield
    full.leave_nothing()


def with_lora(patcher, variant, seed=1):
    return comfy.sd.load_lora_for_models(patcher, None, wan_lora(variant, "lora", seed=seed), 0.8, 0)[0]


def peak_of(call):
    """(Result, peak of live bytes, bytes live afterwards)."""
    gc.collect()
    sim.reset()
    result = call()
    return result, sim.stats().peak, sim.stats().live


def hand_over(experts, size, **options):
    """Peaks of either half alone and of the second one after the first; bytes of the first expert; of a latent."""
    latent = blank(HIGH, *size)
    halves = list(zip(experts, (True, False), strict=True))
    alone = []
    for expert, first in halves:
        management.unload_all_models()
        alone.append(peak_of(lambda expert=expert, first=first: sample(expert, HIGH, latent, first, **options))[1])
    management.unload_all_models()
    half, _, resident = peak_of(lambda: sample(experts[0], HIGH, latent, True, **options))
    second = peak_of(lambda: sample(experts[1], HIGH, half, False, **options))[1]
    print(f"alone {alone}, after the first {second}, the first expert {resident}")
    return alone, second, resident, latent["samples"].nbytes


if TABLE in ((2, 10), (2, 13)):

    @pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
    def test_small_experts(tmp_path, lora):
        """The latent of the first half is copied once more than an empty one, which core does not scale."""
        experts = [load_small(tmp_path, name) for name in (HIGH, LOW)]
        if lora:
            experts = [with_lora(expert, name) for expert, name in zip(experts, (HIGH, LOW), strict=True)]
        sample(experts[0], HIGH, blank(HIGH, *SMALL), numbers=True)  # tables, and checks of first use
        alone, second, resident, latent = hand_over(experts, SMALL, numbers=True)
        assert resident > 4 << 20
        assert second <= max(alone) + latent


RANKS = {(2, 10): [0], (2, 13): [full.SPEED_LORA_RANK]}
if TABLE in RANKS:

    @pytest.mark.parametrize("rank", RANKS[TABLE])
    def test_full_size_experts(tmp_path, rank):
        """Q3_K_M at 832x480, 81 frames, in dry mode; rank of a LoRA, 0 is none."""
        full.check_blocks(tmp_path, HIGH)
        with full.dry_device():
            experts = [load_full(tmp_path, name, "Q3_K_M", rank) for name in (HIGH, LOW)]
            alone, second, resident, latent = hand_over(experts, FULL)
            assert resident > 6 * GIB
            assert second <= max(alone) + latent
            experts.clear()


def watched(patcher, unloads):
    """The patcher's detach, which notes the patcher when its weights leave the device."""
    detach = patcher.detach

    def noting(unpatch_all=True):
        if unpatch_all:
            unloads.append(patcher)
        return detach(unpatch_all)

    return noting


def factors_on_mps(patcher):
    """Dtypes and bytes of the LoRA factors that layers hold on the device."""
    functions = [f for m in patcher.model.modules() for f in getattr(m, "weight_function", ())]
    held = [member for f in functions for patch in f.patches for member in patch[1].weights if member is not None]
    tensors = [member for member in held if isinstance(member, torch.Tensor)]
    assert {tensor.device.type for tensor in tensors} == {"mps"}
    return {tensor.dtype for tensor in tensors}, sum(tensor.nbytes for tensor in tensors)


def loaded(patcher):
    """(Live bytes of a model on the device, their peak while it was loaded); nothing else is on the device."""
    management.unload_all_models()
    gc.collect()
    empty = sim.stats().live
    sim.reset()
    management.load_models_gpu([patcher], force_full_load=True)
    gc.collect()
    return sim.stats().live - empty, sim.stats().peak - empty


if TABLE == (2, 13):  # none depends on the table

    def test_a_lora_takes_half_its_bytes(tmp_path):
        """At no moment more; core counts them so; the patches stay in float32, and what is saved has them as such."""
        plain = load_small(tmp_path, HIGH)
        patched = with_lora(plain, HIGH)
        key = "diffusion_model.blocks.0.ffn.0.weight"
        sources = {key: [m for m in patches[0][1].weights if m is not None] for key, patches in patched.patches.items()}
        copies = {name: [torch.as_tensor(m).clone() for m in members] for name, members in sources.items()}
        whole = sum(m.nbytes for members in sources.values() for m in members if isinstance(m, torch.Tensor))
        weight = comfy.utils.get_attr(plain.model, key)
        dense = weight.dequantize(torch.float32).clone()
        exact = comfy.lora.calculate_weight(patched.patches[key], dense, key).to(weight.dtype)

        before, _ = loaded(plain)
        counted = plain.model.model_loaded_weight_memory
        with_factors, peak = loaded(patched)
        assert factors_on_mps(patched) == ({torch.float16}, whole // 2)
        assert with_factors - before == whole // 2 == patched.model.model_loaded_weight_memory - counted
        assert peak == with_factors

        for name, members in copies.items():
            found = [torch.as_tensor(m) for m in patched.patches[name][0][1].weights if m is not None]
            assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(members, found, strict=True))
        assert torch.equal(patched.patch_weight_to_device(key, return_weight=True).cpu(), exact)

    def test_a_lora_acts_as_in_float32_and_leaves_no_trace(tmp_path):
        """The patch of a whole matrix within two roundings to 11 bits; then the model without it, bit for bit."""
        plain = load_small(tmp_path, HIGH)
        patched = with_lora(plain, HIGH)
        layer = plain.model.diffusion_model.blocks[0].ffn[0]
        key = "diffusion_model.blocks.0.ffn.0.weight"
        management.load_models_gpu([plain], force_full_load=True)
        before = layer.decoded_weight(torch.float32, full.MPS).cpu()
        management.load_models_gpu([patched], force_full_load=True)
        assert layer.weight.device.type == "mps" and len(layer.weight_function) == 1
        found = layer.decoded_weight(torch.float32, full.MPS).cpu() - before
        ((strength, value, *_),) = patched.patches[key]
        up, down, alpha = value.weights[:3]
        scale = strength * alpha / down.shape[0]
        error = (found - scale * (up @ down)).abs()
        unit = torch.finfo(torch.float32).eps * before.abs().max()
        assert (error <= scale * (up.abs() @ down.abs()) * 2**-9.9 + unit).all() and error.max() > unit
        management.unload_all_models()
        assert not layer.weight_function
        management.load_models_gpu([plain], force_full_load=True)
        assert torch.equal(layer.decoded_weight(torch.float32, full.MPS).cpu(), before)

    def test_a_lora_is_added_part_by_part(tmp_path, monkeypatch):
        """The same sums as core's to a rounding, in the weight, its result and a part of the product."""
        monkeypatch.setattr(low_rank.add_product, "__defaults__", (PART,))
        patched = with_lora(load_small(tmp_path, HIGH), HIGH)
        key = "diffusion_model.blocks.0.ffn.0.weight"
        management.load_models_gpu([patched], force_full_load=True)
        layer = patched.model.diffusion_model.blocks[0].ffn[0]
        dense = layer.weight.dequantize(torch.float32, full.MPS).clone()
        nbytes, (function,) = dense.nbytes, layer.weight_function
        assert nbytes > 4 * PART
        exact = comfy.lora.calculate_weight(function.patches, dense.clone(), key).cpu()
        layer.decoded_weight(torch.bfloat16, full.MPS)  # the device's tables
        gc.collect()
        sim.reset()
        before = sim.stats().live
        found = function(dense)
        rank, columns = function.patches[0][1].weights[1].shape
        factors = 4 * rank * (columns + PART // (4 * columns))
        assert found is dense and sim.stats().peak - before <= PART + factors < nbytes // 2
        assert (found.cpu() - exact).abs().max() <= 2 * torch.finfo(torch.float32).eps * exact.abs().max()

    def test_a_scheduled_lora_takes_half_its_bytes(tmp_path):
        lora = wan_lora(HIGH, "lora", seed=1)
        patcher = load_small(tmp_path, HIGH).clone()
        comfy.hooks.load_hook_lora_for_models(patcher, None, lora, 0.7, 0.0)
        hooks = comfy.hooks.create_hook_lora(lora=lora, strength_model=0.7, strength_clip=0.0)
        target = comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model)
        patcher.register_all_hook_patches(hooks, target)
        before, _ = loaded(patcher)
        patcher.patch_hooks(hooks)
        whole = sum(tensor.nbytes for name, tensor in lora.items() if not name.endswith("alpha"))
        assert factors_on_mps(patcher) == ({torch.float16}, whole // 2)
        gc.collect()
        assert whole // 2 <= sim.stats().live - before < whole // 2 + (1 << 10)  # and the tables that decode weights
        patcher.unpatch_hooks()

    def test_unquantised_matrices_keep_a_lora_s_precision(tmp_path):
        patched = with_lora(load_small(tmp_path, HIGH, "F16"), HIGH)
        management.load_models_gpu([patched], force_full_load=True)
        assert factors_on_mps(patched)[0] == {torch.float32}

    def test_what_the_sampling_needs_stays(tmp_path):
        """Clones of the model are the model; models that it brings along are not unloaded to be loaded again."""
        model, other = load_small(tmp_path, HIGH), load_small(tmp_path, LOW)
        helper = load_small(tmp_path, "wan2.1-t2v-1.3b")
        management.load_models_gpu([model, other, helper])
        held = {id(entry.model.model) for entry in management.current_loaded_models}
        assert held == {id(each.model) for each in (model, other, helper)}
        patched = with_lora(model, HIGH)
        patched.set_additional_models("helper", [helper])
        unloads = []
        for each in (model, other, helper):
            each.detach = watched(each, unloads)
        sample(patched, HIGH, blank(HIGH, *SMALL), numbers=True)
        assert [each is other for each in unloads] == [True]
        held = {id(entry.model.model) for entry in management.current_loaded_models}
        assert held == {id(model.model), id(helper.model)}

    def test_other_devices_are_left_alone(tmp_path, monkeypatch):
        """A model on the CPU unloads nothing, and none on the CPU is unloaded for one on MPS."""
        model, other = load_small(tmp_path, HIGH), load_small(tmp_path, LOW)
        cpu = torch.device("cpu")
        other.load_device = cpu
        management.load_models_gpu([model, other])
        sample(model, HIGH, blank(HIGH, *SMALL), numbers=True)
        assert len(management.current_loaded_models) == 2
        sample(other, HIGH, blank(HIGH, *SMALL), numbers=True)
        assert len(management.current_loaded_models) == 2
        kind = comfy.patcher_extension.WrappersMP.OUTER_SAMPLE
        assert len(model.get_wrappers(kind, WRAPPER_KEY)) == 1


ROWS = {
    "wan2.2_i2v_a14b_16gb": "wan2.2-i2v-a14b-high",
    "wan2.2_i2v_a14b_fast_16gb": "wan2.2-i2v-a14b-high",
    "wan2.2_i2v_5b_16gb": "wan2.2-ti2v-5b",
    "wan2.2_i2v_a14b_fast_24gb": "wan2.2-i2v-a14b-high",
    "wan2.2_t2v_5b_24gb": "wan2.2-ti2v-5b",
    "wan2.2_i2v_a14b_fast_36gb": "wan2.2-i2v-a14b-high",
}
"""Workflow -> its model; the low-noise expert is as large as the high-noise one."""


def covers(row, other):
    """Whether what ``other`` needs is no more than what ``row`` needs."""
    if "A14B" in other.title and "A14B" not in row.title:
        return False
    tokens = row.width * row.height * row.frames >= other.width * other.height * other.frames
    weights = row.quantisation >= other.quantisation or "1.3B" in other.title
    return tokens and weights and row.fast >= other.fast


def test_rows_are_the_largest():
    for name, workflow in WORKFLOWS.items():
        rows = [WORKFLOWS[row] for row in ROWS if WORKFLOWS[row].memory == workflow.memory]
        assert workflow.memory > 36 or any(covers(row, workflow) for row in rows), name


def sampling_peak(folder, monkeypatch, name, memory):
    """(Peak of live bytes while a workflow samples two steps on a Mac of that memory, weights included; its limit)."""
    row, variant = WORKFLOWS[name], ROWS[name]
    full.check_blocks(folder, variant)
    recommended = memory * GIB * 2 // 3
    monkeypatch.setattr(management, "get_free_memory", full.free_memory(lambda: recommended - sim.stats().live))
    with full.dry_device():
        sim.limits(recommended, recommended * 3 // 4, recommended)
        assert torch.mps.recommended_max_memory() == recommended
        patcher = load_full(folder, variant, row.quantisation, full.SPEED_LORA_RANK if row.fast else 0)
        latent = blank(variant, row.width, row.height, row.frames)
        gc.collect()
        sim.reset()
        sample(patcher, variant, latent, cfg=1.0 if row.fast else 5.0)
        print(f"{name}: {sim.stats().peak / GIB:.2f} of {recommended / GIB:.2f} GiB")
        return sim.stats().peak, recommended


CASES = {(2, 10): ["wan2.2_i2v_a14b_16gb"], (2, 13): list(ROWS)}.get(TABLE, [])
if CASES:

    @pytest.mark.parametrize("name", CASES)
    def test_sampling_stays_below_the_working_set(tmp_path, monkeypatch, name):
        peak, recommended = sampling_peak(tmp_path, monkeypatch, name, WORKFLOWS[name].memory)
        assert peak < recommended

    def test_the_ceiling_is_real(tmp_path, monkeypatch):
        with pytest.raises(torch.OutOfMemoryError):
            sampling_peak(tmp_path, monkeypatch, CASES[0], 12)
