"""Models other than Wan through the same loader: nothing in it knows Wan's names.

The files are written from the tensor names and shapes of ComfyUI's own model classes, at full width and few layers.
Those too wide to compute here share one run of zero bytes for all their weights; the others are compared with core.
"""

import comfy.ldm.flux.model
import comfy.ldm.hunyuan_video.model
import comfy.ldm.lightricks.model
import comfy.ldm.qwen_image.model
import comfy.ops
import comfy.sd
import pytest
import torch
from apple_silicon_video.quantization import comfy_loader
from apple_silicon_video.quantization.formats import FORMATS, dequantize, packed_size, random_blocks
from apple_silicon_video.quantization.gguf_writer import GGUFWriter
from apple_silicon_video.quantization.tensor import QuantizedWeight
from safetensors.torch import save_file

BLOCK = FORMATS["Q5_K"]

FLUX = {
    "in_channels": 16, "out_channels": 16, "vec_in_dim": 768, "context_in_dim": 4096, "hidden_size": 3072,
    "mlp_ratio": 4.0, "num_heads": 24, "depth": 1, "depth_single_blocks": 1, "axes_dim": [16, 56, 56],
    "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": True, "txt_ids_dims": [],
}  # fmt: skip
HUNYUAN = {
    "in_channels": 16, "out_channels": 16, "vec_in_dim": 768, "context_in_dim": 4096, "hidden_size": 3072,
    "mlp_ratio": 4.0, "num_heads": 24, "depth": 1, "depth_single_blocks": 1, "axes_dim": [16, 56, 56],
    "theta": 256, "patch_size": [1, 2, 2], "qkv_bias": True, "guidance_embed": True, "byt5": False,
    "meanflow": False, "use_cond_type_embedding": False, "vision_in_dim": None, "meanflow_sum": False,
}  # fmt: skip
QWEN = {"in_channels": 64, "num_layers": 2, "num_attention_heads": 24, "attention_head_dim": 128}
LTXV = {
    "in_channels": 128, "cross_attention_dim": 2048, "attention_head_dim": 64, "num_attention_heads": 32,
    "caption_channels": 4096, "num_layers": 1,
}  # fmt: skip


def flux():
    return comfy.ldm.flux.model.Flux(**FLUX, operations=comfy.ops.disable_weight_init, device="meta")


def hunyuan():
    return comfy.ldm.hunyuan_video.model.HunyuanVideo(
        **HUNYUAN, operations=comfy.ops.disable_weight_init, device="meta"
    )


def qwen():
    model = comfy.ldm.qwen_image.model.QwenImageTransformer2DModel
    return model(**QWEN, operations=comfy.ops.disable_weight_init, device="meta")


def ltxv():
    return comfy.ldm.lightricks.model.LTXVModel(**LTXV, operations=comfy.ops.disable_weight_init, device="meta")


def shapes(model):
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def quantisable(shape):
    return len(shape) == 2 and shape[-1] % BLOCK.block_size == 0


@pytest.mark.parametrize(
    ("architecture", "make", "config"),
    [("flux", flux, "Flux"), ("hyvid", hunyuan, "HunyuanVideo"), ("qwen_image", qwen, "QwenImage")],
)
def test_wide_models_are_recognised_and_stay_quantised(tmp_path, architecture, make, config):
    path = tmp_path / f"{architecture}.gguf"
    writer = GGUFWriter(path)
    writer.metadata("general.architecture", architecture)
    found = shapes(make())
    for name, shape in found.items():
        writer.tensor(name, shape, "Q5_K" if quantisable(shape) else "F32", sparse=True)
    writer.write()
    patcher = comfy_loader.load_diffusion_model(path)
    assert type(patcher.model.model_config).__name__ == config
    loaded = patcher.model.diffusion_model.state_dict()
    quantised = [name for name, value in loaded.items() if isinstance(value, QuantizedWeight)]
    assert len(quantised) >= 10
    assert sum(loaded[name].nbytes for name in quantised) < sum(loaded[name].numel() for name in quantised)


def test_ltxv_equals_core(tmp_path):
    gguf, dense = tmp_path / "ltxv.gguf", tmp_path / "ltxv.safetensors"
    writer = GGUFWriter(gguf)
    writer.metadata("general.architecture", "ltxv")
    reference = {}
    generator = torch.Generator().manual_seed(0)
    for index, (name, shape) in enumerate(shapes(ltxv()).items()):
        if quantisable(shape):
            count = packed_size(BLOCK, shape) // BLOCK.block_bytes
            blocks = random_blocks(BLOCK, count, seed=index, std=0.3 * shape[-1] ** -0.5)
            reference[name] = dequantize(blocks.reshape(-1), BLOCK, shape)
            writer.tensor(name, shape, "Q5_K", blocks.reshape(-1))
        else:
            reference[name] = torch.randn(shape, generator=generator) * 0.05 + ("norm" in name)
            writer.tensor(name, shape, "F32", reference[name])
    writer.write()
    save_file(reference, dense)
    results = []
    for patcher in (comfy_loader.load_diffusion_model(gguf), comfy.sd.load_diffusion_model(str(dense))):
        assert type(patcher.model.model_config).__name__ == "LTXV"
        comfy.model_management.load_models_gpu([patcher], force_full_load=True)
        draw = torch.Generator().manual_seed(1)
        with torch.inference_mode():
            latent = torch.randn(1, 128, 2, 4, 4, generator=draw)
            context = torch.randn(1, 8, 4096, generator=draw)
            mask = torch.ones(1, 8)
            results.append(patcher.model.diffusion_model(latent, torch.tensor([500.0]), context, mask))
    assert results[1].std() > 1e-3
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)
