"""Quantised weights that report their storage type break models, and keep text encoders off the device.

A weight whose dtype reads uint8 makes ``x.to(weight.dtype)`` an integer, and linear then refuses ("does not support
linear for non-float inputs", city96/ComfyUI-GGUF#454); core keeps such encoders on the CPU, minutes instead of seconds
(ComfyUI#15640). This pack's ``QuantizedWeight`` reports its compute dtype, and its loader moves an encoder when every
format decodes on the device: the probe decodes and multiplies there.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from . import probing
from .registry import Defect, ProbeResult


def reference(input: Tensor, weight: Tensor) -> Tensor:
    """``torch.nn.functional.linear`` with the dense weight, in float32 on the CPU."""
    return torch.nn.functional.linear(input.cpu().float(), weight.cpu().float())


def probe(device: torch.device, quick: bool) -> ProbeResult:
    """A product with a weight in each of a few block formats (not quick: all), left quantised on the device."""
    from ..quantization.formats import FORMATS, dequantize, random_blocks
    from ..quantization.tensor import QuantizedWeight

    rows, columns = 8, 256
    input = probing.noise((4, columns), torch.float16)
    results = []
    for name in ("Q8_0", "Q4_K") if quick else tuple(FORMATS):
        block_format = FORMATS[name]
        blocks = random_blocks(block_format, rows * columns // block_format.block_size, seed=3)
        expected = reference(input, dequantize(blocks, block_format, (rows, columns), torch.float16))
        weight = QuantizedWeight(blocks.to(device), block_format, (rows, columns), torch.float16)
        if weight.dtype != torch.float16:
            return ProbeResult(False, float("inf"), 0.0, f"{name} reports {weight.dtype}")
        compute = partial(_product, input.to(device), weight)
        results.append(probing.compare(compute, expected, 1e-2, f"linear, {name}"))
    return probing.worst(results)


def _product(input: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.linear(input.to(weight.dtype), weight)


DEFECTS = (
    Defect(
        id="quantised-dtype",
        title="Quantised weights and text encoders on the device",
        symptom='"MPS device does not support linear for non-float inputs"; text encoding takes minutes',
        trigger="GGUF weights whose dtype reads uint8, as other packs load them",
        cause="models cast their input to the weight's dtype; core keeps encoders that might do so on the CPU",
        affected="other loaders, on any torch",
        upstream=("city96/ComfyUI-GGUF#454", "ComfyUI#15640", "ComfyUI#12809", "ComfyUI#13070"),
        seam="Load Diffusion Model (MPS), Load Text Encoder (MPS)",
        advice="Load GGUF models and text encoders with this pack's loaders.",
        probe=probe,
        cure=None,
        reference="quantised_dtype.reference",
        kind="loader",
    ),
)
