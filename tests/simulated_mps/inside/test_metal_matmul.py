"""Fused products on the simulated device: what the pack loads runs through them, each within rounding of float64.

The kernels run on the CPU (../../metal_on_cpu). The ComfyUI tree is $COMFYUI_DIR, or the newest one pinned.
"""

import os
import sys

import core_tree
import pytest
import simulated_mps.device as device
import torch

sys.path.insert(0, core_tree.folder())

import comfy.model_management
import metal_on_cpu
from apple_silicon_video.memory.comfy_activations import reduce_activations
from apple_silicon_video.quantization import comfy_loader, comfy_ops, metal_kernels, metal_matmul
from apple_silicon_video.quantization.formats import FORMATS, random_blocks
from apple_silicon_video.quantization.metal_matmul import within_rounding
from apple_silicon_video.quantization.scaled_formats import SCALED_FORMATS, read_scales
from apple_silicon_video.quantization.tensor import PlainFormat, QuantizedWeight
from small_models import ENCODERS, LAYOUTS, encoder_weights, wan_weights, write_encoder_gguf, write_wan_gguf
from two_steps import two_steps

MPS = torch.device("mps")
VARIANT = "wan2.1-t2v-1.3b"

# Which operators torch has does not matter to the kernels, so one table gets all the models and types.
MODELS = (("Q8_0", torch.half), ("Q3_K_M", torch.float16), ("Q5_K_M", torch.bfloat16))
TYPES = ("F8_E4M3", "F8_E5M2", "I8", "BF16", "IQ4_XS", "MXFP4")
if os.environ.get("SIMULATED_TORCH", "2.13") != "2.13":
    MODELS, TYPES = MODELS[:1], TYPES[:1]


@pytest.fixture(autouse=True)
def metal(monkeypatch):
    """The simulated device's compiler is Metal on the CPU; verdicts and models of other tests are forgotten."""
    monkeypatch.setattr(device, "shader_compiler", metal_on_cpu.compile_shader)
    monkeypatch.delenv(metal_kernels.SWITCH, raising=False)
    monkeypatch.delenv(metal_matmul.ROWS_SWITCH, raising=False)
    metal_kernels.forget()
    yield
    metal_kernels.forget()
    comfy.model_management.unload_all_models()
    comfy.model_management.current_loaded_models.clear()


@pytest.fixture
def products(monkeypatch):
    """Names of the weights' types whose products were fused, and the number of those that were not."""
    seen = {"fused": [], "separate": 0}
    linear = metal_matmul.linear

    def compared(x, weight, bias):
        y = linear(x, weight, bias)
        if y is None:
            seen["separate"] += 1
            return None
        dense, rows = weight.dequantize(x.dtype).cpu(), x.reshape(-1, x.shape[-1]).cpu()
        assert within_rounding(y.cpu().view(len(rows), -1), rows, dense, None if bias is None else bias.cpu())
        seen["fused"].append(weight.block_format.name)
        return y

    monkeypatch.setattr(metal_matmul, "linear", compared)
    return seen


def lines(caplog):
    return [record.getMessage() for record in caplog.records if record.name == metal_kernels.__name__]


def matmul_launches():
    """Launches of fused kernels since the test began."""
    libraries = [library for name, library in metal_kernels._libraries.items() if " inputs and " in name and library]
    return sum(getattr(library, kernel).launches for library in libraries for kernel in dir(library))


def sample(path, dtype=torch.float16):
    """Two Euler steps of the model in ``path``, loaded anew."""
    patcher = reduce_activations(comfy_loader.load_diffusion_model(path, dtype), "off")
    assert patcher.load_device.type == "mps"
    return two_steps(patcher)


def assert_close(actual, expected, part):
    """Equal but for roundings, of which the layers of a model add up to a small part of the values."""
    assert actual.isfinite().all() and expected.std() > 0
    assert (actual - expected).abs().max() <= part * expected.abs().max()


@pytest.mark.parametrize("recipe, dtype", MODELS)
def test_models_sample_through_fused_products(recipe, dtype, tmp_path, monkeypatch, products):
    weights = wan_weights(VARIANT, recipe)
    path = tmp_path / "model.gguf"
    write_wan_gguf(path, weights, recipe, LAYOUTS["plain"])
    monkeypatch.setenv(metal_matmul.ROWS_SWITCH, "0")
    expected = sample(path, dtype)
    assert not products["fused"] and matmul_launches() == 0
    monkeypatch.delenv(metal_matmul.ROWS_SWITCH)
    assert_close(sample(path, dtype), expected, {torch.float16: 0.02, torch.bfloat16: 0.15}[dtype])
    types = {weight.type_name for weight in weights} & {*metal_kernels.METAL_FORMATS} - {"BF16"}
    assert types <= set(products["fused"])
    assert matmul_launches() > len(products["fused"]) > 20


def test_text_encoder_through_fused_products(tmp_path, monkeypatch, products):
    """UMT5: fused for the words of a prompt, decoded first for the 512 tokens that core fills it up to."""
    shape = ENCODERS["umt5"]
    path = tmp_path / "umt5.gguf"
    write_encoder_gguf(path, shape, encoder_weights(shape, "Q8_0"), "Q8_0")
    clip = comfy_loader.load_text_encoder(path, "wan")
    tokens = clip.tokenize("A red fox in fresh snow.")

    def encode(count):
        cut = {name: [batch[:count] for batch in batches] for name, batches in tokens.items()}
        return clip.encode_from_tokens_scheduled(cut)[0][0].cpu()

    encode(512)
    assert not products["fused"] and products["separate"] > 0
    fused = encode(20)
    assert set(products["fused"]) == {"Q8_0"} and matmul_launches() > len(products["fused"]) > 5
    monkeypatch.setenv(metal_matmul.ROWS_SWITCH, "0")
    assert_close(fused, encode(20), 0.02)


def layer(name="Q4_K", features=24, columns=512):
    """A Linear of the pack's operations on the device."""
    fmt = FORMATS.get(name) or SCALED_FORMATS[name]
    if name in FORMATS:
        data, scales = random_blocks(fmt, features * columns // fmt.block_size, seed=1).view(-1), None
    else:
        data = (torch.arange(features * columns) % 0x78).to(torch.uint8)
        scales = read_scales(torch.linspace(0.5, 1, features) / 512, (features, columns))
    weight = QuantizedWeight(data, fmt, (features, columns), scales=scales)
    linear = comfy_ops.QuantizedOps.Linear(columns, features, dtype=torch.float16)
    linear.load_state_dict({"weight": weight, "bias": torch.arange(features) / features})
    return linear.to(MPS)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("rows", (1, 40))
def test_layers_of_other_types(name, rows, products):
    x = torch.randn(2, rows // 2 or 1, 512, generator=torch.Generator().manual_seed(0)).half()
    assert layer(name)(x.to(MPS)).shape == (2, rows // 2 or 1, 24)
    assert products["fused"] == [name]


def test_a_patched_weight_is_decoded_first(products):
    linear, x = layer(), torch.randn(3, 512, generator=torch.Generator().manual_seed(0)).half()
    plain = linear(x.to(MPS)).cpu()
    assert products["fused"] == ["Q4_K"]
    before = matmul_launches()
    linear.weight_function = [lambda weight: weight * 2]
    linear.bias_function = [lambda bias: bias * 2]
    assert torch.allclose(linear(x.to(MPS)).cpu(), 2 * plain, rtol=2e-3, atol=2e-3)
    assert products["fused"] == ["Q4_K"] and products["separate"] == 0 and matmul_launches() == before
    linear.weight_function, linear.bias_function = [], [lambda bias: bias * 0]
    assert torch.allclose(linear(x.to(MPS)).cpu(), plain - linear.bias.cpu(), rtol=2e-3, atol=2e-3)
    assert products["fused"] == ["Q4_K", "Q4_K"]


def test_plain_weights_and_the_cpu_are_left_alone(products):
    linear = layer()
    linear.to("cpu")(torch.zeros(1, 512).half())
    assert products == {"fused": [], "separate": 0}
    linear.weight = torch.nn.Parameter(QuantizedWeight.from_dense(torch.ones(24, 512).half(), torch.float16), False)
    assert isinstance(linear.weight.block_format, PlainFormat)
    linear.to(MPS)(torch.zeros(1, 512).half().to(MPS))
    assert products == {"fused": [], "separate": 1} and not metal_kernels._libraries


def test_a_broken_kernel_is_dropped_and_the_result_is_right(monkeypatch, caplog, products):
    linear, x = layer("Q4_0"), torch.randn(3, 512, generator=torch.Generator().manual_seed(0)).half().to(MPS)
    monkeypatch.setenv(metal_matmul.ROWS_SWITCH, "0")
    expected = linear(x).cpu()
    monkeypatch.delenv(metal_matmul.ROWS_SWITCH)
    intact = metal_matmul.source
    monkeypatch.setattr(metal_matmul, "source", lambda *what: intact(*what).replace("- 8.0f) * d", "- 7.9f) * d"))
    for _ in range(2):
        assert torch.equal(linear(x).cpu(), expected)
    assert not products["fused"]
    (line,) = [line for line in lines(caplog) if "matmul" in line]
    assert "matmul_4 for half inputs and Q4_0 weights is not used (its result differs from the reference)" in line


@pytest.mark.parametrize("setting", ((metal_kernels.SWITCH, "off"), (metal_matmul.ROWS_SWITCH, "0")))
def test_switched_off(setting, monkeypatch, products, caplog):
    monkeypatch.setenv(*setting)
    layer()(torch.zeros(1, 512).half().to(MPS))
    assert not products["fused"] and matmul_launches() == 0
    assert not any("matmul" in line for line in lines(caplog))


def test_a_device_without_a_compiler_decodes_first(monkeypatch, caplog):
    monkeypatch.setattr(device, "shader_compiler", None)
    linear, x = layer(), torch.randn(2, 512).half()
    for _ in range(2):
        result = linear(x.to(MPS)).cpu()
    dense = linear.weight.dequantize(torch.float16).cpu()
    assert torch.allclose(result, torch.nn.functional.linear(x, dense, linear.bias.cpu()), rtol=2e-3, atol=2e-3)
    assert len([line for line in lines(caplog) if "matmul" in line]) == 1
