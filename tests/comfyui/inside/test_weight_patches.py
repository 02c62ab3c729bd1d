"""LoRA, hooks, merging and saving on quantised weights, against core on the same weights decoded."""

import comfy.hooks
import comfy.model_management
import comfy.sd
import comfy.utils
import pytest
import torch
from apple_silicon_video.quantization.tensor import QuantizedWeight
from comfy_extras import nodes_model_merging
from small_models import ADAPTERS, published_lora, wan_lora

from .wan import apply_lora, forward, pair

VARIANT = "wan2.1-t2v-1.3b"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return pair(tmp_path_factory.mktemp("models"), VARIANT, "Q5_K_M")


def close(result, reference, unpatched):
    """Equal within float32 rounding, and the patch has changed something."""
    assert not torch.allclose(reference, unpatched, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(result, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_every_adapter_type(models, adapter):
    ours, core = models
    modules = ["blocks.0.self_attn.norm_q", "blocks.1.norm3"] if adapter == "w-norm" else None
    lora = wan_lora(VARIANT, adapter, modules)
    before = forward(ours)
    weight = ours.model.diffusion_model.blocks[0].ffn[0].weight
    blocks = weight.blocks.clone()

    result = forward(apply_lora(ours, lora, 0.8))
    close(result, forward(apply_lora(core, lora, 0.8)), before)

    weight = ours.model.diffusion_model.blocks[0].ffn[0].weight
    assert isinstance(weight, QuantizedWeight) and torch.equal(weight.blocks, blocks)
    assert torch.equal(forward(ours), before)


def test_published_lora_changes_dense_parameters_too(models):
    ours, core = models
    lora = published_lora(VARIANT)
    close(forward(apply_lora(ours, lora)), forward(apply_lora(core, lora)), forward(ours))
    assert torch.equal(forward(ours), forward(core))


def test_several_loras_strengths_and_removal(models):
    ours, core = models
    one, two = wan_lora(VARIANT, "lora"), wan_lora(VARIANT, "loha", seed=3)
    before = forward(ours)
    stacked = apply_lora(apply_lora(ours, one, 0.5), two, -1.25)
    reference = apply_lora(apply_lora(core, one, 0.5), two, -1.25)
    close(forward(stacked), forward(reference), before)
    close(forward(apply_lora(ours, one, 0.5)), forward(apply_lora(core, one, 0.5)), before)
    assert torch.equal(forward(ours), before)
    assert torch.equal(forward(apply_lora(ours, one, 0.0)), before)


def test_patched_model_survives_unloading(models):
    ours, _ = models
    patched = apply_lora(ours, wan_lora(VARIANT, "lora"))
    first = forward(patched)
    comfy.model_management.unload_all_models()
    assert not ours.model.diffusion_model.blocks[0].ffn[0].weight_function
    assert torch.equal(forward(patched), first)


def test_partial_loading_keeps_one_patch_per_weight(models):
    ours, _ = models
    patched = apply_lora(ours, wan_lora(VARIANT, "lora"))
    expected = forward(patched)
    layer = ours.model.diffusion_model.blocks[0].ffn[0]
    patched.partially_unload(patched.offload_device, 1e12)
    assert len(layer.weight_function) == 1
    patched.partially_load(patched.load_device, 1e12)
    assert len(layer.weight_function) == 1
    assert torch.equal(forward(patched), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_patch_is_rounded_once_in_half_precision(models, dtype):
    ours, _ = models
    patched = apply_lora(ours, wan_lora(VARIANT, "lora"), 0.01)
    comfy.model_management.load_models_gpu([patched], force_full_load=True)
    layer = ours.model.diffusion_model.blocks[0].ffn[0]
    key = "diffusion_model.blocks.0.ffn.0.weight"
    exact = comfy.lora.calculate_weight(patched.patches[key], layer.weight.dequantize(torch.float32).clone(), key)
    assert torch.equal(layer.decoded_weight(dtype, torch.device("cpu")), exact.to(dtype))


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_model_merge(tmp_path, ratio):
    ours_a, core_a = pair(tmp_path, VARIANT, "Q5_K_M")
    ours_b, core_b = pair(tmp_path, VARIANT, "Q3_K", seed=99)
    merge = nodes_model_merging.ModelMergeSimple().merge
    reference = forward(merge(core_a, core_b, ratio)[0])
    torch.testing.assert_close(forward(merge(ours_a, ours_b, ratio)[0]), reference, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(forward(merge(ours_a, core_b, ratio)[0]), reference, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(forward(merge(core_a, ours_b, ratio)[0]), reference, rtol=1e-4, atol=1e-5)


def test_model_subtract_and_add(tmp_path):
    ours_a, core_a = pair(tmp_path, VARIANT, "Q5_K_M")
    ours_b, core_b = pair(tmp_path, VARIANT, "Q3_K", seed=99)
    subtract, add = nodes_model_merging.ModelSubtract(), nodes_model_merging.ModelAdd()
    for merge, arguments in ((subtract.merge, (0.5,)), (add.merge, ())):
        reference = forward(merge(core_a, core_b, *arguments)[0])
        torch.testing.assert_close(forward(merge(ours_a, ours_b, *arguments)[0]), reference, rtol=1e-4, atol=1e-5)


def hooked(patcher, lora, strength):
    """A clone with a LoRA as a hook, active."""
    hooks = comfy.hooks.create_hook_lora(lora=lora, strength_model=strength, strength_clip=0.0)
    clone = patcher.clone()
    comfy.hooks.load_hook_lora_for_models(clone, None, lora, strength, 0.0)
    target = comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model)
    clone.register_all_hook_patches(hooks, target)
    return clone, hooks


def test_hook_lora_is_added_and_removed(models):
    ours, core = models
    lora = wan_lora(VARIANT, "lora")
    before, reference_before = forward(ours), forward(core)
    results = []
    for patcher in (ours, core):
        clone, hooks = hooked(patcher, lora, 0.7)
        steps = []
        comfy.model_management.load_models_gpu([clone], force_full_load=True)
        for active in (hooks, None, hooks):
            clone.patch_hooks(active)
            steps.append(forward_loaded(clone))
        clone.unpatch_hooks()
        results.append(steps)
    for ours_step, core_step in zip(*results):
        torch.testing.assert_close(ours_step, core_step, rtol=1e-3, atol=1e-4)
    close(results[0][0], results[1][0], before)
    assert torch.equal(results[0][1], before)
    assert torch.equal(forward(ours), before) and torch.equal(forward(core), reference_before)


def forward_loaded(patcher):
    """A forward pass without loading, so that active hooks stay."""
    generator = torch.Generator().manual_seed(7)
    latent = torch.randn(1, 16, 2, 8, 8, generator=generator)
    with torch.inference_mode():
        context = torch.randn(1, 20, 4096, generator=generator)
        return patcher.model.diffusion_model(latent, torch.tensor([500.0]), context)


def test_saving_a_patched_model_writes_dense_weights(tmp_path):
    ours, _ = pair(tmp_path, VARIANT, "Q5_K_M")
    lora = wan_lora(VARIANT, "lora")
    patched = apply_lora(ours, lora, 0.5)
    expected = forward(patched)
    state_dict = patched.state_dict_for_saving()
    assert not any(isinstance(value, QuantizedWeight) for value in state_dict.values())
    path = tmp_path / "saved.safetensors"
    comfy.utils.save_torch_file({k: v.contiguous().clone() for k, v in state_dict.items()}, str(path))
    reloaded = comfy.sd.load_diffusion_model(str(path))
    torch.testing.assert_close(forward(reloaded), expected, rtol=1e-4, atol=1e-5)
