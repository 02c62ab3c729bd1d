"""baddbmm with beta=0 lets NaN of its ignored input through.

torch promises that the input is not read when beta is 0; MPS multiplies it by zero, and 0 * NaN is NaN
(pytorch#187521, #194442; fixed after 2.13). Sub-quadratic attention, ComfyUI's default on a Mac, and diffusers' sliced
attention pass an uninitialised buffer there, so images turn black at random. The cure passes zeros instead.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import gate, probing
from .registry import Cure, Defect, Function, ProbeResult


def reference(input: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """beta * input + alpha * (batch1 @ batch2); the input is not read when beta is 0. Shapes [B, M, K], [B, K, N]."""
    product = torch.bmm(batch1, batch2) * alpha
    return product if beta == 0 else product + beta * input


def _make(original: Function) -> Function:
    def cured(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("beta", 1) == 0 and gate.acts_on(input):
            input = input.new_zeros((1, 1, 1))
        return original(input, *args, **kwargs)

    return cured


def _make_in_place(original: Function) -> Function:
    def cured(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("beta", 1) == 0 and gate.acts_on(input):
            input.zero_()
        return original(input, *args, **kwargs)

    return cured


def probe(device: torch.device, quick: bool) -> ProbeResult:
    """A NaN input with beta=0 (not quick: at the shapes of one sub-quadratic chunk)."""
    batch, queries, keys, width = (1, 4, 6, 8) if quick else (12, 512, 2048, 128)
    left, right = probing.noise((batch, queries, width)), probing.noise((batch, width, keys), seed=1)
    expected = reference(left, left, right, beta=0, alpha=0.5)
    nan = torch.full((1, 1, 1), float("nan"), device=device)
    compute = partial(torch.baddbmm, nan, left.to(device), right.to(device), beta=0, alpha=0.5)
    return probing.compare(compute, expected, 1e-4, "baddbmm(beta=0) with NaN in its input")


DEFECTS = (
    Defect(
        id="baddbmm-uninitialised",
        title="baddbmm with beta=0 reads its input",
        symptom="NaN attention, black frames at random",
        trigger="torch.baddbmm(beta=0) with an uninitialised input",
        cause="the input is multiplied by zero instead of being left out",
        affected="torch up to 2.13",
        upstream=("pytorch#187521", "pytorch#194442", "diffusers#14459"),
        seam="torch.baddbmm, Tensor.baddbmm, Tensor.baddbmm_",
        advice="Leave the patch on, or update torch to 2.14.",
        probe=probe,
        cure=Cure(
            targets=(("torch", "baddbmm"), ("torch.Tensor", "baddbmm"), ("torch.Tensor", "baddbmm_")),
            make={"baddbmm": _make, "baddbmm_": _make_in_place},
        ),
        reference="baddbmm_uninitialised.reference",
    ),
)
