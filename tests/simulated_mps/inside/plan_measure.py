"""What a sampling stage really needs: the pack's loader and core's sampler at full size in dry mode.

Weights of all blocks go to the device as they are in a file of the published types; one block runs, since blocks run
one after the other. ../plan_table.py makes tests/data/plan_table.json of it, test_plan.py measures some rows again.
"""

import gc
import sys
from pathlib import Path

import core_tree
import simulated_mps as sim
import torch

sys.path.insert(0, core_tree.folder())

import comfy.model_management
import comfy.sample
from apple_silicon_video.memory import comfy_activations
from apple_silicon_video.mps_patches import attention
from apple_silicon_video.quantization import comfy_loader, metal_kernels, metal_matmul, metal_scaled
from simulated_mps.plan_table import Combination
from small_models import wan_weights, write_full_size_scaled, write_full_size_wan, write_wan_gguf

MPS = torch.device("mps")
GIB = 1 << 30
RAM_GB = 512  # the device refuses nothing
DRY_ABOVE = 1 << 16


def measure(row: Combination, folder: Path) -> dict[str, int]:
    """Bytes: ``weights`` after loading, ``peak`` while sampling two steps with euler, weights included."""
    _check_blocks(row.variant, folder)
    with DryDevice(row.cfg):
        path = write_model(folder, row.variant, row.recipe)
        patcher = comfy_loader.load_diffusion_model(path)
        model = patcher.model.diffusion_model
        if row.lora_rank:
            patcher = _with_lora(patcher, row.lora_rank)
        gc.collect()
        start = sim.stats().live
        comfy.model_management.load_models_gpu([patcher], force_full_load=True)
        weights = sim.stats().live - start
        _run_one_block(model)
        sim.reset()
        _sample(patcher, row)
        peak = sim.stats().peak - start
        comfy.model_management.unload_all_models()
        comfy.model_management.current_loaded_models.clear()
        del patcher, model
        gc.collect()
        return {"weights": weights, "peak": peak}


def write_model(folder: Path, variant: str, recipe: str) -> Path:
    """A full-size file that is a hole: GGUF, or safetensors for fp8 matrices."""
    if recipe.startswith("F8"):
        return write_full_size_scaled(folder / "model.safetensors", variant, recipe)
    return write_full_size_wan(folder / "model.gguf", variant, recipe)


def _run_one_block(model: torch.nn.Module) -> None:
    """Let the model run the first of its blocks only; loading still sees all of them."""
    forward = model._forward

    def shortened(*args, **kwargs):
        blocks = model.blocks
        model.blocks = blocks[:1]
        try:
            return forward(*args, **kwargs)
        finally:
            model.blocks = blocks

    model._forward = shortened


class DryDevice:
    """Dry mode; Metal kernels that write nothing; free memory that makes core batch cfg or not."""

    def __init__(self, cfg: str = "none") -> None:
        self.free = 1 << 50 if cfg == "batched" else 1 << 32

    def __enter__(self) -> None:
        attention.attention_version(MPS), attention.half_softmax_is_exact(MPS)
        self.saved = (comfy.model_management.get_free_memory, [m.checked for m in MODULES])
        comfy.model_management.get_free_memory = self._free_memory
        for module in MODULES:
            module.checked = _no_kernel_runs
        sim.mac(RAM_GB)
        sim.dry(DRY_ABOVE)

    def __exit__(self, *error) -> None:
        comfy.model_management.get_free_memory, checked = self.saved
        for module, original in zip(MODULES, checked, strict=True):
            module.checked = original
        sim.dry(0)

    def _free_memory(self, device=None, torch_free_too=False):
        return (self.free, self.free) if torch_free_too else self.free


_checked: set[str] = set()
MODULES = (metal_kernels, metal_matmul, metal_scaled)


def _no_kernel_runs(*args, **kwargs):
    return lambda *arguments, **options: None


def _check_blocks(variant: str, folder: Path) -> None:
    """Each kind of block is compared with core's before dry mode, with numbers, so that it is used in it."""
    if variant in _checked:
        return
    _checked.add(variant)
    patcher = comfy_loader.load_diffusion_model(
        write_wan_gguf(folder / "small.gguf", wan_weights(variant, "Q8_0"), "Q8_0")
    )
    _sample(patcher, Combination("", variant, "", 128, 128, 9), numbers=True)
    comfy.model_management.unload_all_models()
    comfy.model_management.current_loaded_models.clear()
    assert comfy_activations._verified and all(comfy_activations._verified.values())


def _with_lora(patcher, rank: int):
    """A LoRA of this rank on every matrix of every block, as the published ones are."""
    import comfy.sd

    tensors = {}
    for name, module in patcher.model.diffusion_model.named_modules():
        if name.startswith("blocks.") and hasattr(module, "in_features"):
            tensors[f"diffusion_model.{name}.lora_down.weight"] = torch.zeros(1, dtype=torch.bfloat16).expand(
                rank, module.in_features
            )
            tensors[f"diffusion_model.{name}.lora_up.weight"] = torch.zeros(1, dtype=torch.bfloat16).expand(
                module.out_features, rank
            )
    return comfy.sd.load_lora_for_models(patcher, None, tensors, 1.0, 0.0)[0]


def _sample(patcher, row: Combination, numbers: bool = False) -> torch.Tensor:
    shrink, channels = (16, 48) if "5b" in row.variant else (8, 16)
    shape = (1, channels, (row.frames - 1) // 4 + 1, row.height // shrink, row.width // shrink)
    text = torch.randn(1, 512, 4096) if numbers else torch.zeros(1, 512, 4096)
    extra = {}
    if "i2v" in row.variant:
        extra["concat_latent_image"] = torch.zeros(shape)
        extra["concat_mask"] = torch.zeros(1, 1, *shape[2:])
    positive, negative = [[text, dict(extra)]], [[text, dict(extra)]]
    cfg = 1.0 if row.cfg == "none" else 5.0
    latent = torch.zeros(shape)
    noise = torch.randn(shape) if numbers else torch.zeros(shape)
    return comfy.sample.sample(
        patcher, noise, 2, cfg, "euler", "simple", positive, negative, latent, disable_pbar=True, seed=0
    )
