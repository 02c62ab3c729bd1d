"""Wan diffusion models as GGUF files in every layout found in the wild, and as dense safetensors of equal weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from apple_silicon_video.quantization.gguf_writer import GGUFWriter

from .recipes import FILE_TYPES, sd_cpp_types, wan_types
from .wan_shapes import VARIANTS, wan_shape, wan_tensors
from .weights import Weight, decoded_state_dict, random_weight, wan_statistics, write_safetensors

QUANTIZATION_VERSION = 2
_FLAT_ROW = 256  # ComfyUI-GGUF's converter flattens to rows of one super-block


@dataclass(frozen=True)
class Layout:
    """How a tool writes its GGUF file.

    ``five_dims`` says what becomes of Conv3d weights, for which ggml has one dimension too few: kept as they are
    ("stored"), flattened to rows of 256 with ``comfy.gguf.orig_shape.<name>`` beside ("orig_shape"), or with output and
    input channels merged into one dimension ("merged", as stable-diffusion.cpp does for its own use).
    """

    architecture: str | None = "wan"
    prefix: str = ""
    version: int = 3
    five_dims: str = "stored"
    tool: str = "ComfyUI-GGUF"


LAYOUTS = {
    "plain": Layout(),
    "plain-v2": Layout(version=2),
    "orig-shape": Layout(five_dims="orig_shape"),
    "sd-cpp": Layout(architecture=None, prefix="model.diffusion_model.", tool="stable-diffusion.cpp"),
    "sd-cpp-merged": Layout(
        architecture=None, prefix="model.diffusion_model.", five_dims="merged", tool="stable-diffusion.cpp"
    ),
}
_TYPES = {"ComfyUI-GGUF": wan_types, "stable-diffusion.cpp": sd_cpp_types}


def wan_weights(
    variant: str,
    recipe: str,
    tool: str = "ComfyUI-GGUF",
    seed: int | None = None,
    overrides: Mapping[str, str] | None = None,
) -> list[Weight]:
    """Weights of a small Wan.

    Args:
        variant: a name of ``VARIANTS``.
        recipe: a mix ("Q3_K_M", "Q5_K_M") or one type for all that is quantised ("Q3_K", "Q8_0", "F16").
        tool: whose choice of types: "ComfyUI-GGUF" or "stable-diffusion.cpp" (one type only, no mixes).
        seed: other weights of the same variant; None is the variant's own seed.
        overrides: types of single tensors by name, whatever the recipe says.
    """
    shapes = wan_tensors(wan_shape(variant))
    types = {**_TYPES[tool](shapes, recipe), **(overrides or {})}
    seed = VARIANTS[variant].seed if seed is None else seed
    return [
        random_weight(name, shape, types[name], wan_statistics(name, shape), seed) for name, shape in shapes.items()
    ]


def write_wan_gguf(path: Path, weights: Sequence[Weight], recipe: str, layout: Layout = LAYOUTS["plain"]) -> Path:
    """Write a small Wan as GGUF in the given layout; ``recipe`` only goes into ``general.file_type``."""
    writer = GGUFWriter(path, version=layout.version)
    if layout.architecture is not None:
        writer.metadata("general.architecture", layout.architecture)
        writer.metadata("general.quantization_version", QUANTIZATION_VERSION, "UINT32")
        if recipe in FILE_TYPES:
            writer.metadata("general.file_type", FILE_TYPES[recipe], "UINT32")
    for weight in weights:
        if len(weight.shape) == 5 and layout.five_dims == "orig_shape":
            writer.metadata(f"comfy.gguf.orig_shape.{weight.name}", list(weight.shape), "INT32[]")
    for weight in weights:
        shape = stored_shape(weight.shape, layout.five_dims)
        writer.tensor(layout.prefix + weight.name, shape, weight.type_name, weight.data)
    writer.write()
    return path


def stored_shape(shape: tuple[int, ...], five_dims: str) -> tuple[int, ...]:
    """Shape under which a tensor stands in the file's table (torch order)."""
    if len(shape) != 5 or five_dims == "stored":
        return shape
    if five_dims == "merged":
        return (shape[0] * shape[1], *shape[2:])
    return (prod(shape) // _FLAT_ROW, _FLAT_ROW)


def write_wan_reference(path: Path, weights: Sequence[Weight], dtype: torch.dtype = torch.float32) -> Path:
    """Write the same weights decoded to ``dtype`` as safetensors for core's own loader."""
    return write_safetensors(path, decoded_state_dict(weights, dtype))
