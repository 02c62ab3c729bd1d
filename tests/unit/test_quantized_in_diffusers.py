"""diffusers loads the GGUF files that the quantiser makes, and computes what their decoded weights give."""

import json

import pytest
import torch
from apple_silicon_video.quantization.gguf import GGUFFile
from apple_silicon_video.quantization.quantizer_files import quantize_file
from apple_silicon_video.quantization.quantizer_sources import native_name
from small_models import SMALL, wan_shape, wan_tensors, wan_weights, write_wan_reference

CONFIG = {
    "_class_name": "WanTransformer3DModel",
    "num_layers": SMALL.layers,
    "num_attention_heads": SMALL.heads,
    "attention_head_dim": 128,
    "ffn_dim": SMALL.ffn_dim,
    "in_channels": SMALL.in_dim,
    "out_channels": SMALL.out_dim,
    "text_dim": 4096,
    "freq_dim": 256,
    "patch_size": [1, 2, 2],
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
}


@pytest.mark.parametrize("variant", ["wan2.1-t2v-14b", "wan2.1-i2v-14b", "wan2.1-flf2v-14b"])
def test_diffusers_names_become_native_ones(variant):
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    native = {name: torch.tensor(index) for index, name in enumerate(wan_tensors(wan_shape(variant)))}
    theirs = convert_wan_transformer_to_diffusers(dict(native))
    assert {native_name(name): index.item() for name, index in theirs.items()} == {
        name: index.item() for name, index in native.items()
    }


@pytest.mark.parametrize("recipe", ["Q5_K_M", "Q3_K_M", "Q8_0", "Q4_0"])
def test_from_single_file(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from diffusers import GGUFQuantizationConfig, WanTransformer3DModel
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    dense = write_wan_reference(tmp_path / "wan.safetensors", wan_weights("wan2.1-t2v-1.3b", "F32"))
    path = quantize_file(dense, tmp_path / "wan.gguf", recipe).path
    decoded = GGUFFile(quantize_file(path, tmp_path / "decoded.gguf", "F32").path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))

    loaded = WanTransformer3DModel.from_single_file(
        str(path),
        config=str(tmp_path),
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
        torch_dtype=torch.float32,
    )
    assert type(loaded.blocks[0].attn1.to_q).__name__ == "GGUFLinear"
    reference = WanTransformer3DModel.from_config(CONFIG)
    state = {name: decoded.tensor(name).clone() for name in decoded.tensors}
    reference.load_state_dict(convert_wan_transformer_to_diffusers(state))

    generator = torch.Generator().manual_seed(7)
    latent = torch.randn(1, 16, 2, 8, 8, generator=generator)
    text = torch.randn(1, 20, 4096, generator=generator)
    with torch.inference_mode():
        result, expected = (
            model(latent, torch.tensor([500.0]), text, return_dict=False)[0] for model in (loaded, reference)
        )
    assert expected.std() > 0.1
    assert (result - expected).norm() < 2e-3 * expected.norm()
