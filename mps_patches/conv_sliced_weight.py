"""conv2d reads a non-contiguous weight as if it were contiguous.

MPSGraph's convolution ignores the weight's strides, so a slice ``weight[:, :, k]`` of a 3-D kernel, the usual way to
write a 3-D convolution as 2-D ones, gives values wrong by orders of magnitude (pytorch#192212, fixed in 2.14 by
pytorch#192303). The cure makes the weight contiguous; that copy is small beside the convolution.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import gate, probing
from .registry import Cure, Defect, Function, ProbeResult


def reference(input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """``torch.nn.functional.conv2d`` with a contiguous copy of the weight."""
    return torch.nn.functional.conv2d(input, weight.contiguous(), *args, **kwargs)


def _make(original: Function) -> Function:
    def cured(input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if gate.acts_on(weight) and not weight.is_contiguous():
            weight = weight.contiguous()
        return original(input, weight, *args, **kwargs)

    return cured


def probe(device: torch.device, quick: bool) -> ProbeResult:
    """Convolve with the middle slice of a 3-D kernel (not quick: 96 channels at 240x416, as in the Wan VAE)."""
    channels, height, width = (4, 8, 8) if quick else (96, 240, 416)
    image = probing.noise((1, channels, height, width))
    kernel = probing.noise((channels, channels, 3, 3, 3), seed=1) / channels
    expected = reference(image, kernel[:, :, 1])
    compute = partial(torch.nn.functional.conv2d, image.to(device), kernel.to(device)[:, :, 1])
    return probing.compare(compute, expected, 1e-4, f"conv2d with a sliced {channels}-channel weight")


DEFECTS = (
    Defect(
        id="conv-sliced-weight",
        title="conv2d misreads a sliced weight",
        symptom="Garbled or grey frames from code that splits a 3-D convolution into 2-D ones",
        trigger="F.conv2d with a non-contiguous weight",
        cause="MPSGraph ignores the strides of the weight",
        affected="torch before 2.14 on macOS 15 and later",
        upstream=("pytorch#192212", "pytorch#192303"),
        seam="torch.nn.functional.conv2d, torch.conv2d",
        advice="Leave the patch on, or update torch to 2.14.",
        probe=probe,
        cure=Cure(targets=(("torch.nn.functional", "conv2d"), ("torch", "conv2d")), make=_make),
        reference="conv_sliced_weight.reference",
    ),
)
