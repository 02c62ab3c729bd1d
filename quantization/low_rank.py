"""Adds a product of two thin matrices (a LoRA's) to a dense weight in place, some rows at a time.

Made at once, the product and its scaled copy are each as large as the float32 weight, 0.26 GiB for the largest matrix
of a Wan 14B model. Row by row the sums are the same ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

PART_BYTES = 32 << 20
"""Of the product that is there at one time: enough rows to keep a matrix product busy, little beside a weight."""


def add_product(weight: Tensor, up: Tensor, down: Tensor, scale: float, part_bytes: int = PART_BYTES) -> None:
    """``weight += scale * (up @ down)``, computed in the weight's dtype.

    Args:
        weight: [rows, columns], changed in place.
        up: [rows, rank], any floating dtype.
        down: [rank, columns], any floating dtype.
        part_bytes: the most that a part of the product may take; one row is the least.
    """
    rows, columns = weight.shape
    down = down.to(weight.dtype)
    step = max(1, part_bytes // (columns * weight.element_size()))
    for start in range(0, rows, step):
        part = torch.mm(up[start : start + step].to(weight.dtype), down)
        weight[start : start + step].add_(part, alpha=scale)
        del part
