"""UniPC's coefficients in float64, without the cancellation that ruins them in float32.

UniPC (Zhao et al., 2023) combines earlier model outputs with weights from a small linear system R rho = b, where b
holds functions phi_k(h) that float32 gets by subtracting nearly equal numbers and dividing by h, k times over. On a
flow schedule of high shift h starts near 0.002, and the error is many times the weight. Here phi_k is a power series.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

Variant = Literal["bh1", "bh2"]

SERIES_TERMS = 30


@dataclass(frozen=True)
class StepWeights:
    """One step from lambda_s to lambda_t for a model that predicts x0; h = lambda_t - lambda_s > 0.

    decay: expm1(-h), of the latest output m_0. base: B(h), -h for bh1 and expm1(-h) for bh2. ratios: r_i, the distance
    of the i-th earlier output from the latest, in units of h (negative). predictor, corrector: weights rho of
    (m_i - m_0) / r_i; the corrector's last is that of (m_t - m_0).
    """

    decay: float
    base: float
    ratios: tuple[float, ...]
    predictor: tuple[float, ...]
    corrector: tuple[float, ...]


def step_weights(lambdas: Sequence[float], variant: Variant) -> StepWeights:
    """Weights of one step. lambdas: of the outputs in use from the earliest to the latest, then of the target.

    The order is the number of outputs. Raises ValueError for an unknown variant.
    """
    if variant not in BASES:
        raise ValueError(f"{variant!r} is not a UniPC variant: use one of {', '.join(BASES)}")
    *earlier, latest, target = lambdas
    h = target - latest
    ratios = tuple((value - latest) / h for value in reversed(earlier))
    base = BASES[variant](-h)
    order = len(ratios) + 1
    moments = [math.factorial(i) * -h * phi(i + 1, -h) / base for i in range(1, order + 1)]
    return StepWeights(
        decay=math.expm1(-h),
        base=base,
        ratios=ratios,
        # The authors' code rounds two systems of one unknown to one half; ComfyUI's does, too.
        predictor=(0.5,) if order == 2 else _solve(ratios, moments[:-1]),
        corrector=(0.5,) if order == 1 else _solve((*ratios, 1.0), moments),
    )


def phi(k: int, z: float) -> float:
    """phi_k(z) = sum of z^n / (n + k)! for n from 0; phi_0 is exp, phi_k = (phi_{k-1} - 1/(k-1)!) / z."""
    if abs(z) > 1:
        value = math.expm1(z) / z
        for j in range(1, k):
            value = (value - 1 / math.factorial(j)) / z
        return value if k else math.exp(z)
    return math.fsum(z**n / math.factorial(n + k) for n in range(SERIES_TERMS))


def _solve(ratios: Sequence[float], moments: Sequence[float]) -> tuple[float, ...]:
    """rho with sum over m of ratios[m]^i rho[m] = moments[i] for every i."""
    if not ratios:
        return ()
    nodes = torch.tensor(ratios, dtype=torch.float64)
    system = torch.stack([nodes**i for i in range(len(ratios))])
    return tuple(torch.linalg.solve(system, torch.tensor(moments, dtype=torch.float64)).tolist())


BASES = {"bh1": lambda z: z, "bh2": math.expm1}
