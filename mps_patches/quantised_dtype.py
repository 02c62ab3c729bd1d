"""Quantised weights that report their storage type break models, and keep text encoders off the device.

A weight whose dtype reads uint8 makes ``x.to(weight.dtype)`` an integer, and linear then refuses ("does not support
linear for non-float inputs", city96/ComfyUI-GGUF#454); core keeps such encoders on the CPU, minutes instead of seconds
(ComfyUI#15640). This pack's ``QuantizedWeight`` reports its compute dtype, and its loader moves an encoder when every
format decodes on the device: the probe decodes and multiplies there, GGUF blocks and the scaled one-byte formats of
safetensors files (fp8, int8, MXFP8) alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from . import probing
from .registry import Defect, ProbeResult


def reference(input: Tensor, weight: Tensor) -> Tensor:
    """``torch.nn.functional.linear`` with the dense weight, in float32 on the CPU."""
    return torch.nn.functional.linear(input.cpu().float(), weight.cpu().float())


def probe(device: torch.device, quick: bool) -> ProbeResult:
    """A product with a weight in each of a few formats (not quick: all), left quantised on the device."""
    from ..quantization.formats import FORMATS

    names = ("Q8_0", "Q4_K", "F8_E4M3, one scale", "MXFP8") if quick else (*FORMATS, *SCALED_CASES)
    input = probing.noise((4, SHAPE[1]), torch.float16)
    results = []
    for name in names:
        weight, dense = _scaled_weight(SCALED_CASES[name]) if name in SCALED_CASES else _block_weight(name)
        if weight.dtype != torch.float16:
            return ProbeResult(False, float("inf"), 0.0, f"{name} reports {weight.dtype}")
        compute = partial(_product, input.to(device), weight.to(device))
        results.append(probing.compare(compute, reference(input, dense), 1e-2, f"linear, {name}"))
    return probing.worst(results)


def _block_weight(name: str) -> tuple[Tensor, Tensor]:
    """A weight in a GGUF block format, and its dense values."""
    from ..quantization.formats import FORMATS, dequantize, random_blocks
    from ..quantization.tensor import QuantizedWeight

    block_format = FORMATS[name]
    blocks = random_blocks(block_format, SHAPE[0] * SHAPE[1] // block_format.block_size, seed=3)
    dense = dequantize(blocks, block_format, SHAPE, torch.float16)
    return QuantizedWeight(blocks, block_format, SHAPE, torch.float16), dense


@dataclass(frozen=True)
class ScaledCase:
    """A one-byte format, and the extent of the blocks that share a factor: (0, 0) for none."""

    name: str
    block: tuple[int, int] = (0, 0)
    powers_of_two: bool = False


SHAPE = (8, 256)
SCALED_CASES = {
    "F8_E4M3": ScaledCase("F8_E4M3"),
    "F8_E4M3, one scale": ScaledCase("F8_E4M3", SHAPE),
    "F8_E4M3, scales by block": ScaledCase("F8_E4M3", (4, 128)),
    "F8_E5M2, one scale": ScaledCase("F8_E5M2", SHAPE),
    "I8, scales by row": ScaledCase("I8", (1, SHAPE[1])),
    "MXFP8": ScaledCase("F8_E4M3", (1, 32), powers_of_two=True),
}


def _scaled_weight(case: ScaledCase) -> tuple[Tensor, Tensor]:
    """A weight in a scaled format, and its dense values: torch's own cast of the bytes, times the factors."""
    from ..quantization.scaled_formats import SCALED_FORMATS, Scales
    from ..quantization.tensor import QuantizedWeight

    scaled_format = SCALED_FORMATS[case.name]
    wide = probing.noise(SHAPE, seed=3).clamp(-3, 3) * (40 if case.name == "I8" else 1)
    values = wide.to(scaled_format.dtype)
    dense, scales = values.float(), None
    if case.block != (0, 0):
        grid = (SHAPE[0] // case.block[0], SHAPE[1] // case.block[1])
        exponents = torch.arange(grid[0] * grid[1]).view(grid) % 5 - 7
        factors = torch.exp2(exponents.float()) * (1 if case.powers_of_two else 1.25)
        stored = (exponents + 127).to(torch.uint8) if case.powers_of_two else factors
        scales = Scales(stored, *case.block)
        dense = dense * factors.repeat_interleave(case.block[0], 0).repeat_interleave(case.block[1], 1)
    raw = values.view(torch.uint8)
    return QuantizedWeight(raw, scaled_format, SHAPE, torch.float16, scales=scales), dense


def _product(input: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.linear(input.to(weight.dtype), weight)


DEFECTS = (
    Defect(
        id="quantised-dtype",
        title="Quantised weights and text encoders on the device",
        symptom='"MPS device does not support linear for non-float inputs"; text encoding takes minutes',
        trigger="GGUF and scaled weights whose dtype reads uint8 or float8, as other packs load them",
        cause="models cast their input to the weight's dtype; core keeps encoders that might do so on the CPU",
        affected="other loaders, on any torch",
        upstream=("city96/ComfyUI-GGUF#454", "ComfyUI#15640", "ComfyUI#12809", "ComfyUI#13070"),
        seam="Load Diffusion Model (MPS), Load Text Encoder (MPS)",
        advice="Load GGUF, fp8, int8 and MXFP8 models and text encoders with this pack's loaders.",
        probe=probe,
        cure=None,
        reference="quantised_dtype.reference",
        kind="loader",
    ),
)
