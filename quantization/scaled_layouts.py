"""How safetensors files say which weights are quantised, and the state dict of QuantizedWeights made from them.

Three habits are in the wild: a ``scaled_fp8`` marker with ``<layer>.scale_weight``; ``<layer>.weight_scale`` (also
``weight_scale_inv``) alone; and ComfyUI's configuration of each layer, as ``<layer>.comfy_quant`` tensors of JSON or
as ``_quantization_metadata`` in the header. Facts from ComfyUI's QUANTIZATION.md and from published Wan files.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from .safetensors_file import (
    DTYPES,
    SafetensorsError,
    SafetensorsFile,
    SafetensorsShards,
    TensorInfo,
    UnsupportedFormatError,
)
from .scaled_formats import (
    MX_BLOCK,
    SCALED_FORMATS,
    ScaledFormat,
    Scales,
    dequantize_scaled,
    matrix_shape,
    read_mx_scales,
    read_scales,
)
from .tensor import QuantizedWeight

HEADER_KEY = "_quantization_metadata"
MARKER = "scaled_fp8"
CONFIGURATION = "comfy_quant"
SCALE_NAMES = ("scale_weight", "weight_scale", "weight_scale_inv")
# Scales of activations: the pack multiplies in the compute dtype and quantises no activation.
IGNORED_NAMES = ("scale_input", "input_scale")

# Formats of a layer's configuration -> names in SCALED_FORMATS. The last three are tools' additions to ComfyUI's.
CONFIGURED_FORMATS = {
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "mxfp8": "F8_E4M3",
    "int8_tensorwise": "I8",
    "float8_e4m3fn_rowwise": "F8_E4M3",
    "float8_e4m3fn_blockwise": "F8_E4M3",
    "int8_blockwise": "I8",
}
# Those that some version of core reads, and how the weight must be stored: core casts others instead of viewing them.
_CORE_READS = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "mxfp8": "F8_E4M3", "int8_tensorwise": "I8"}
FP8_NAMES = ("F8_E4M3", "F8_E5M2")
PLAIN = ""  # core's way for fp8 without scales

Reader = SafetensorsFile | SafetensorsShards


@dataclass(frozen=True)
class ScaledLayer:
    """A one-byte weight of a file.

    Args:
        info: the weight's entry in the header.
        format: how its bytes are read.
        scale: name of its scale tensor, if any.
        configuration: what ``comfy_quant`` or the header say of its layer.
        core_format: the configured format by which core can load it, PLAIN for fp8 without scales, None where no
            version of core reads this layout (or reads it wrongly).
    """

    info: TensorInfo
    format: ScaledFormat
    scale: str | None
    configuration: dict[str, Any]
    core_format: str | None


def scaled_layers(file: Reader) -> dict[str, ScaledLayer]:
    """The one-byte weights of a file by name; empty for a dense file.

    Raises SafetensorsError for a configuration that cannot be read, UnsupportedFormatError for one without a decoder.
    """
    configurations = _configurations(file)
    layers = {}
    for name, info in file.tensors.items():
        layer, _, last = name.rpartition(".")
        if last in (*SCALE_NAMES, *IGNORED_NAMES, MARKER, CONFIGURATION):
            continue
        configuration = configurations.get(layer, {}) if last == "weight" else {}
        scale = _scale_name(file, layer) if last == "weight" else None
        if "format" not in configuration and not (info.type_name in FP8_NAMES or (info.type_name == "I8" and scale)):
            continue
        fmt = _format(file, info, configuration)
        if fmt is not None:
            core_format = _core_format(file, info, scale, configuration)
            layers[name] = ScaledLayer(info, fmt, scale, configuration, core_format)
    return layers


def _scale_name(file: Reader, layer: str) -> str | None:
    return next((f"{layer}.{name}" for name in SCALE_NAMES if f"{layer}.{name}" in file.tensors), None)


def _configurations(file: Reader) -> dict[str, dict[str, Any]]:
    found: dict[str, Any] = {}
    try:
        if HEADER_KEY in file.metadata:
            found.update(json.loads(file.metadata[HEADER_KEY])["layers"])
        for name in file.tensors:
            layer, _, last = name.rpartition(".")
            if last == CONFIGURATION:
                found[layer] = json.loads(file.raw(name).numpy().tobytes())
    except (ValueError, KeyError, TypeError, RecursionError):
        found = {"": None}
    if not all(isinstance(value, dict) for value in found.values()):
        raise SafetensorsError(
            f"{file.path.name} describes its quantised layers in a way that cannot be read: the file is damaged, "
            "download it again."
        )
    return found


def _format(file: Reader, info: TensorInfo, configuration: dict[str, Any]) -> ScaledFormat | None:
    """How the bytes are read; None for a weight that is stored dense although a format is configured."""
    configured = configuration.get("format")
    if configured is not None:
        parameters = configuration.get("params")
        rotated = configuration.get("convrot") or (isinstance(parameters, dict) and parameters.get("convrot"))
        if configured not in CONFIGURED_FORMATS or rotated:
            what = f"{configured} with rotation (convrot)" if rotated else str(configured)[:80]
            raise UnsupportedFormatError(
                f"{file.path.name} is quantised to {what}, which cannot be decoded here: "
                "use an fp8_scaled, int8 or GGUF file of this model."
            )
        if info.type_name == "U8":
            return SCALED_FORMATS[CONFIGURED_FORMATS[configured]]
    return SCALED_FORMATS.get(info.type_name)


def _core_format(file: Reader, info: TensorInfo, scale: str | None, configuration: dict[str, Any]) -> str | None:
    if scale is None:
        return PLAIN if not configuration else None
    configured = configuration.get("format")
    stored = file.tensors[scale]
    per_row = stored.shape == (info.shape[0], 1)
    if configured is None and scale.endswith(".scale_weight") and _has_marker(file):
        configured = "float8_e4m3fn"
    one_or_rows = per_row or prod(stored.shape) == 1
    expected = _CORE_READS.get(configured or "")
    return configured if info.type_name == expected and (one_or_rows or configured == "mxfp8") else None


def _has_marker(file: Reader) -> bool:
    return any(name.rpartition(".")[2] == MARKER for name in file.tensors)


def core_formats(layers: Iterable[ScaledLayer]) -> set[str | None]:
    """What core must support to load these layers; None among them if it cannot."""
    return {layer.core_format for layer in layers}


def scaled_state_dict(file: Reader, layers: dict[str, ScaledLayer], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """All tensors of a file that a model wants, without a copy of any large one.

    One-byte matrices become QuantizedWeights that report ``dtype``; the few one-byte tensors of other ranks (norms,
    biases, convolutions) are decoded to float32, dense ones come as they are. Raises SafetensorsError for scales that
    do not fit.
    """
    return {
        name: _weight(file, layers[name], dtype) if name in layers else file.tensor(name)
        for name in model_names(file, layers)
    }


def model_names(file: Reader, layers: dict[str, ScaledLayer]) -> Iterator[str]:
    """The tensors that a model wants: all but scales and what describes the quantisation."""
    for name in file.tensors:
        layer, _, last = name.rpartition(".")
        if last in (*IGNORED_NAMES, MARKER, CONFIGURATION) or (last in SCALE_NAMES and f"{layer}.weight" in layers):
            continue
        yield name


def _weight(file: Reader, layer: ScaledLayer, dtype: torch.dtype) -> torch.Tensor:
    info = layer.info
    scales = layer_scales(file, layer)
    if len(info.shape) == 2:
        return QuantizedWeight(file.raw(info.name), layer.format, info.shape, dtype, scales=scales)
    shape = info.shape if len(info.shape) > 1 else (1, prod(info.shape))
    return dequantize_scaled(file.raw(info.name), layer.format, shape, scales).view(info.shape)


def layer_scales(file: Reader, layer: ScaledLayer) -> Scales | None:
    """The factors of a weight, None for plain fp8. Raises SafetensorsError if they are missing or do not fit."""
    if layer.scale is None:
        if layer.info.type_name in FP8_NAMES:
            return None
        raise SafetensorsError(
            f"{file.path.name} lacks the scales of {layer.info.name}: the file is incomplete, download it again."
        )
    info, stored = layer.info, file.tensors[layer.scale]
    codes = DTYPES[stored.type_name] == torch.uint8
    configured = layer.configuration.get("format")
    shape = info.shape if len(info.shape) > 1 else (1, prod(info.shape))
    try:
        if configured == "mxfp8":
            return read_mx_scales(file.raw(layer.scale), shape, swizzled=True)
        rows, columns = matrix_shape(shape)
        if codes and columns % MX_BLOCK == 0 and prod(stored.shape) == rows * columns // MX_BLOCK:
            return read_mx_scales(file.raw(layer.scale), shape, swizzled=False)
        return read_scales(file.tensor(layer.scale), shape, _group(layer.configuration))
    except ValueError as error:
        raise SafetensorsError(
            f"{file.path.name} cannot be used: {error} ({info.name}); choose another conversion of this model."
        ) from None


def _group(configuration: dict[str, Any]) -> int | None:
    size = configuration.get("group_size", configuration.get("block_size"))
    return size if isinstance(size, int) and size > 0 else None
