"""fp8, int8 and MXFP8 safetensors in every layout: the pack's way against core's on the CPU, and the decoded model."""

import gc
import threading

import comfy.model_management
import comfy.quant_ops
import comfy.sd
import comfy.utils
import psutil
import pytest
import torch
from apple_silicon_video.quantization import comfy_loader
from apple_silicon_video.quantization.comfy_patcher import QuantizedModelPatcher
from apple_silicon_video.quantization.safetensors_file import SafetensorsFile
from apple_silicon_video.quantization.scaled_layouts import PLAIN, core_formats, scaled_layers
from apple_silicon_video.quantization.tensor import QuantizedWeight
from small_models import (
    ENCODERS,
    SCALED_LAYOUTS,
    decoded_state_dict,
    encoder_config,
    encoder_tokenizer,
    encoder_weights,
    scaled_model,
    transformers_name,
    wan_lora,
    wan_weights,
    write_full_size_scaled,
    write_safetensors,
    write_scaled,
)

from .wan import apply_lora, forward

VARIANT = "wan2.1-t2v-1.3b"
# Core multiplies int8 with activations that it rounds to int8 too, so its result is near the decoded model's only.
ROUNDED_BY_CORE = ("int8", "int8-row")
# Core casts weights of a ``scaled_fp8`` file to e4m3fn, and bytes instead of viewing them; it drops scales that no
# configuration announces, and knows none for blocks but MXFP8's own.
NOT_BY_CORE = (
    "marker-e5m2",
    "comfy-quant-bytes",
    "weight-scale",
    "weight-scale-row",
    "weight-scale-block",
    "block-e5m2",
    "configured-block",
    "mxfp8-rows",
)


def write_wan(folder, layout, prefix="", variant=VARIANT):
    """(path of the file, state dict that it decodes to)."""
    dense = decoded_state_dict(wan_weights(variant, "F16"))
    model = scaled_model(dense, SCALED_LAYOUTS[layout], prefix)
    return write_scaled(folder / f"{layout}.safetensors", model), model.decoded


def core_reads(path):
    formats = core_formats(scaled_layers(SafetensorsFile(path)).values())
    return formats <= {PLAIN, *comfy.quant_ops.QUANT_ALGOS}


def dense_model(state_dict):
    return comfy.sd.load_diffusion_model_state_dict(dict(state_dict))


@pytest.mark.parametrize("layout", SCALED_LAYOUTS)
def test_wan_equals_the_decoded_model_and_core(layout, tmp_path):
    path, decoded = write_wan(tmp_path, layout)
    ours = comfy_loader.load_diffusion_model(path, own_loader=True)
    assert isinstance(ours, QuantizedModelPatcher)
    layer = ours.model.diffusion_model.blocks[0].ffn[0]
    assert isinstance(layer.weight, QuantizedWeight)
    result, reference = forward(ours), forward(dense_model(decoded))
    assert reference.std() > 0.01
    assert torch.equal(result, reference)
    if layout in NOT_BY_CORE or not core_reads(path):
        assert not core_reads(path)
        return
    by_core = forward(comfy_loader.load_diffusion_model(path, own_loader=False))
    if layout in ROUNDED_BY_CORE:
        torch.testing.assert_close(by_core, result, rtol=0.1, atol=0.1 * float(result.std()))
    else:
        assert torch.equal(by_core, result)


def test_core_lacks_what_is_said_of_it(tmp_path):
    """The layouts that core is not trusted with are refused or give another result there."""
    for layout in NOT_BY_CORE:
        path, decoded = write_wan(tmp_path, layout)
        try:
            result = forward(comfy_loader.load_diffusion_model(path, own_loader=False))
        except (RuntimeError, KeyError, ValueError):
            continue
        assert not torch.allclose(result, forward(dense_model(decoded)), rtol=1e-3, atol=1e-3), layout


@pytest.mark.parametrize("layout", SCALED_LAYOUTS)
def test_off_the_mac_core_loads_what_it_can(layout, tmp_path):
    path, _ = write_wan(tmp_path, layout)
    ours = isinstance(comfy_loader.load_diffusion_model(path), QuantizedModelPatcher)
    assert ours != core_reads(path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dense_files_are_read_without_a_copy(dtype, tmp_path):
    dense = {name: tensor.to(dtype) for name, tensor in decoded_state_dict(wan_weights(VARIANT, "F16")).items()}
    path = write_safetensors(tmp_path / "dense.safetensors", dense)
    assert not isinstance(comfy_loader.load_diffusion_model(path), QuantizedModelPatcher)
    ours = comfy_loader.load_diffusion_model(path, own_loader=True)
    assert isinstance(ours, QuantizedModelPatcher)
    core = comfy_loader.load_diffusion_model(path, own_loader=False)
    torch.testing.assert_close(forward(ours), forward(core), rtol=1e-5, atol=1e-5)  # sums depend on alignment


@pytest.mark.parametrize("layout", ["marker", "header", "mxfp8"])
def test_prefixed_names(layout, tmp_path):
    path, decoded = write_wan(tmp_path, layout, prefix="model.diffusion_model.")
    ours = comfy_loader.load_diffusion_model(path, own_loader=True)
    assert torch.equal(forward(ours), forward(dense_model(decoded)))


@pytest.mark.parametrize("variant", ["wan2.2-i2v-a14b-high", "wan2.1-i2v-14b", "wan2.2-ti2v-5b"])
def test_other_variants_cast_whole(variant, tmp_path):
    path, decoded = write_wan(tmp_path, "e4m3fn", variant=variant)
    ours = comfy_loader.load_diffusion_model(path, own_loader=True)
    assert torch.equal(forward(ours, variant), forward(dense_model(decoded), variant))


def test_one_byte_per_weight(tmp_path):
    path, _ = write_wan(tmp_path, "comfy-quant-row")
    ours = comfy_loader.load_diffusion_model(path, own_loader=True)
    weight = ours.model.diffusion_model.blocks[0].ffn[0].weight
    assert weight.dtype == torch.float32
    assert weight.nbytes == weight.numel() + 4 * weight.shape[0]
    assert ours.model_size() < path.stat().st_size * 1.02
    address = weight.blocks.data_ptr()
    first = forward(ours)
    comfy.model_management.unload_all_models()
    assert ours.model.diffusion_model.blocks[0].ffn[0].weight.blocks.data_ptr() == address
    assert torch.equal(forward(ours), first)


def test_lora_on_the_fly(tmp_path):
    path, decoded = write_wan(tmp_path, "weight-scale-block")
    ours = comfy_loader.load_diffusion_model(path, own_loader=True)
    lora = wan_lora(VARIANT, "lora")
    before = forward(ours)
    result = forward(apply_lora(ours, lora))
    reference = forward(apply_lora(dense_model(decoded), lora))
    assert not torch.allclose(result, before, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(result, reference, rtol=1e-3, atol=1e-4)
    assert torch.equal(forward(ours), before)


def test_core_reloads_the_model_by_its_patcher(tmp_path):
    path, _ = write_wan(tmp_path, "marker")
    ours = comfy_loader.load_diffusion_model(path, own_loader=True)
    load, arguments = ours.cached_patcher_init
    again = load(*arguments)
    assert isinstance(again, QuantizedModelPatcher)
    assert torch.equal(forward(again), forward(ours))


# ---- text encoders


def write_umt5(folder, layout, name="umt5"):
    shape = ENCODERS[name]
    dense = {transformers_name(weight.name): weight.decoded() for weight in encoder_weights(shape, "F16")}
    dense["spiece_model"] = torch.frombuffer(bytearray(encoder_tokenizer(shape)), dtype=torch.uint8)
    model = scaled_model(dense, SCALED_LAYOUTS[layout])
    return write_scaled(folder / f"{layout}.safetensors", model), model, shape


def core_clip(state_dict, shape, metadata=None):
    """Core's CLIP as its own loader makes it; the marker by which core knows a UMT5-XXL is added to small files."""
    state_dict = {
        **state_dict,
        "encoder.block.23.layer.1.DenseReluDense.wi_1.weight": torch.zeros(10240, 1, dtype=torch.float16),
    }
    state_dict, _ = comfy.utils.convert_old_quants(state_dict, model_prefix="", metadata=metadata or {})
    return comfy.sd.load_text_encoder_state_dicts(
        [state_dict],
        clip_type=comfy.sd.CLIPType.WAN,
        model_options={"umt5xxl_model_config": encoder_config(shape)},
    )


def encode(clip, text="A red fox walks through fresh snow at sunrise."):
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))[0][0]


@pytest.mark.parametrize("layout", SCALED_LAYOUTS)
def test_umt5_equals_the_decoded_model_and_core(layout, tmp_path):
    path, model, shape = write_umt5(tmp_path, layout)
    ours = comfy_loader.load_text_encoder(path, "wan", own_loader=True)
    assert isinstance(ours.patcher, QuantizedModelPatcher)
    attention = ours.cond_stage_model.umt5xxl.transformer.encoder.block[0].layer[0].SelfAttention
    assert isinstance(attention.q.weight, QuantizedWeight)
    result, reference = encode(ours), encode(core_clip(model.decoded, shape))
    assert reference.std() > 1e-3
    assert torch.equal(result, reference)
    if layout not in NOT_BY_CORE and core_reads(path):
        by_core = encode(core_clip(model.tensors, shape, model.metadata))
        if layout in ROUNDED_BY_CORE:
            torch.testing.assert_close(by_core, result, rtol=0.1, atol=0.1 * float(result.std()))
        else:
            assert torch.equal(by_core, result)


def test_fp8_embedding_decodes_rows_only(tmp_path, monkeypatch):
    from apple_silicon_video.quantization import tensor

    path, _, _ = write_umt5(tmp_path, "e4m3fn")
    ours = comfy_loader.load_text_encoder(path, "wan", own_loader=True)
    embedding = ours.cond_stage_model.umt5xxl.transformer.shared
    assert isinstance(embedding.weight, QuantizedWeight)
    whole = tensor.dequantize_scaled
    decoded = []

    def watch(raw, *args):
        decoded.append(raw.numel())
        return whole(raw, *args)

    monkeypatch.setattr(tensor, "dequantize_scaled", watch)
    encode(ours)
    assert decoded and max(decoded) < embedding.weight.numel()


# ---- memory

MIB = 1 << 20


def peak_above_start(work):
    """(result of ``work``, the most resident bytes during it above what was resident before)."""
    gc.collect()
    process, done, levels = psutil.Process(), threading.Event(), []
    before = process.memory_info().rss

    def watch():
        while not done.wait(0.005):
            levels.append(process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = work()
    finally:
        done.set()
        watcher.join()
    return result, max([*levels, process.memory_info().rss]) - before


@pytest.mark.parametrize("matrices", ["F8_E4M3", "F8_E5M2", "F16", "BF16"])
def test_14b_stands_with_less_than_its_largest_tensor_and_200_mb(matrices, tmp_path):
    write_wan(tmp_path, "marker")
    comfy_loader.load_diffusion_model(tmp_path / "marker.safetensors", own_loader=True)
    path = write_full_size_scaled(tmp_path / "14b.safetensors", "wan2.1-t2v-14b", matrices)
    largest = max(info.nbytes for info in SafetensorsFile(path).tensors.values())
    patcher, grown = peak_above_start(lambda: comfy_loader.load_diffusion_model(path, own_loader=True))
    assert patcher.model_size() > 14e9
    assert grown < largest + 200e6, f"{grown / 1e6:.0f} MB"


def test_umt5_xxl_stands_with_less_than_its_largest_tensor_and_200_mb(tmp_path):
    path, _, _ = write_umt5(tmp_path, "marker")
    comfy_loader.load_text_encoder(path, own_loader=True)
    path = write_full_size_scaled(tmp_path / "umt5.safetensors", "umt5-xxl")
    largest = max(info.nbytes for info in SafetensorsFile(path).tensors.values())
    clip, grown = peak_above_start(lambda: comfy_loader.load_text_encoder(path, own_loader=True))
    assert clip.cond_stage_model.umt5xxl.num_layers == 24
    assert clip.patcher.model_size() > 6e9
    assert grown < min(largest, 100e6) + 200e6, f"{grown / 1e6:.0f} MB"


# ---- files that cannot be used


def refusal(path, load=comfy_loader.load_diffusion_model):
    with pytest.raises(comfy_loader.ModelFileError) as caught:
        load(path, own_loader=True)
    message = str(caught.value)
    assert path.name in message and message.endswith(".") and "\n" not in message
    return message


def test_formats_without_a_decoder_are_left_to_core_off_the_mac(tmp_path):
    path, _ = write_wan(tmp_path, "int8-row")
    tensors = comfy.utils.load_torch_file(str(path))
    text = b'{"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": 256}'
    tensors["blocks.0.ffn.0.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
    write_safetensors(path, tensors)
    assert "rotation" in refusal(path)
    if "int8_tensorwise" in comfy.quant_ops.QUANT_ALGOS:
        assert not isinstance(comfy_loader.load_diffusion_model(path), QuantizedModelPatcher)


def test_refusals(tmp_path):
    path, _ = write_wan(tmp_path, "marker")
    tensors = comfy.utils.load_torch_file(str(path))
    broken = tmp_path / "broken.safetensors"
    name = "blocks.0.ffn.0.scale_weight"

    write_safetensors(broken, {**tensors, name: torch.ones(3, 5)})
    assert "scales of shape (3, 5) do not fit" in refusal(broken)

    without = {key: value for key, value in tensors.items() if not key.startswith("blocks.1.ffn.2.")}
    write_safetensors(broken, without)
    assert "lacks 2 of the weights" in refusal(broken)

    for text, problem in ((b'{"format": "nvfp4"}', "quantised to nvfp4"), (b"no json", "cannot be read")):
        extra = torch.tensor(list(text), dtype=torch.uint8)
        write_safetensors(broken, {**tensors, "blocks.0.ffn.0.comfy_quant": extra})
        assert problem in refusal(broken)

    path, _, _ = write_umt5(tmp_path, "marker")
    assert "Load Text Encoder" in refusal(path)
    path, _ = write_wan(tmp_path, "marker")
    assert "Load Diffusion Model" in refusal(
        path, lambda p, own_loader: comfy_loader.load_text_encoder(p, "wan", own_loader=own_loader)
    )
