"""Files that the pack's quantiser makes, through the pack's loaders; and its node."""

import comfy.model_management
import comfy.sd
import comfy.utils
import pytest
import torch
from apple_silicon_video.nodes.folders import register_gguf_folders
from apple_silicon_video.nodes.quantize import NODES, RECIPES, QuantizeModel
from apple_silicon_video.quantization import comfy_loader
from apple_silicon_video.quantization.quantizer_files import quantize_file
from apple_silicon_video.quantization.tensor import QuantizedWeight
from small_models import (
    ENCODERS,
    KEY_STYLES,
    encoder_weights,
    published_lora,
    wan_lora,
    wan_weights,
    write_encoder_reference,
    write_safetensors,
    write_wan_reference,
)

from .wan import apply_lora, forward

VARIANT = "wan2.1-t2v-1.3b"
LARGEST_ERROR = {"F16": 0.01, "BF16": 0.03, "Q8_0": 0.03, "Q5_K_M": 0.15, "Q4_0": 0.4, "IQ4_XS": 0.4, "Q3_K_S": 0.6}


@pytest.fixture
def dense(model_folders):
    return write_wan_reference(model_folders["diffusion_models"] / "wan.safetensors", wan_weights(VARIANT, "F32"))


def difference(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("recipe", LARGEST_ERROR)
def test_the_pack_loads_it_and_it_computes_nearly_the_same(recipe, dense, tmp_path):
    path = quantize_file(dense, tmp_path / "wan.gguf", recipe, threads=1).path
    expected = forward(comfy.sd.load_diffusion_model(str(dense)))
    ours = comfy_loader.load_diffusion_model(path)
    layer = ours.model.diffusion_model.blocks[0].ffn[0]
    assert isinstance(layer.weight, QuantizedWeight) or recipe in ("F16", "BF16")
    assert difference(forward(ours), expected) < LARGEST_ERROR[recipe]


@pytest.mark.parametrize("style", [*KEY_STYLES, "published"])
def test_merged_loras_compute_what_cores_lora_loader_computes(style, dense, tmp_path):
    """But for modulation, whose changes core's patcher passes over because it belongs to modules with children."""
    lora = published_lora(VARIANT) if style == "published" else wan_lora(VARIANT, "lora", key_style=style)
    lora = {name: factor for name, factor in lora.items() if "modulation" not in name}
    file = write_safetensors(tmp_path / "lora.safetensors", lora)
    core = comfy.sd.load_diffusion_model(str(dense))
    before, expected = forward(core), forward(apply_lora(core, lora, 0.8))
    merged = quantize_file(dense, tmp_path / "merged.gguf", "F32", loras=[(file, 0.8)])
    assert not merged.notes
    assert difference(expected, before) > 0.01
    assert difference(forward(comfy_loader.load_diffusion_model(merged.path)), expected) < 1e-4


def run_node(**inputs):
    class Quantize(QuantizeModel):
        hidden = type("Hidden", (), {"unique_id": None})

    return Quantize.execute(**inputs).args


def test_node_writes_beside_the_model_and_reports(dense):
    name, report = run_node(model_name="wan.safetensors", type="Q4_K_M")
    assert name == "wan-Q4_K_M.gguf" and "bits per weight" in report
    written = dense.with_name(name)
    assert comfy_loader.load_diffusion_model(written)
    before = written.stat().st_mtime_ns
    assert "there already" in run_node(model_name="wan.safetensors", type="Q4_K_M")[1]
    assert written.stat().st_mtime_ns == before
    assert "bits per weight" in run_node(model_name="wan.safetensors", type="Q4_K_M", overwrite=True)[1]
    assert written.stat().st_mtime_ns != before


def test_node_merges_a_lora(dense, model_folders, tmp_path):
    file = write_safetensors(model_folders["loras"] / "style.safetensors", wan_lora(VARIANT, "lora"))
    name, _ = run_node(model_name="wan.safetensors", type="Q4_0", lora_name="style.safetensors", lora_strength=0.5)
    assert name == "wan-style-0.5-Q4_0.gguf"
    expected = quantize_file(dense, tmp_path / "expected.gguf", "Q4_0", loras=[(file, 0.5)]).path
    assert dense.with_name(name).read_bytes() == expected.read_bytes()
    with pytest.raises(FileNotFoundError, match="is not in models/loras"):
        run_node(model_name="wan.safetensors", type="Q8_0", lora_name="gone.safetensors")
    with pytest.raises(FileNotFoundError, match="is not in models/diffusion_models or models/text_encoders"):
        run_node(model_name="gone.safetensors", type="Q8_0")


def test_node_quantises_text_encoders(model_folders):
    shape = ENCODERS["umt5"]
    source = model_folders["text_encoders"] / "umt5.safetensors"
    write_encoder_reference(source, shape, encoder_weights(shape, "F16"), torch.float16)
    name, report = run_node(model_name="umt5.safetensors", type="Q8_0")
    assert name == "umt5-Q8_0.gguf" and "bits per weight" in report
    clip = comfy_loader.load_text_encoder(source.with_name(name), "wan")
    assert isinstance(clip.cond_stage_model.umt5xxl.transformer.shared.weight, QuantizedWeight)


def test_cancelling_leaves_nothing(dense):
    comfy.model_management.interrupt_current_processing(True)
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            run_node(model_name="wan.safetensors", type="Q8_0")
    finally:
        comfy.model_management.interrupt_current_processing(False)
    assert [path.name for path in dense.parent.iterdir()] == ["wan.safetensors"]


def test_progress_bar_reaches_its_end(dense, monkeypatch):
    seen = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, *_, **__: seen.append(value / total))
    run_node(model_name="wan.safetensors", type="Q8_0")
    assert seen == sorted(seen) and seen[-1] == 1


def test_schema_offers_every_type(dense):
    register_gguf_folders()
    (node,) = NODES
    schema = node.define_schema()
    assert schema.node_id == "MPSQuantizeModel"
    inputs = {entry.id: entry for entry in schema.inputs}
    assert inputs["model_name"].options == ["wan.safetensors"]
    assert inputs["lora_name"].options == ["none"]
    assert inputs["type"].options == RECIPES and inputs["type"].default in RECIPES
    assert all(entry.tooltip for entry in (*schema.inputs, *schema.outputs))


def test_its_types_are_those_of_the_quantiser():
    from apple_silicon_video.quantization.recipes import RECIPES as KNOWN

    assert set(RECIPES) == set(KNOWN) - {"F32"}
    assert torch.get_num_threads() == 1
