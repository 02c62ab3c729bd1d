"""Float32 factors of a LoRA as float16 and a power of two: half the bytes, and 11 of float32's 24 significant bits.

A factor is scaled so that its greatest element comes to lie just below 2**8. float16's least normal number is then at
least 2**21 times smaller than that element: nothing overflows, and what becomes subnormal is nothing beside the rest.
"""

from __future__ import annotations

import math

import torch

TOP = 8
"""Higher would keep more of the smallest elements, lower leaves more of MOST_EXPONENT to products of many factors."""
MOST_EXPONENT = 100
"""Beyond this power of two either way, alone or as a product, a factor stays float32, which ends at 2**128."""


def to_half(factor: torch.Tensor) -> tuple[torch.Tensor, int] | None:
    """``factor`` as (half, exponent), so that half * 2**exponent is the factor.

    Args:
        factor: float32, any shape, any device.

    Returns:
        half: float16 on the CPU, of the same shape. Each element of the product is off by at most 2**-11 of itself or
            2**-32 of the greatest one, whichever is more. None for other dtypes, no elements, infinities, NaN, and
            factors that would need a greater power of two than 2**MOST_EXPONENT.
    """
    if factor.dtype != torch.float32 or factor.numel() == 0:
        return None
    factor = factor.detach().to("cpu")
    lowest, highest = torch.aminmax(factor)
    greatest = max(-lowest.item(), highest.item())
    if not math.isfinite(greatest):
        return None
    exponent = math.frexp(greatest)[1] - TOP if greatest else 0
    if abs(exponent) > MOST_EXPONENT:
        return None
    return (factor * 2.0**-exponent).to(torch.float16), exponent
