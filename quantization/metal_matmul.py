"""Multiplies a few rows by a quantised weight on MPS without decoding it to memory first (metal/matmul.metal).

For modulation and time embeddings (one row), short texts and the like: everything up to ``row_limit`` rows. Kernels
are compiled, kept and dropped as metal_kernels.py says; the reference is float64 on the CPU, and the tolerance is that
of float32 sums in any order (``within_rounding``). Decoding and multiplying separately remains for all else.

Bytes. For N x K weights of q bytes each and activations of b bytes, one call moves

    decoded first   N K (q + b) to decode, N K b to multiply, and x and y
    fused           N K q for every 32 rows of x (for every 4 with so few), and x and y

``bytes_moved`` states both. With one row, Q4_K and float16 that is 4.56 against 0.56 bytes per weight, with 64 rows
4.56 against 1.13: by bytes alone fused would win up to 256 rows.

Arithmetic sets the limit. Apple's GPUs do about 35 operations in float16 per byte of memory traffic (M1 2.6 TFLOPS and
68 GB/s, M4 Max 17 and 546), so a product of R rows takes as long as 2 R / 35 bytes per weight, in torch's kernel. With
2.56 bytes per weight for decoding Q4_K and at least 2 for the product, decoding first costs 2.56 + max(2, R / 17.5).
This kernel, of which 60 % of the peak is assumed, costs max(0.56, R / 10.5): 3.0 against 4.6 at 32 rows, 6.1 against
6.2 at 64, and more above. That is reasoned, not measured on a GPU; ASV_METAL_MATMUL_ROWS=N sets another limit.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from .block_format import BlockFormat
from .formats import dequantize
from .metal_kernels import (
    CHECKED_WEIGHTS,
    METAL_FORMATS,
    OUTPUT_TYPES,
    SCALED_FILES,
    Purpose,
    checked,
    enabled,
    read_source,
)
from .metal_scaled import SCALE_TYPES, kernel_layout
from .scaled_formats import ScaledFormat, dequantize_scaled
from .tensor import QuantizedWeight

ROWS_SWITCH = "ASV_METAL_MATMUL_ROWS"
ROW_LIMIT = 64
FEW_ROWS = (1, 4)
"""Rows that the kernels without tiles are compiled for. With more, reading x again for every row of W costs more than
unused rows of 8 x 8 matrices do."""

TILE_ROWS = 32
FEW_GROUP = 128
"""Threads per group where a simdgroup works for itself: four simdgroups, each with a row of W of many kilobytes."""

SHARED_FILES = {"blocks": ("blocks", "matmul"), "scaled": ("blocks", "scaled", "matmul", "matmul_scaled")}
CHECKED_PARTS = 32
CHECKED_ROWS = {"matmul_1": 1, "matmul_4": 3, "matmul_tiles": CHECKED_PARTS + 1}
"""Rows of x per launch of the check: with tiles one that is full and one that is not."""
MULTIPLYING = Purpose("within rounding of the reference", "they are decoded first and multiplied by torch")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Matrix:
    """A weight as the kernels take it.

    Args:
        name: of its format.
        data: blocks or codes, uint8 on MPS.
        features, columns: its shape.
        kinds: the ends of its kernels' names.
        extra: the kernels' arguments after the sizes.
        head: decodes the first rows, as many as it is told, on the CPU, to a dtype.
    """

    name: str
    data: Tensor
    features: int
    columns: int
    kinds: str
    extra: tuple[Any, ...]
    head: Callable[[int, torch.dtype], Tensor]


def linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor | None:
    """``torch.nn.functional.linear(x, weight.dequantize(x.dtype), bias)``, or None where that must be computed.

    Args:
        x: [..., columns] on MPS, float32, float16 or bfloat16. The result is [..., features] of the same dtype: sums in
            float32, rounded once.
        weight: [features, columns]; one that is not on x's device is left to the caller, who moves it anyway.
        bias: [features] of x's dtype, on x's device.
    """
    rows = prod(x.shape[:-1])
    if not _usable(x, rows, weight):
        return None
    matrix = _matrix(weight)
    if matrix is None:
        return None
    name = _kernel_name(rows)
    inputs = x.reshape(rows, matrix.columns).contiguous()
    if inputs.storage_offset() % 4:
        inputs = inputs.clone()

    def same(kernel: Any) -> bool:
        return _agrees(kernel, name, matrix, inputs, bias)

    library = f"{OUTPUT_TYPES[x.dtype]} inputs and {matrix.name}"
    kernel = checked(library, name + matrix.kinds, same, lambda: source(matrix.name, x.dtype), MULTIPLYING)
    if kernel is None:
        return None
    return _launch(kernel, name, matrix, inputs, bias, matrix.features).view(*x.shape[:-1], matrix.features)


def source(name: str, dtype: torch.dtype) -> str:
    """The Metal source of a format's products with activations of ``dtype``."""
    return f"#define ACTIVATION {OUTPUT_TYPES[dtype]}\n{read_source(name, SHARED_FILES)}"


def row_limit() -> int:
    """Most rows to multiply without decoding first; 0 is none."""
    return _limit(os.environ.get(ROWS_SWITCH, ""))


@cache
def _limit(setting: str) -> int:
    try:
        return max(0, int(setting)) if setting else ROW_LIMIT
    except ValueError:
        logger.warning("%s is %r, not a number of rows: %d is used.", ROWS_SWITCH, setting, ROW_LIMIT)
        return ROW_LIMIT


def bytes_moved(rows: int, features: int, columns: int, weight_bytes: int, itemsize: int) -> dict[str, int]:
    """Bytes that a product reads and writes in the device's memory, by path: "decoded first" and "fused".

    weight_bytes: of the quantised matrix. itemsize: bytes of an activation and of a decoded weight. Repeated reads of
    x and of decoded weights, which caches serve, are not counted; repeated reads of blocks are.
    """
    both = rows * (features + columns) * itemsize
    passes = 1 if rows <= FEW_ROWS[-1] else -(-rows // TILE_ROWS)
    return {
        "decoded first": weight_bytes + 2 * features * columns * itemsize + both,
        "fused": passes * weight_bytes + both,
    }


def _usable(x: Tensor, rows: int, weight: QuantizedWeight) -> bool:
    if weight.device != x.device or x.dtype not in OUTPUT_TYPES or not 0 < rows <= row_limit() or not enabled():
        return False
    if weight.dim() != 2 or x.shape[-1] != weight.shape[1] or weight.shape[1] % 8 or weight.numel() == 0:
        return False
    return max(weight.shape) < 1 << 31 and not (torch.is_grad_enabled() and x.requires_grad)


def _matrix(weight: QuantizedWeight) -> _Matrix | None:
    fmt, (features, columns) = weight.block_format, tuple(weight.shape)
    if isinstance(fmt, BlockFormat) and fmt.name in METAL_FORMATS and columns % METAL_FORMATS[fmt.name].weights == 0:
        return _block_matrix(fmt, weight.blocks.view(-1), features, columns)
    if isinstance(fmt, ScaledFormat) and fmt.name in SCALED_FILES:
        return _scaled_matrix(fmt, weight)
    return None


def _block_matrix(fmt: BlockFormat, blocks: Tensor, features: int, columns: int) -> _Matrix:
    metal = METAL_FORMATS[fmt.name]
    row_bytes = columns // metal.weights * metal.block_bytes
    aligned = metal.alignment > 1 and blocks.storage_offset() % metal.alignment == 0

    def head(count: int, dtype: torch.dtype) -> Tensor:
        return dequantize(blocks[: count * row_bytes].cpu(), fmt, (count, columns), dtype)

    return _Matrix(fmt.name, blocks, features, columns, "" if aligned else "_unaligned", (), head)


def _scaled_matrix(fmt: ScaledFormat, weight: QuantizedWeight) -> _Matrix | None:
    features, columns = weight.shape
    codes, scales = weight.blocks.view(features, columns), weight.scales
    values, sides = (None, (1, 1)) if scales is None else (scales.values, (scales.rows, scales.columns))
    layout = kernel_layout(codes, fmt.name, values, sides)
    if layout is None:
        return None

    def head(count: int, dtype: torch.dtype) -> Tensor:
        part = None if scales is None else scales.to(torch.device("cpu")).cut(0, count)
        return dequantize_scaled(codes[:count].cpu(), fmt, (count, columns), part, dtype)

    kinds = f"_{SCALE_TYPES[layout[0].dtype]}" + ("" if codes.storage_offset() % 4 == 0 else "_unaligned")
    return _Matrix(fmt.name, codes, features, columns, kinds, layout, head)


def _kernel_name(rows: int) -> str:
    return next((f"matmul_{few}" for few in FEW_ROWS if rows <= few), "matmul_tiles")


def _launch(kernel: Any, name: str, matrix: _Matrix, x: Tensor, bias: Tensor | None, features: int) -> Tensor:
    """The first ``features`` columns of the product."""
    y = torch.empty(x.shape[0], features, dtype=x.dtype, device=x.device)
    sizes = [x.shape[0], matrix.columns, features, int(bias is not None)]
    if name == "matmul_tiles":
        per_group = 64 // x.element_size()
        group = 4 * per_group
        grid: dict[str, Any] = {
            "threads": (-(-features // per_group) * group, -(-x.shape[0] // TILE_ROWS)),
            "group_size": (group, 1),
        }
    else:
        grid = {"threads": 32 * features, "group_size": FEW_GROUP}
    kernel(matrix.data, x, y, x if bias is None else bias, sizes, *matrix.extra, **grid)
    return y


def _agrees(kernel: Any, name: str, matrix: _Matrix, like: Tensor, bias: Tensor | None) -> bool:
    """Whether the kernel computes what it should for the first rows of the matrix, which lie in the loaded file.

    Every 32nd column of an input row holds a number and the others zero, at another place in each of 32 rows; a last
    row is full. So each weight counts in a sum that is short enough to show it, and long sums are tried too.
    """
    columns = matrix.columns
    features = min(matrix.features, max(1, CHECKED_WEIGHTS // columns))
    x = torch.randn(CHECKED_PARTS + 1, columns, generator=torch.Generator().manual_seed(0))
    x[:CHECKED_PARTS] *= torch.arange(columns) % CHECKED_PARTS == torch.arange(CHECKED_PARTS)[:, None]
    x = x.to(like.dtype)
    parts = x.to(like.device).split(CHECKED_ROWS[name])
    y = torch.cat([_launch(kernel, name, matrix, part, bias, features) for part in parts]).cpu()
    weights = matrix.head(features, like.dtype)
    return within_rounding(y, x, weights, None if bias is None else bias[:features].cpu())


def within_rounding(y: Tensor, x: Tensor, weights: Tensor, bias: Tensor | None) -> bool:
    """Whether y is x weights^T + bias as summed in float32, in any order, and rounded once to y's dtype.

    x [rows, columns], weights [features, columns], bias [features] or None, y [rows, features], all on the CPU. A sum
    of n products of which all but k are zero is off by at most (k + 2) u times the sum of their magnitudes (Higham,
    Accuracy and Stability of Numerical Algorithms, section 4.2: k - 1 additions, the rounding of a product, the bias,
    in first order), u = 2^-23 for arithmetic that may truncate; the last rounding adds one eps of y's dtype. What is
    not finite in float64, or overflows y's dtype, must not be finite in y.
    """
    exact, magnitude = x.double() @ weights.double().T, x.double().abs() @ weights.double().abs().T
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    terms = (x != 0).sum(dim=1, keepdim=True)
    limits = torch.finfo(y.dtype)
    tiny = terms * torch.finfo(torch.float32).tiny + limits.tiny * limits.eps
    bound = (terms + 2) * 2.0**-23 * magnitude + limits.eps * exact.abs() + tiny
    right = exact.isfinite() & ((y.double() - exact).abs() <= bound)
    lost = ~(exact.to(y.dtype).isfinite() & magnitude.to(torch.float32).isfinite())
    return bool((right | (lost & ~y.isfinite())).all())
