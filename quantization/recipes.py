"""Which tensor of a GGUF file gets which type: the mixes of published files, as one table for quantiser and tests.

Facts on Wan files: ComfyUI-GGUF's converter (one-dimensional tensors, tensors of up to 1,024 elements, ``modulation``
and five-dimensional tensors stay F32, the rest of what is not quantised F16) and its mixes for image models, which
give more bits to ``v`` and ``ffn.2``. Facts on text encoders: llama.cpp's mixes, with the token embedding, being the
last matrix, at Q6_K.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

from .formats import FORMATS

FLOAT_TYPES = ("F32", "F16", "BF16")
_SMALL_TENSOR = 1024

_WAN_UNQUANTIZED = (
    "modulation",
    "patch_embedding.",
    "text_embedding.",
    "time_projection.",
    "time_embedding.",
    "img_emb.",
    "head.",
)

Types = dict[str, str]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class WanMix:
    """A mix for Wan: the base type, that of ``v`` (the first ones may have another) and that of ``ffn.2``."""

    base: str
    value: str
    down: str
    first_values: tuple[int, str] = (0, "")


WAN_MIXES = {
    "Q2_K": WanMix("Q2_K", "Q3_K", "Q2_K"),
    "Q3_K_S": WanMix("Q3_K", "Q3_K", "Q3_K"),
    "Q3_K_M": WanMix("Q3_K", "Q4_K", "Q4_K", first_values=(2, "Q5_K")),
    "Q3_K_L": WanMix("Q3_K", "Q5_K", "Q5_K"),
    "Q4_0": WanMix("Q4_0", "Q4_0", "Q4_1"),
    "Q4_K_S": WanMix("Q4_K", "Q4_K", "Q5_K", first_values=(4, "Q5_K")),
    "Q4_K_M": WanMix("Q4_K", "Q6_K", "Q6_K"),
    "Q5_0": WanMix("Q5_0", "Q5_0", "Q5_1"),
    "Q5_K_S": WanMix("Q5_K", "Q5_K", "Q5_K"),
    "Q5_K_M": WanMix("Q5_K", "Q6_K", "Q6_K"),
}


@dataclass(frozen=True)
class EncoderMix:
    """A mix of llama.cpp's: base type and, by (layer, number of layers), those of ``attn_v`` and ``ffn_down``."""

    base: str
    value: Callable[[int, int], str]
    down: Callable[[int, int], str]


def _more_bits(layer: int, layers: int) -> bool:
    """llama.cpp's choice of layers that get more bits: the first and last eighth and every third between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _always(type_name: str) -> Callable[[int, int], str]:
    return lambda layer, layers: type_name


def _first(count: int, first: str, rest: str) -> Callable[[int, int], str]:
    return lambda layer, layers: first if layer < count else rest


def _first_part(divisor: int, first: str, rest: str) -> Callable[[int, int], str]:
    return lambda layer, layers: first if layer < layers // divisor else rest


def _some(more: str, rest: str) -> Callable[[int, int], str]:
    return lambda layer, layers: more if _more_bits(layer, layers) else rest


def _one(type_name: str) -> EncoderMix:
    return EncoderMix(type_name, _always(type_name), _always(type_name))


ENCODER_MIXES = {
    "Q2_K": EncoderMix("Q2_K", _always("Q3_K"), _always("Q3_K")),
    "Q3_K_S": _one("Q3_K"),
    "Q3_K_M": EncoderMix("Q3_K", _first(2, "Q5_K", "Q4_K"), _first_part(16, "Q5_K", "Q4_K")),
    "Q3_K_L": EncoderMix("Q3_K", _always("Q5_K"), _always("Q5_K")),
    "Q4_0": _one("Q4_0"),
    "Q4_1": _one("Q4_1"),
    "Q4_K_S": EncoderMix("Q4_K", _first(4, "Q5_K", "Q4_K"), _first_part(8, "Q5_K", "Q4_K")),
    "Q4_K_M": EncoderMix("Q4_K", _some("Q6_K", "Q4_K"), _some("Q6_K", "Q4_K")),
    "Q5_0": _one("Q5_0"),
    "Q5_1": _one("Q5_1"),
    "Q5_K_S": _one("Q5_K"),
    "Q5_K_M": EncoderMix("Q5_K", _some("Q6_K", "Q5_K"), _some("Q6_K", "Q5_K")),
    "IQ4_NL": EncoderMix("IQ4_NL", _always("IQ4_NL"), _first_part(8, "Q5_K", "IQ4_NL")),
    "IQ4_XS": EncoderMix("IQ4_XS", _always("IQ4_XS"), _first_part(8, "Q5_K", "IQ4_XS")),
}

# What the quantiser offers, from most to fewest bits.
RECIPES = (
    "F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0", "Q4_K_M", "Q4_K_S", "Q4_1", "Q4_0",
    "IQ4_NL", "IQ4_XS", "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K",
)  # fmt: skip

# general.file_type of a file (llama.cpp's llama_ftype); types without one of their own have none.
FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K_S": 11,
    "Q3_K": 11, "Q3_K_M": 12, "Q3_K_L": 13, "Q4_K_S": 14, "Q4_K": 14, "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K": 16,
    "Q5_K_M": 17, "Q6_K": 18, "IQ2_XXS": 19, "IQ2_XS": 20, "IQ3_XXS": 23, "IQ1_S": 24, "IQ4_NL": 25, "IQ3_S": 26,
    "IQ2_S": 28, "IQ4_XS": 30, "IQ1_M": 31, "BF16": 32, "TQ1_0": 36, "TQ2_0": 37, "MXFP4": 38,
}  # fmt: skip


def wan_types(shapes: Shapes, recipe: str, kept: str = "F16") -> Types:
    """Types of a Wan file as ComfyUI-GGUF's tools make it.

    Args:
        shapes: every tensor in the file's order.
        recipe: a mix ("Q3_K_M") or any one type for all that is quantised ("Q3_K", "IQ4_XS", "F16").
        kept: type of the matrices that are never quantised: F16, or BF16 for files made from bfloat16.
    """
    mix = WAN_MIXES.get(recipe) or WanMix(known(recipe), recipe, recipe)
    values = 0
    types: Types = {}
    for name, shape in shapes.items():
        if len(shape) == 1 or len(shape) > 4 or prod(shape) <= _SMALL_TENSOR or name.endswith("modulation"):
            types[name] = "F32"
        elif len(shape) != 2 or any(part in name for part in _WAN_UNQUANTIZED):
            types[name] = kept
        elif name.endswith(".v.weight"):
            first, first_type = mix.first_values
            types[name] = fitting(first_type if values < first else mix.value, shape, kept)
            values += 1
        else:
            types[name] = fitting(mix.down if name.endswith(".ffn.2.weight") else mix.base, shape, kept)
    return types


def encoder_types(shapes: Shapes, recipe: str) -> Types:
    """Types of a T5 or UMT5 encoder (llama.cpp's names) as llama-quantize makes them; ``recipe`` as in wan_types."""
    mix = ENCODER_MIXES.get(recipe)
    layers = 1 + max(int(name.split(".")[2]) for name in shapes if name.startswith("enc.blk."))
    types: Types = {}
    for name, shape in shapes.items():
        if len(shape) == 1:
            types[name] = "F32"
        elif "attn_rel_b" in name:
            types[name] = "F16"
        elif mix is None:
            types[name] = fitting(known(recipe), shape, "F16")
        elif name == "token_embd.weight":
            types[name] = "Q6_K"
        else:
            layer, part = int(name.split(".")[2]), name.split(".")[3]
            chosen = {"attn_v": mix.value, "ffn_down": mix.down}.get(part)
            types[name] = fitting(chosen(layer, layers) if chosen else mix.base, shape, "F16")
    return types


def known(type_name: str) -> str:
    """The type itself; raises ValueError if there is none of that name."""
    if type_name not in FORMATS and type_name not in FLOAT_TYPES:
        raise ValueError(f"{type_name!r} is no mix and no type that can be made: use Q3_K_M, Q5_K_M or a ggml type.")
    return type_name


def fitting(type_name: str, shape: tuple[int, ...], fallback: str) -> str:
    """``type_name``, or ``fallback`` for rows that are not whole blocks of it."""
    if type_name in FLOAT_TYPES:
        return type_name
    return type_name if shape[-1] % FORMATS[type_name].block_size == 0 else fallback
