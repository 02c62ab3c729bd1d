"""Small models as fp8, int8 and MXFP8 safetensors, in every layout that Wan and UMT5 files are published in.

Layouts follow ComfyUI's QUANTIZATION.md, its conversion of older files, and published checkpoints. Beside the file's
tensors stands the decoded model, computed with torch's own casts, which is what a loader must see.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch
from apple_silicon_video.quantization.safetensors_file import DTYPES

from .text_encoders import ENCODERS, UMT5_XXL, encoder_tensors, encoder_tokenizer, transformers_name
from .wan_shapes import wan_shape, wan_tensors
from .weights import write_safetensors

E4M3, E5M2, INT8 = torch.float8_e4m3fn, torch.float8_e5m2, torch.int8
MX_BLOCK = 32
_SCALED = re.compile(
    r"blocks\.\d+\..*\.weight$|encoder\.block\.\d+\..*(SelfAttention\.[qkvo]|DenseReluDense\.w\w+)\.weight$"
)


@dataclass(frozen=True)
class ScaledLayout:
    """One way of writing quantised weights.

    Args:
        dtype: of the quantised weights.
        block: rows and columns that share a factor, 0 for all; None where there are no factors.
        scale_name: last part of the factors' names.
        flat: factors of rows as [rows] instead of [rows, 1].
        marker: elements of the ``scaled_fp8`` tensor, None without one.
        configured: ``format`` in the layers' configuration, None without one.
        in_header: the configuration stands in the header instead of ``comfy_quant`` tensors.
        extra: further fields of the configuration.
        input_scale: name of a scale for activations, which a file may carry besides.
        everything: all floating-point tensors are cast, norms and biases too.
        as_bytes: fp8 weights are stored as U8.
        swizzled: MXFP8's codes lie in cuBLAS's tiles of 128 x 4.
    """

    dtype: torch.dtype
    block: tuple[int, int] | None = (0, 0)
    scale_name: str = "weight_scale"
    flat: bool = False
    marker: int | None = None
    configured: str | None = None
    in_header: bool = False
    extra: Mapping[str, int] = field(default_factory=dict)
    input_scale: str | None = None
    everything: bool = False
    as_bytes: bool = False
    mx: bool = False
    swizzled: bool = False


SCALED_LAYOUTS = {
    "e4m3fn": ScaledLayout(E4M3, None, everything=True),
    "e5m2": ScaledLayout(E5M2, None, everything=True),
    "e4m3fn-matrices": ScaledLayout(E4M3, None),
    "marker": ScaledLayout(E4M3, scale_name="scale_weight", marker=0),
    "marker-full-precision": ScaledLayout(E4M3, scale_name="scale_weight", marker=2, input_scale="scale_input"),
    "marker-e5m2": ScaledLayout(E5M2, scale_name="scale_weight", marker=0),
    "comfy-quant": ScaledLayout(E4M3, configured="float8_e4m3fn", input_scale="input_scale"),
    "comfy-quant-e5m2": ScaledLayout(E5M2, configured="float8_e5m2"),
    "comfy-quant-bytes": ScaledLayout(E4M3, configured="float8_e4m3fn", in_header=True, as_bytes=True),
    "comfy-quant-row": ScaledLayout(E4M3, (1, 0), configured="float8_e4m3fn"),
    "header": ScaledLayout(E4M3, configured="float8_e4m3fn", in_header=True),
    "weight-scale": ScaledLayout(E4M3),
    "weight-scale-row": ScaledLayout(E4M3, (1, 0), flat=True),
    "weight-scale-block": ScaledLayout(E4M3, (128, 128), scale_name="weight_scale_inv"),
    "block-e5m2": ScaledLayout(E5M2, (64, 64)),
    "configured-block": ScaledLayout(E4M3, (64, 64), configured="float8_e4m3fn_blockwise", extra={"group_size": 64}),
    "int8": ScaledLayout(INT8, configured="int8_tensorwise"),
    "int8-row": ScaledLayout(INT8, (1, 0), configured="int8_tensorwise"),
    "mxfp8": ScaledLayout(E4M3, (1, MX_BLOCK), configured="mxfp8", mx=True, swizzled=True),
    "mxfp8-rows": ScaledLayout(E4M3, (1, MX_BLOCK), mx=True),
}


@dataclass(frozen=True)
class ScaledModel:
    """Tensors and header metadata of a file, and the float32 model that they decode to."""

    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]
    decoded: dict[str, torch.Tensor]


def scaled_model(dense: Mapping[str, torch.Tensor], layout: ScaledLayout, prefix: str = "") -> ScaledModel:
    """Quantise the matrices of a model's blocks; all else stays float16, and uint8 tensors stay as they are.

    Args:
        dense: a Wan or UMT5 (transformers' names), any float dtype.
        layout: an entry of SCALED_LAYOUTS.
        prefix: put before every name in the file.
    """
    tensors: dict[str, torch.Tensor] = {}
    decoded: dict[str, torch.Tensor] = {}
    layers: dict[str, dict] = {}
    for name, weight in dense.items():
        if not weight.is_floating_point():
            tensors[prefix + name] = decoded[name] = weight
        elif weight.dim() == 2 and _SCALED.search(name):
            layer = prefix + name.removesuffix(".weight")
            stored, scale, decoded[name] = _quantise(weight.float(), layout)
            tensors[prefix + name] = stored.view(torch.uint8) if layout.as_bytes else stored
            if scale is not None:
                tensors[f"{layer}.{layout.scale_name}"] = scale
            if layout.input_scale:
                tensors[f"{layer}.{layout.input_scale}"] = torch.tensor(0.5)
            if layout.configured:
                layers[layer] = {"format": layout.configured, **layout.extra}
        else:
            stored = weight.to(layout.dtype if layout.everything else torch.float16)
            tensors[prefix + name], decoded[name] = stored, stored.float()
    if layout.marker is not None:
        tensors[f"{prefix}scaled_fp8"] = torch.zeros(layout.marker, dtype=layout.dtype)
    metadata = {}
    if layers and layout.in_header:
        metadata["_quantization_metadata"] = json.dumps({"format_version": "1.0", "layers": layers})
    elif layers:
        for layer, configuration in layers.items():
            tensors[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps(configuration).encode()), dtype=torch.uint8)
    return ScaledModel(tensors, metadata, decoded)


def write_scaled(path: Path, model: ScaledModel) -> Path:
    """Write the model's file."""
    return write_safetensors(path, model.tensors, model.metadata)


def _quantise(weight: torch.Tensor, layout: ScaledLayout) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """The stored weight, its stored factors and the decoded weight of a float32 matrix."""
    if layout.block is None:
        stored = weight.to(layout.dtype)
        return stored, None, stored.float()
    rows, columns = (side or length for side, length in zip(layout.block, weight.shape))
    blocks = weight.view(weight.shape[0] // rows, rows, weight.shape[1] // columns, columns)
    limit = 127.0 if layout.dtype == INT8 else torch.finfo(layout.dtype).max
    factors = blocks.abs().amax(dim=(1, 3)).clamp(min=1e-12) / limit
    if layout.mx:
        codes = factors.log2().ceil().add(127).to(torch.uint8)
        factors = torch.exp2(codes.float() - 127)
    scaled = blocks / factors[:, None, :, None]
    stored = (scaled.round() if layout.dtype == INT8 else scaled).to(layout.dtype)
    decoded = (stored.float() * factors[:, None, :, None]).view(weight.shape)
    scale = factors.reshape(()) if factors.numel() == 1 else factors.reshape(-1) if layout.flat else factors
    if layout.mx:
        scale = swizzled(codes) if layout.swizzled else codes
    return stored.view(weight.shape), scale, decoded


def swizzled(codes: torch.Tensor) -> torch.Tensor:
    """Codes [rows, columns] in cuBLAS's order of block scales, padded with zeros to whole tiles of 128 x 4."""
    rows, columns = -(-codes.shape[0] // 128) * 128, -(-codes.shape[1] // 4) * 4
    out = torch.zeros(rows * columns, dtype=codes.dtype)
    row, column = torch.meshgrid(torch.arange(codes.shape[0]), torch.arange(codes.shape[1]), indexing="ij")
    tile = row // 128 * (columns // 4) + column // 4
    out[tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + column % 4] = codes
    return out.view(rows, columns)


def write_full_size_scaled(path: Path, model: str, matrices: str = "F8_E4M3", others: str = "F16") -> Path:
    """Write a model of real size as a safetensors file whose data is a hole, so that it takes kilobytes on disk.

    Args:
        model: a variant of Wan, or "umt5-xxl" (with the vocabulary of the small one).
        matrices: type of the blocks' matrices by safetensors' name; fp8 ones get ``scale_weight`` and a marker.
        others: type of all else.
    """
    encoder = model == "umt5-xxl"
    shapes = encoder_tensors(UMT5_XXL) if encoder else wan_tensors(wan_shape(model, full_size=True))
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for original, shape in shapes.items():
        name = transformers_name(original) if encoder else original
        is_matrix = len(shape) == 2 and _SCALED.search(name) is not None
        tensors[name] = (matrices if is_matrix else others, shape)
        if is_matrix and matrices.startswith("F8"):
            tensors[f"{name.removesuffix('.weight')}.scale_weight"] = ("F32", ())
            tensors["scaled_fp8"] = (matrices, (0,))
    vocabulary = encoder_tokenizer(ENCODERS["umt5"]) if encoder else b""
    if encoder:
        tensors["spiece_model"] = ("U8", (len(vocabulary),))
    header, offset = {}, 0
    for name, (type_name, shape) in tensors.items():
        end = offset + prod(shape) * DTYPES[type_name].itemsize
        header[name] = {"dtype": type_name, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
        file.seek(-len(vocabulary), os.SEEK_END)
        file.write(vocabulary)
    return path
