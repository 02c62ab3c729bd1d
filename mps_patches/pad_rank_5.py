"""Padding of rank-5 tensors overwrites the data it should copy once a frame has 65,536 elements.

MPSGraph's pad, constant and otherwise, is wrong above rank 4 when the last output dimension, or the product of the
output dimensions behind the first padded one, reaches 2^16 (pytorch#194922, with Apple's FB24527244). Video VAEs pad
in time at every causal convolution, so their frames come out flat, tan or NaN. The cure writes no padded tensor in one
operation: slabs of the constant are concatenated, and for the other modes rows are gathered axis by axis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import gate, probing
from .registry import Cure, Defect, Function, ProbeResult


def reference(input: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Tensor:
    """``torch.nn.functional.pad`` for "constant", "replicate" and "reflect", any rank: no pad operation is used.

    pad: (before, after) pairs from the last dimension backwards; negative numbers crop.
    """
    output = input
    for position, (before, after) in enumerate(zip(pad[::2], pad[1::2])):
        dim = input.dim() - 1 - position
        if mode == "constant":
            output = _constant(output, dim, before, after, 0.0 if value is None else value)
        elif before or after:
            output = output.index_select(dim, _rows(mode, output.size(dim), before, after).to(output.device))
    return output.clone() if output is input else output


def _constant(input: Tensor, dim: int, before: int, after: int, value: float) -> Tensor:
    crop = max(-before, 0), max(-after, 0)
    if any(crop):
        input = input.narrow(dim, crop[0], input.size(dim) - sum(crop))
    slabs = []
    for count in (max(before, 0), max(after, 0)):
        shape = list(input.shape)
        shape[dim] = count
        slabs.append(input.new_full(shape, value))
    if before <= 0 and after <= 0:
        return input
    return torch.cat([part for part in (slabs[0], input, slabs[1]) if part.size(dim)], dim)


def _rows(mode: str, size: int, before: int, after: int) -> Tensor:
    rows = torch.arange(-before, size + after)
    if mode == "replicate":
        return rows.clamp(0, size - 1)
    rows = rows.abs()
    return torch.where(rows < size, rows, 2 * (size - 1) - rows)


def _meets_trigger(input: Tensor, pad: Sequence[int]) -> bool:
    """Whether the padded tensor is one that MPSGraph gets wrong; H*W alone counts as well, to be safe."""
    shape = list(input.shape)
    padded = [input.dim() - 1 - place for place in range(len(pad) // 2) if pad[2 * place] or pad[2 * place + 1]]
    for place in range(len(pad) // 2):
        shape[-1 - place] += pad[2 * place] + pad[2 * place + 1]
    if not padded:
        return False
    behind = math.prod(shape[min(padded) + 1 :])
    frame = max(shape[-1] * shape[-2], input.size(-1) * input.size(-2))
    return max(shape[-1], behind, frame) >= gate.LIMITS["pad-rank-5"]


def _valid(input: Tensor, pad: Sequence[int], mode: str) -> bool:
    """What the original would refuse is left to it."""
    if len(pad) % 2 or len(pad) > 2 * input.dim():
        return False
    sizes = [input.size(-1 - place) for place in range(len(pad) // 2)]
    pairs = list(zip(sizes, pad[::2], pad[1::2]))
    if mode == "constant":
        left = ((size + min(before, 0) + min(after, 0), size + before + after) for size, before, after in pairs)
        return all(min(sizes) > 0 for sizes in left)
    if len(pad) != 6 or min(pad) < 0:
        return False
    return mode == "replicate" or all(max(before, after) < size for size, before, after in pairs)


def _applies(input: Any, pad: Sequence[int], mode: str) -> bool:
    return (
        gate.acts_on(input)
        and input.dim() >= 5
        and mode in ("constant", "replicate", "reflect")
        and _valid(input, pad, mode)
        and _meets_trigger(input, pad)
    )


def _make_pad(original: Function) -> Function:
    def cured(input: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Tensor:
        if _applies(input, pad, mode):
            return reference(input, pad, mode, value)
        return original(input, pad, mode, value)

    return cured


def _make_constant_pad_nd(original: Function) -> Function:
    def cured(input: Tensor, pad: Sequence[int], value: float = 0, **kwargs: Any) -> Tensor:
        if not kwargs and _applies(input, pad, "constant"):
            return reference(input, pad, "constant", value)
        return original(input, pad, value, **kwargs)

    return cured


def probe(device: torch.device, quick: bool) -> ProbeResult:
    """Pad two frames in time, at the smallest failing frame and (not quick) at those of a 1280x704 video."""
    side = math.isqrt(gate.LIMITS["pad-rank-5"] - 1) + 1
    cases = [((1, 2, 2, side, side), (0, 0, 0, 0, 2, 0), torch.float32)]
    if not quick:
        cases += [
            ((1, 16, 3, 352, 640), (0, 0, 0, 0, 1, 0), torch.bfloat16),
            ((1, 12, 3, 480, 832), (1, 1, 1, 1, 2, 0), torch.float16),
        ]
    results = []
    for shape, pad, dtype in cases:
        frames = probing.noise(shape, dtype)
        expected = torch.nn.functional.pad(frames, pad)
        compute = partial(torch.nn.functional.pad, frames.to(device), pad)
        what = f"pad {pad} of {'x'.join(map(str, shape))}"
        results.append(probing.compare(compute, expected, probing.EXACT, what))
    return probing.worst(results)


DEFECTS = (
    Defect(
        id="pad-rank-5",
        title="Padding of video tensors overwrites them",
        symptom="Flat, tan or NaN frames after VAE encode (image to video, Wan 2.2 5B) and in causal VAEs",
        trigger="F.pad on rank 5 or more, 65,536 or more elements behind the first padded dimension (256x256 frames)",
        cause="MPSGraph's pad writes the constant, or other wrong values, over the copied data",
        affected="torch up to 2.14 on every macOS and chip; Metal kernels of its own from 2.15",
        upstream=("pytorch#194922", "pytorch#195147", "ComfyUI#16433", "FB24527244"),
        seam="torch.nn.functional.pad, torch.constant_pad_nd",
        advice="Leave the patch on, or update torch to 2.15.",
        probe=probe,
        cure=Cure(
            targets=(("torch.nn.functional", "pad"), ("torch", "constant_pad_nd")),
            make={"pad": _make_pad, "constant_pad_nd": _make_constant_pad_nd},
        ),
        reference="pad_rank_5.reference",
    ),
)
