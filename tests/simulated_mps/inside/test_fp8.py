"""fp8 and its relatives on the simulated device: core's loader fails, the pack's computes what the CPU computes.

The small models are those of the tests inside ComfyUI; the tree is $COMFYUI_DIR, or the newest one pinned.
"""

import gc
import sys
import threading

import core_tree
import psutil
import pytest
import simulated_mps as sim
import torch

sys.path.insert(0, core_tree.folder())

import comfy.model_management
import comfy.sd
from apple_silicon_video.quantization import comfy_loader
from apple_silicon_video.quantization.comfy_patcher import QuantizedModelPatcher
from apple_silicon_video.quantization.safetensors_file import SafetensorsFile
from apple_silicon_video.quantization.scaled_formats import (
    SCALED_FORMATS,
    dequantize_scaled,
    dequantize_scaled_rows,
    read_mx_scales,
    read_scales,
)
from apple_silicon_video.quantization.scaled_layouts import scaled_layers
from apple_silicon_video.quantization.tensor import QuantizedWeight
from small_models import (
    ENCODERS,
    SCALED_LAYOUTS,
    decoded_state_dict,
    encoder_tokenizer,
    encoder_weights,
    scaled_model,
    transformers_name,
    wan_weights,
    write_full_size_scaled,
    write_safetensors,
    write_scaled,
)
from two_steps import two_steps

CPU, MPS = torch.device("cpu"), torch.device("mps")
TABLE = tuple(map(int, sim.installed()["torch"].split(".")[:2]))
VARIANT = "wan2.1-t2v-1.3b"
ERROR = "does not have support for that dtype"


@pytest.fixture(autouse=True)
def empty_device():
    yield
    comfy.model_management.unload_all_models()
    comfy.model_management.current_loaded_models.clear()


def write_wan(folder, layout):
    model = scaled_model(decoded_state_dict(wan_weights(VARIANT, "F16")), SCALED_LAYOUTS[layout])
    return write_scaled(folder / f"{layout}.safetensors", model), model.decoded


def on_the_cpu(state_dict):
    options = {"dtype": torch.float32, "load_device": CPU}
    return two_steps(comfy.sd.load_diffusion_model_state_dict(dict(state_dict), model_options=options))


@pytest.mark.parametrize("layout", SCALED_LAYOUTS)
def test_ours_samples_and_equals_the_cpu(layout, tmp_path):
    path, decoded = write_wan(tmp_path, layout)
    reference = on_the_cpu(decoded)
    patcher = comfy_loader.load_diffusion_model(path, torch.float32)
    assert isinstance(patcher, QuantizedModelPatcher) and patcher.load_device.type == "mps"
    result = two_steps(patcher)
    weight = patcher.model.diffusion_model.blocks[0].ffn[0].weight
    assert isinstance(weight, QuantizedWeight) and weight.device.type == "mps"
    assert reference.std() > 0.01
    torch.testing.assert_close(result, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("layout", "weight_dtype"),
    [
        ("marker", None),
        ("comfy-quant", None),
        ("comfy-quant-e5m2", None),
        ("mxfp8", None),
        ("e4m3fn", torch.float8_e4m3fn),
        ("e5m2", torch.float8_e5m2),
    ],
)
def test_core_fails_with_the_well_known_error(layout, weight_dtype, tmp_path):
    """``weight_dtype`` is what core's Load Diffusion Model passes on for its choice of that name."""
    path, _ = write_wan(tmp_path, layout)
    options = {} if weight_dtype is None else {"dtype": weight_dtype}
    patcher = comfy.sd.load_diffusion_model(str(path), model_options=options)
    if TABLE >= (2, 15) and SCALED_LAYOUTS[layout].dtype == torch.float8_e4m3fn:
        assert torch.isfinite(two_steps(patcher)).all()
    else:
        with pytest.raises(TypeError, match=ERROR):
            two_steps(patcher)
    assert torch.isfinite(two_steps(comfy_loader.load_diffusion_model(path))).all()


def test_core_doubles_plain_fp8(tmp_path):
    """Without a choice of dtype, core casts plain fp8 to half precision while loading: it runs, at twice the memory."""
    path, _ = write_wan(tmp_path, "e4m3fn")
    core = comfy.sd.load_diffusion_model(str(path))
    assert core.model_size() > 1.9 * comfy_loader.load_diffusion_model(path).model_size()


@pytest.mark.parametrize("layout", ["e4m3fn", "comfy-quant-row", "weight-scale-block", "mxfp8", "int8"])
def test_one_byte_per_weight_on_the_device(layout, tmp_path):
    path, _ = write_wan(tmp_path, layout)
    layers = scaled_layers(SafetensorsFile(path))
    one_byte = sum(layer.info.nbytes for layer in layers.values() if len(layer.info.shape) == 2)
    patcher = comfy_loader.load_diffusion_model(path)
    before = sim.stats().live
    comfy.model_management.load_models_gpu([patcher], force_full_load=True)
    weights = [p for p in patcher.model.diffusion_model.parameters() if isinstance(p, QuantizedWeight)]
    scaled = [weight for weight in weights if weight.block_format.name in SCALED_FORMATS]
    assert sum(weight.blocks.nbytes for weight in scaled) == one_byte
    assert sum(weight.numel() for weight in scaled) == one_byte
    live = sim.stats().live - before
    assert live < patcher.model_size() * 1.02 + 1e5
    dense = sum(p.nbytes for p in patcher.model.diffusion_model.parameters())
    assert live < dense * 1.02 + 1e5
    assert patcher.model_size() < path.stat().st_size * 1.02


@pytest.mark.parametrize(("matrices", "others"), [("F8_E4M3", "F16"), ("F16", "F16"), ("BF16", "F32")])
def test_peak_of_loading_to_the_device(matrices, others, tmp_path):
    """Gigabytes from the file to the device: besides its copy, no more than the largest tensor and 200 MB."""
    write_wan(tmp_path, "marker")
    two_steps(comfy_loader.load_diffusion_model(tmp_path / "marker.safetensors"))
    path = write_full_size_scaled(tmp_path / "1.3b.safetensors", "wan2.1-t2v-1.3b", matrices, others)
    largest = max(info.nbytes for info in SafetensorsFile(path).tensors.values())
    gc.collect()
    torch.mps.empty_cache()  # what earlier models left, so that nothing but this one moves the figures
    process, done = psutil.Process(), threading.Event()
    before = process.memory_info().rss - sim.stats().driver
    levels = [0]

    def watch():
        while not done.wait(0.005):
            levels.append(process.memory_info().rss - sim.stats().driver - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        patcher = comfy_loader.load_diffusion_model(path)
        comfy.model_management.load_models_gpu([patcher], force_full_load=True)
    finally:
        done.set()
        watcher.join()
    assert sim.stats().live > 1.3e9
    assert max(levels) < largest + 200e6, f"{max(levels) / 1e6:.0f} MB"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dense_files(dtype, tmp_path):
    """Half precision stays the file's bytes; float32 is left to core, which casts it to half precision."""
    dense = {name: tensor.to(dtype) for name, tensor in decoded_state_dict(wan_weights(VARIANT, "F16")).items()}
    path = write_safetensors(tmp_path / "dense.safetensors", dense)
    patcher = comfy_loader.load_diffusion_model(path, torch.float32)
    assert isinstance(patcher, QuantizedModelPatcher) == (dtype != torch.float32)
    reference = on_the_cpu({name: tensor.float() for name, tensor in dense.items()})
    torch.testing.assert_close(two_steps(patcher), reference, rtol=1e-5, atol=1e-5)
    assert patcher.model_size() < path.stat().st_size * 1.02


def test_leaving_the_device_returns_to_the_file(tmp_path):
    path, _ = write_wan(tmp_path, "comfy-quant-row")
    patcher = comfy_loader.load_diffusion_model(path, torch.float32)
    layer = patcher.model.diffusion_model.blocks[0].ffn[0]
    address, factors = layer.weight.blocks.data_ptr(), layer.weight.scales.values.data_ptr()
    first = two_steps(patcher)
    for _ in range(2):
        comfy.model_management.unload_all_models()
        assert (layer.weight.blocks.data_ptr(), layer.weight.scales.values.data_ptr()) == (address, factors)
        assert torch.equal(two_steps(patcher), first)


@pytest.mark.parametrize("layout", ["e4m3fn", "marker-full-precision", "weight-scale-block"])
def test_text_encoder_runs_on_the_device(layout, tmp_path):
    shape = ENCODERS["umt5"]
    dense = {transformers_name(weight.name): weight.decoded() for weight in encoder_weights(shape, "F16")}
    dense["spiece_model"] = torch.frombuffer(bytearray(encoder_tokenizer(shape)), dtype=torch.uint8)
    path = write_scaled(tmp_path / "umt5.safetensors", scaled_model(dense, SCALED_LAYOUTS[layout]))

    def encode(clip):
        return clip.encode_from_tokens_scheduled(clip.tokenize("A red fox in fresh snow."))[0][0].cpu()

    ours = comfy_loader.load_text_encoder(path, "wan")
    assert isinstance(ours.patcher, QuantizedModelPatcher) and ours.patcher.load_device.type == "mps"
    reference = encode(comfy_loader.load_text_encoder(path, "wan", on_cpu=True))
    result = encode(ours)
    embedding = ours.cond_stage_model.umt5xxl.transformer.encoder.block[0].layer[0].SelfAttention.q.weight
    assert embedding.device.type == "mps"
    assert reference.std() > 1e-3
    torch.testing.assert_close(result, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SCALED_FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_byte_decodes_on_the_device_as_on_the_cpu(name, dtype):
    generator = torch.Generator().manual_seed(0)
    codes = torch.arange(256, dtype=torch.uint8).repeat(24).view(48, 128)
    stored = {
        "none": None,
        "scalar": read_scales(torch.tensor(0.37), codes.shape),
        "rows": read_scales(torch.rand(48, generator=generator), codes.shape),
        "blocks": read_scales(torch.rand(3, 4, generator=generator), codes.shape),
        "e8m0": read_mx_scales(
            torch.randint(100, 150, (48, 4), dtype=torch.uint8, generator=generator), codes.shape, swizzled=False
        ),
    }
    fmt = SCALED_FORMATS[name]
    rows = torch.tensor([[5, 40], [0, 5]])
    for scales in stored.values():
        moved = None if scales is None else scales.to(MPS)
        found = dequantize_scaled(codes.to(MPS), fmt, codes.shape, moved, dtype).cpu()
        expected = dequantize_scaled(codes, fmt, codes.shape, scales, dtype)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
        found = dequantize_scaled_rows(codes.to(MPS), fmt, codes.shape, rows.to(MPS), moved, dtype).cpu()
        torch.testing.assert_close(found, expected[rows], rtol=0, atol=0, equal_nan=True)
