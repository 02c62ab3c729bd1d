"""Metal kernels on the simulated device: the pack's loaders decode through them what torch decodes, bit for bit.

Products are torch's here (test_metal_matmul.py has the fused ones). The kernels run on the CPU (../../metal_on_cpu).
The ComfyUI tree is $COMFYUI_DIR, or the newest one pinned.
"""

import logging
import sys

import core_tree
import pytest
import simulated_mps.device as device
import torch

sys.path.insert(0, core_tree.folder())

import comfy.model_management
import metal_on_cpu
from apple_silicon_video.quantization import comfy_loader, metal_kernels, metal_matmul
from apple_silicon_video.quantization.formats import FORMATS, random_blocks
from apple_silicon_video.quantization.tensor import QuantizedWeight
from small_models import ENCODERS, LAYOUTS, encoder_weights, wan_weights, write_encoder_gguf, write_wan_gguf
from two_steps import two_steps

MPS = torch.device("mps")
VARIANT = "wan2.1-t2v-1.3b"
TYPES = [name for name in metal_kernels.METAL_FORMATS if name != "BF16"]


@pytest.fixture(autouse=True)
def metal(monkeypatch):
    """The simulated device's compiler is Metal on the CPU; verdicts and models of other tests are forgotten."""
    monkeypatch.setattr(device, "shader_compiler", metal_on_cpu.compile_shader)
    monkeypatch.delenv(metal_kernels.SWITCH, raising=False)
    monkeypatch.setenv(metal_matmul.ROWS_SWITCH, "0")
    metal_kernels.forget()
    yield
    metal_kernels.forget()
    comfy.model_management.unload_all_models()
    comfy.model_management.current_loaded_models.clear()


def lines(caplog):
    return [record for record in caplog.records if record.name == metal_kernels.__name__]


def launches(name):
    """Launches of a type's kernels since the test began."""
    library = metal_kernels._libraries.get(name)
    return sum(getattr(library, kernel).launches for kernel in dir(library)) if library else 0


def sample(path):
    """Two Euler steps of the model in ``path``, loaded anew."""
    patcher = comfy_loader.load_diffusion_model(path, torch.float16)
    assert patcher.load_device.type == "mps"
    return two_steps(patcher)


@pytest.mark.parametrize("recipe", ["Q3_K_M", "Q5_K_M", "Q2_K", "Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS", "MXFP4"])
def test_models_sample_through_the_kernels(recipe, tmp_path, monkeypatch, caplog):
    weights = wan_weights(VARIANT, recipe)
    path = tmp_path / "model.gguf"
    write_wan_gguf(path, weights, recipe, LAYOUTS["plain"])
    types = {weight.type_name for weight in weights} & set(TYPES)
    assert types
    monkeypatch.setenv(metal_kernels.SWITCH, "off")
    expected = sample(path)
    assert not metal_kernels._libraries
    monkeypatch.delenv(metal_kernels.SWITCH)
    caplog.set_level(logging.INFO)
    assert torch.equal(sample(path), expected)
    assert expected.isfinite().all() and expected.std() > 0
    assert all(launches(name) > 2 for name in types)
    assert len(lines(caplog)) == len(types)
    assert all("in use" in record.getMessage() for record in lines(caplog))


def test_text_encoder_takes_its_embeddings_by_row(tmp_path, monkeypatch, caplog):
    shape = ENCODERS["umt5"]
    path = tmp_path / "umt5.gguf"
    write_encoder_gguf(path, shape, encoder_weights(shape, "Q8_0"), "Q8_0")

    def encode():
        clip = comfy_loader.load_text_encoder(path, "wan")
        return clip.encode_from_tokens_scheduled(clip.tokenize("A red fox in fresh snow."))[0][0].cpu()

    monkeypatch.setenv(metal_kernels.SWITCH, "off")
    expected = encode()
    monkeypatch.delenv(metal_kernels.SWITCH)
    caplog.set_level(logging.INFO)
    assert torch.equal(encode(), expected)
    assert any("dequantize_rows_long" in record.getMessage() for record in lines(caplog))


@pytest.mark.parametrize("name", metal_kernels.METAL_FORMATS)
def test_weights_and_their_rows_on_the_device(name):
    fmt = FORMATS[name]
    shape = (12, 4 * fmt.block_size)
    weight = QuantizedWeight(random_blocks(fmt, 48, seed=1).view(-1), fmt, shape, torch.bfloat16)
    moved = weight.on_device(MPS)
    assert torch.equal(moved.dequantize().cpu(), weight.dequantize())
    assert torch.equal(moved.rows(3, 7).dequantize(torch.float32).cpu(), weight.dequantize(torch.float32)[3:7])
    indices = torch.tensor([[0, 11], [5, 5]])
    for kind in (torch.int32, torch.int64):
        rows = moved.dequantize_rows(indices.to(MPS, kind))
        assert torch.equal(rows.cpu(), weight.dequantize()[indices])
    assert launches(name) == 8  # four kernels, each checked and used


def test_a_broken_kernel_is_dropped_and_the_result_is_right(tmp_path, monkeypatch, caplog):
    path = tmp_path / "model.gguf"
    write_wan_gguf(path, wan_weights(VARIANT, "Q5_K_M"), "Q5_K_M", LAYOUTS["plain"])
    monkeypatch.setenv(metal_kernels.SWITCH, "off")
    expected = sample(path)
    monkeypatch.delenv(metal_kernels.SWITCH)
    intact = metal_kernels.source
    damaged = {"Q5_K": ("scaled - minimum", "scaled + minimum"), "Q6_K": ("- 32.0f", "- 31.0f")}
    monkeypatch.setattr(metal_kernels, "source", lambda name: intact(name).replace(*damaged[name]))
    for _ in range(2):
        assert torch.equal(sample(path), expected)
    assert len(lines(caplog)) == 2
    assert all("its result differs from the reference" in record.getMessage() for record in lines(caplog))


def test_a_device_without_a_compiler_decodes_with_torch(monkeypatch, caplog):
    monkeypatch.setattr(device, "shader_compiler", None)
    fmt = FORMATS["Q4_K"]
    weight = QuantizedWeight(random_blocks(fmt, 8, seed=2).view(-1), fmt, (8, 256), torch.float16)
    for _ in range(2):
        assert torch.equal(weight.on_device(MPS).dequantize().cpu(), weight.dequantize())
    assert len(lines(caplog)) == 1
