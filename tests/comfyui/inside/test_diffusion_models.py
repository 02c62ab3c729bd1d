"""Every Wan variant, layout and block format through the pack's loader, against core's loader on decoded weights."""

import comfy.model_management
import pytest
import torch
from apple_silicon_video.quantization import comfy_loader
from apple_silicon_video.quantization.comfy_patcher import QuantizedModelPatcher
from apple_silicon_video.quantization.formats import FORMATS
from apple_silicon_video.quantization.tensor import QuantizedWeight
from small_models import LAYOUTS, VARIANTS, wan_weights, write_wan_gguf

from .wan import class_name, forward, pair


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_is_recognised_and_equals_core(variant, tmp_path):
    ours, core = pair(tmp_path, variant)
    assert isinstance(ours, QuantizedModelPatcher)
    assert type(ours.model) is type(core.model)
    assert type(ours.model.model_config).__name__ == type(core.model.model_config).__name__ == class_name(variant)
    result, reference = forward(ours, variant), forward(core, variant)
    assert reference.std() > 0.01
    assert torch.equal(result, reference)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_in_the_wild(layout, tmp_path):
    ours, core = pair(tmp_path, recipe="Q5_K", layout=layout)
    assert torch.equal(forward(ours), forward(core))


@pytest.mark.parametrize("recipe", ["Q3_K_M", "F16", "BF16", *FORMATS])
def test_every_block_format(recipe, tmp_path):
    ours, core = pair(tmp_path, recipe=recipe)
    assert torch.equal(forward(ours), forward(core))


def test_weights_stay_quantised_and_report_the_compute_dtype(tmp_path):
    ours, core = pair(tmp_path, recipe="Q3_K")
    layer = ours.model.diffusion_model.blocks[0].ffn[0]
    assert isinstance(layer.weight, QuantizedWeight)
    assert layer.weight.dtype == ours.model.get_dtype() == torch.float32
    file_size = next(tmp_path.glob("*.gguf")).stat().st_size
    assert ours.model_size() < file_size * 1.02 < core.model_size() / 2
    forward(ours)
    assert isinstance(layer.weight, QuantizedWeight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_two_models_with_different_settings_do_not_affect_each_other(dtype, tmp_path):
    path = tmp_path / "small.gguf"
    write_wan_gguf(path, wan_weights("wan2.1-t2v-1.3b", "Q5_K_M"), "Q5_K_M")
    half = comfy_loader.load_diffusion_model(path, dtype)
    full = comfy_loader.load_diffusion_model(path, torch.float32)
    assert half.model.diffusion_model.blocks[0].ffn[0].weight.dtype == dtype
    assert full.model.diffusion_model.blocks[0].ffn[0].weight.dtype == torch.float32
    before = forward(full)
    forward(half)
    assert torch.equal(forward(full), before)


def test_unload_and_reload_return_to_the_file(tmp_path):
    ours, _ = pair(tmp_path)
    weight = ours.model.diffusion_model.blocks[0].ffn[0].weight
    address = weight.blocks.data_ptr()
    first = forward(ours)
    for _ in range(3):
        comfy.model_management.unload_all_models()
        assert ours.model.diffusion_model.blocks[0].ffn[0].weight.blocks.data_ptr() == address
        assert torch.equal(forward(ours), first)


def test_clones_share_the_model_and_its_blocks(tmp_path):
    ours, _ = pair(tmp_path)
    clone = ours.clone()
    assert type(clone) is type(ours) and clone.model is ours.model
    assert torch.equal(forward(clone), forward(ours))
