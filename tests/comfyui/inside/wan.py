"""What the tests of this folder share: small Wan models loaded by the pack and by core, and a forward pass."""

import comfy.lora
import comfy.model_management
import comfy.sd
import comfy.utils
import torch
from apple_silicon_video.quantization import comfy_loader
from small_models import LAYOUTS, VARIANTS, wan_shape, wan_weights, write_wan_gguf, write_wan_reference


def pair(folder, variant="wan2.1-t2v-1.3b", recipe="Q5_K_M", layout="plain", seed=None):
    """(pack's MODEL from GGUF, core's MODEL from the same weights decoded to float32 safetensors)."""
    chosen = LAYOUTS[layout]
    weights = wan_weights(variant, recipe, chosen.tool, seed)
    gguf, dense = folder / f"{variant}-{seed}.gguf", folder / f"{variant}-{seed}.safetensors"
    write_wan_gguf(gguf, weights, recipe, chosen)
    write_wan_reference(dense, weights)
    return comfy_loader.load_diffusion_model(gguf), comfy.sd.load_diffusion_model(str(dense))


def forward(patcher, variant="wan2.1-t2v-1.3b"):
    """One forward pass of a loaded MODEL on seeded inputs; the model is put on its device first."""
    shape = wan_shape(variant)
    comfy.model_management.load_models_gpu([patcher], force_full_load=True)
    generator = torch.Generator().manual_seed(7)

    def noise(*size):
        return torch.randn(*size, generator=generator)

    latent = noise(1, shape.in_dim, 2, 8, 8)
    extra = {}
    if shape.image_embedding:
        tokens = 514 if "flf2v" in variant else 257
        extra["clip_fea"] = noise(1, tokens, 1280)
    if shape.vace_layers:
        extra["vace_context"] = noise(1, 1, 96, 2, 8, 8)
        extra["vace_strength"] = [1.0]
    model = patcher.model.diffusion_model
    with torch.inference_mode():
        return model(latent, torch.tensor([500.0]), noise(1, 20, 4096), **extra)


def class_name(variant):
    return VARIANTS[variant].comfy_class


def apply_lora(patcher, tensors, strength=1.0):
    """What LoraLoaderModelOnly does: a clone of the MODEL with the LoRA's patches."""
    patched, _ = comfy.sd.load_lora_for_models(patcher, None, tensors, strength, 0)
    return patched
