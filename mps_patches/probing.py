"""What the probes share: seeded inputs, the comparison with a CPU reference, and the look at free memory.

Inputs are made on the CPU, so that every device gets the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from .registry import SMALL_PROBE, ProbeResult

EXACT = 0.0
GIB = 1 << 30
# Triggers up to this many elements are scaled down: such a probe is small, and harmless on a simulated device.
SCALED = 1 << 24
# The most bytes that a probe may take on the device, and the share of what is free there that it may take.
LARGEST_PROBE = 4 * GIB + (1 << 28)
LARGEST_SHARE = 0.5


def noise(shape: Sequence[int], dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Seeded normal noise of ``dtype`` on the CPU."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute difference over the reference's largest value; inf for NaN or another shape."""
    if actual.shape != expected.shape:
        return math.inf
    if actual.device == expected.device and actual.dtype == expected.dtype and torch.equal(actual, expected):
        return 0.0
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
    """Why a probe that holds ``needed`` bytes on the device is not run, or None.

    Free is what the recommended working set has left. Small probes (``SMALL_PROBE``) always run.
    """
    if needed <= SMALL_PROBE:
        return None
    if needed > LARGEST_PROBE:
        return f"takes {needed / GIB:.1f} GiB, more than a probe may ({LARGEST_PROBE / GIB:.2f})"
    if device.type != "mps":
        return None
    free = max(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory(), 0)
    if needed <= LARGEST_SHARE * free:
        return None
    return f"takes {needed / GIB:.1f} GiB, more than {LARGEST_SHARE:.0%} of the {free / GIB:.1f} GiB that are free"


def sampled(total: int, count: int = 3) -> list[int]:
    """``count`` places of ``total``, spread from the first to the last."""
    last = total - 1
    return sorted({round(last * index / max(1, count - 1)) for index in range(count)}) if total else []
