"""Tables of tensors for published file names, from the models' shapes and the recipes: to plan without the files.

Names are those of workflow_files.py. What quantised files hold follows quantization/recipes.py; the text encoder's and
the VAEs' shapes and the LoRAs' ranks are those of the published ones.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod

from _pack import load_pack

load_pack()

from apple_silicon_video.memory.plan_models import Entry, PlanError, WeightTable  # noqa: E402
from apple_silicon_video.quantization.formats import FORMATS, packed_size  # noqa: E402
from small_models import UMT5_XXL, encoder_tensors, encoder_types, vae_tensors, wan_shape, wan_tensors, wan_types  # noqa: E402

DENSE_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
LORA_RANK = 64
VAE_WIDTH = 96
VAE_22_BYTES = 1_409_400_000

VARIANTS = {
    r"wan2\.1-t2v-1\.3b": "wan2.1-t2v-1.3b",
    r"wan2\.1-t2v-14b": "wan2.1-t2v-14b",
    r"wan2\.1-i2v-14b": "wan2.1-i2v-14b",
    r"wan2\.1-vace-14b": "wan2.1-vace-14b",
    r"wan2\.2-ti2v-5b": "wan2.2-ti2v-5b",
    r"wan2\.2-t2v-a14b": "wan2.2-t2v-a14b-high",
    r"wan2\.2-i2v-a14b": "wan2.2-i2v-a14b-high",
}
"""Patterns of file names -> variants of small_models; the last part of a name is its recipe."""


def published_table(name: str) -> WeightTable:
    """The table of the file published under ``name``. Raises PlanError for a name of no pattern."""
    lower = name.lower()
    recipe = name.removesuffix(".gguf").rsplit("-", 1)[-1]
    if "_lora" in lower or "4steps" in lower:
        return lora_table(name, "wan2.2-i2v-a14b-high" if "i2v" in lower else "wan2.2-t2v-a14b-high")
    if "vae" in lower:
        return vae_table(name)
    if lower.startswith("umt5"):
        shapes = encoder_tensors(UMT5_XXL)
        return _table(name, shapes, encoder_types(shapes, recipe))
    for pattern, variant in VARIANTS.items():
        if re.match(pattern, lower):
            return wan_table(name, variant, recipe)
    raise PlanError(f"{name} is no published file whose tensors are known: plan with the file itself.")


def wan_table(name: str, variant: str, recipe: str) -> WeightTable:
    """A Wan diffusion model; ``variant``: of small_models, ``recipe``: of quantization/recipes.py."""
    shapes = wan_tensors(wan_shape(variant, full_size=True))
    return _table(name, shapes, wan_types(shapes, recipe))


def lora_table(name: str, variant: str, rank: int = LORA_RANK) -> WeightTable:
    """A LoRA in float32, as the 4-step ones are, on every matrix of every block."""
    entries = {}
    for layer, shape in wan_tensors(wan_shape(variant, full_size=True)).items():
        if layer.startswith("blocks.") and len(shape) == 2:
            stem = f"diffusion_model.{layer.removesuffix('.weight')}"
            entries[f"{stem}.lora_down.weight"] = Entry("F32", (rank, shape[1]), 4 * rank * shape[1])
            entries[f"{stem}.lora_up.weight"] = Entry("F32", (shape[0], rank), 4 * rank * shape[0])
    return WeightTable(name, entries)


def vae_table(name: str) -> WeightTable:
    """A Wan VAE in half precision; of Wan 2.2's only the sum is known, and its latent channels."""
    if "2.2" in name:
        convolution = Entry("F16", (48, 48, 1, 1, 1), 48 * 48 * 2)
        rest = VAE_22_BYTES - convolution.nbytes
        return WeightTable(
            name, {"conv2.weight": convolution, "decoder.conv1.weight": Entry("F16", (rest // 2,), rest)}
        )
    shapes = vae_tensors(VAE_WIDTH)
    return _table(name, shapes, dict.fromkeys(shapes, "F16"))


def _table(name: str, shapes: Mapping[str, tuple[int, ...]], types: Mapping[str, str]) -> WeightTable:
    return WeightTable(
        name, {key: Entry(types[key], shape, _nbytes(types[key], shape)) for key, shape in shapes.items()}
    )


def _nbytes(type_name: str, shape: tuple[int, ...]) -> int:
    if type_name in DENSE_BYTES:
        return prod(shape) * DENSE_BYTES[type_name]
    return packed_size(FORMATS[type_name], shape)
