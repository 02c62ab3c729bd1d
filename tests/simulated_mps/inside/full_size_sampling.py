"""Sampling at full size in dry mode: sparse files, the pack's loader, core's KSamplerAdvanced.

All blocks' weights and LoRAs go to the device; one block runs, since blocks run one after the other. Metal kernels
write nothing, so that a weight is decoded in the memory that it takes on a Mac.
"""

import sys
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import core_tree
import simulated_mps as sim
import torch

sys.path.insert(0, core_tree.folder())

import comfy.model_management as management
import comfy.sd
from apple_silicon_video.memory import comfy_activations
from apple_silicon_video.mps_patches import attention
from apple_silicon_video.quantization import comfy_loader, metal_kernels, metal_matmul, metal_scaled
from small_models import wan_weights, write_full_size_scaled, write_full_size_wan, write_wan_gguf

import nodes

MPS = torch.device("mps")
DRY_ABOVE = 1 << 16
STEPS = 4
KERNELS = (metal_kernels, metal_matmul, metal_scaled)
SPEED_LORA_RANK = 64  # of the 4-step LoRAs that the workflows name
_checked: set[str] = set()


def load_small(folder, variant, recipe="Q5_K_M"):
    """A small MODEL with numbers."""
    path = folder / f"{variant}-small.gguf"
    write_wan_gguf(path, wan_weights(variant, recipe), recipe)
    return comfy_loader.load_diffusion_model(path)


def write_full(folder, variant, recipe):
    """A file of the published size that is a hole: GGUF, or safetensors for fp8 matrices."""
    if recipe.startswith("F8"):
        return write_full_size_scaled(folder / f"{variant}-{recipe}.safetensors", variant, recipe)
    return write_full_size_wan(folder / f"{variant}-{recipe}.gguf", variant, recipe)


def load_full(folder, variant, recipe, lora_rank=0):
    """A MODEL of the published size that runs one of its blocks; lora_rank 0 is no LoRA."""
    patcher = run_one_block(comfy_loader.load_diffusion_model(write_full(folder, variant, recipe)))
    return _with_lora(patcher, lora_rank) if lora_rank else patcher


def run_one_block(patcher):
    """Let the MODEL run the first of its blocks only; loading still sees all of them. Returns it."""
    model = patcher.model.diffusion_model
    whole = model._forward

    def first_block(*args, **kwargs):
        blocks = model.blocks
        model.blocks = blocks[:1]
        try:
            return whole(*args, **kwargs)
        finally:
            model.blocks = blocks

    model._forward = first_block
    return patcher


def _with_lora(patcher, rank):
    """A bfloat16 LoRA on every matrix of every block."""

    def factor(*shape):
        return torch.zeros(1, dtype=torch.bfloat16).expand(shape)

    factors = {}
    for name, module in patcher.model.diffusion_model.named_modules():
        if name.startswith("blocks.") and hasattr(module, "in_features"):
            factors[f"diffusion_model.{name}.lora_down.weight"] = factor(rank, module.in_features)
            factors[f"diffusion_model.{name}.lora_up.weight"] = factor(module.out_features, rank)
    return comfy.sd.load_lora_for_models(patcher, None, factors, 1.0, 0.0)[0]


def blank(variant, width, height, frames):
    """An empty LATENT."""
    shrink, channels = (16, 48) if "5b" in variant else (8, 16)
    return {"samples": torch.zeros(1, channels, (frames - 1) // 4 + 1, height // shrink, width // shrink)}


def sample(patcher, variant, latent, first=True, cfg=1.0, numbers=False):
    """The first or the second half of four steps, as the workflows with two experts have them."""
    conditions = [], []
    for condition in conditions:
        text = torch.randn(1, 512, 4096) if numbers else torch.zeros(1, 512, 4096)
        shape = latent["samples"].shape
        picture = {"concat_latent_image": torch.zeros(shape), "concat_mask": torch.ones(1, 1, *shape[2:])}
        condition.append([text, picture if "i2v" in variant else {}])
    noise, leftover = ("enable", "enable") if first else ("disable", "disable")
    begin, end = (0, STEPS // 2) if first else (STEPS // 2, 10000)
    settings = [patcher, noise, 1, STEPS, cfg, "euler", "simple", *conditions, latent, begin, end, leftover]
    return nodes.KSamplerAdvanced().sample(*settings)[0]


def check_blocks(folder, variant):
    """Compare this kind of block with core's, with numbers, so that dry mode runs the pack's; once for each variant."""
    if variant in _checked:
        return
    _checked.add(variant)
    patcher = load_small(folder, variant, "Q8_0")
    sample(patcher, variant, blank(variant, 128, 128, 9), numbers=True)
    leave_nothing()
    assert comfy_activations._verified and all(comfy_activations._verified.values())


@contextmanager
def dry_device(free=None):
    """Dry mode with kernels that write nothing; free() is what core takes for free then, None its own count."""
    attention.attention_version(MPS), attention.half_softmax_is_exact(MPS)
    with ExitStack() as patches:
        for module in KERNELS:
            patches.enter_context(patch.object(module, "checked", _kernel))
        if free is not None:
            patches.enter_context(patch.object(management, "get_free_memory", free_memory(free)))
        sim.dry(DRY_ABOVE)
        try:
            yield
        finally:
            leave_nothing()
            sim.dry(0)


def _kernel(*args, **kwargs):
    return lambda *inputs, **options: None


def leave_nothing():
    """No model on the device, none in core's list."""
    management.unload_all_models()
    management.current_loaded_models.clear()


def free_memory(size):
    """What core's get_free_memory says when ``size()`` bytes are free."""

    def free(device=None, torch_free_too=False):
        return (size(), size()) if torch_free_too else size()

    return free
