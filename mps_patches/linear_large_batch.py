"""F.linear with a bias corrupts rows when the batch dimension exceeds 65,536.

The fused multiply-add of Metal Performance Shaders keeps that coordinate in 16 bits, so row b lands on row b mod 65,536
and its own stays unwritten (pytorch#189495; fixed by pytorch#189496, which flattens the input as the cure here does).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from . import gate, probing
from .registry import Cure, Defect, Function, ProbeResult


def reference(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear`` of [..., K] as one matrix product of [rows, K]; bias [N] or [..., N]."""
    return _flattened(torch.nn.functional.linear, input, weight, bias)


def _flattened(linear: Function, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = input.reshape(-1, input.size(-1))
    if bias is None or bias.dim() == 1:
        return linear(rows, weight, bias).unflatten(0, input.shape[:-1])
    return linear(rows, weight, None).unflatten(0, input.shape[:-1]) + bias


def _make(original: Function) -> Function:
    def cured(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if (
            bias is not None
            and gate.acts_on(input)
            and input.dim() >= 3
            and input.size(-3) > gate.LIMITS["linear-large-batch"]
        ):
            return _flattened(original, input, weight, bias)
        return original(input, weight, bias)

    return cured


def probe(device: torch.device, quick: bool) -> ProbeResult:
    """One batch row more than the limit (not quick: three tokens of width 64), in float32."""
    batch = gate.LIMITS["linear-large-batch"] + 1
    tokens, width, out = (1, 4, 4) if quick else (3, 64, 64)
    input, weight, bias = probing.noise((batch, tokens, width)), probing.noise((out, width)), probing.noise((out,))
    expected = reference(input, weight, bias)
    compute = partial(torch.nn.functional.linear, input.to(device), weight.to(device), bias.to(device))
    return probing.compare(compute, expected, 1e-4, f"linear with bias, batch {batch}")


DEFECTS = (
    Defect(
        id="linear-large-batch",
        title="F.linear corrupts batches above 65,536",
        symptom="Wrong rows, different from run to run",
        trigger="F.linear with a bias on rank 3 or more, input.size(-3) > 65,536 (per-pixel attention over time)",
        cause="a 16-bit batch index in MPSNDArrayMatrixMultiplication",
        affected="torch 2.12 to 2.14 nightlies, float32 (and half precision before M5)",
        upstream=("pytorch#189495", "pytorch#189496"),
        seam="torch.nn.functional.linear",
        advice="Leave the patch on, or update torch to 2.14.",
        probe=probe,
        cure=Cure(targets=(("torch.nn.functional", "linear"),), make=_make),
        reference="linear_large_batch.reference",
    ),
)
