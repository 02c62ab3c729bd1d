"""What the probes share: seeded inputs, the comparison with a CPU reference, and the look at free memory.

Inputs are made on the CPU, so that every device gets the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from .registry import ProbeResult

EXACT = 0.0
GIB = 1 << 30
# Bytes that a probe may take on the device.
LARGEST_PROBE = 4 * GIB


def noise(shape: Sequence[int], dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Seeded normal noise of ``dtype`` on the CPU."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute difference over the reference's largest value; inf for NaN or another shape."""
    if actual.shape != expected.shape:
        return math.inf
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    if actual.numel() == 0:
        return 0.0
    scale = max(expected.abs().max().item(), 1e-30)
    error = (actual - expected).abs().max().item() / scale
    return math.inf if math.isnan(error) else error


def compare(compute: Callable[[], torch.Tensor], expected: torch.Tensor, tolerance: float, what: str) -> ProbeResult:
    """Hold what the device computes against the reference; a refusal by the device is a defect too."""
    try:
        actual = compute().cpu()
    except torch.OutOfMemoryError as error:
        return not_applicable(f"{what}: not enough memory ({first_line(error)})")
    except (RuntimeError, TypeError) as error:
        return ProbeResult(False, math.inf, tolerance, f"{what}: the device refuses ({first_line(error)})")
    error_found = relative_error(actual, expected)
    return ProbeResult(error_found <= tolerance, error_found, tolerance, f"{what}: relative error {error_found:.2g}")


def worst(results: Sequence[ProbeResult]) -> ProbeResult:
    """The result to report of several: a failure before a pass, the larger error first."""
    applicable = [result for result in results if result.applicable]
    return max(applicable or results, key=lambda result: (not result.ok, result.error))


def not_applicable(reason: str) -> ProbeResult:
    """The result of a probe that cannot be made here."""
    return ProbeResult(True, 0.0, 0.0, reason, applicable=False)


def first_line(error: BaseException) -> str:
    """The first sentence or line of an error's message."""
    return str(error).strip().split("\n")[0].split(". ")[0][:160]


def lacks_memory(device: torch.device, needed: int) -> str | None:
    """Why ``needed`` bytes should not be taken on the device for a probe, or None."""
    if needed > LARGEST_PROBE:
        return f"not tried out: takes {needed / GIB:.1f} GiB"
    if device.type != "mps":
        return None
    free = torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    if free >= needed:
        return None
    return f"needs {needed / GIB:.1f} GiB, {max(free, 0) / GIB:.1f} GiB are free"
