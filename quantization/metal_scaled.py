"""Decodes fp8, int8 and MXFP8 weights on MPS with one launch of a Metal kernel per tensor (metal/scaled.metal).

Kernels are compiled, checked, kept and dropped as metal_kernels.py says; scaled_formats.py is the reference.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .metal_kernels import CHECKED_WEIGHTS, GROUP, OUTPUT_TYPES, ROW_TYPES, SCALED_FILES, checked, enabled, equal

SCALE_TYPES = {torch.float32: "float", torch.uint8: "uchar"}


def dequantize(
    codes: Tensor,
    format_name: str,
    scales: Tensor | None,
    sides: tuple[int, int],
    dtype: torch.dtype,
    reference: Callable[[int], Tensor],
) -> Tensor | None:
    """Decode a matrix: dense, of the shape of ``codes``, or None where torch must decode.

    Args:
        codes: uint8 [rows, columns], contiguous, on MPS at any storage offset.
        format_name: a key of SCALED_FILES.
        scales: contiguous [block rows, block columns], float32 or uint8 for E8M0 codes, on codes' device.
        sides: rows and columns of a block.
        dtype: float32, float16 or bfloat16.
        reference: decodes the first rows, as many as it is told, with torch; the result may be on any device.
    """
    rows, columns = codes.shape
    if not _usable(codes, format_name, scales, sides):
        return None
    factors, layout = _factors(codes, scales, sides)
    name = f"scaled_{SCALE_TYPES[factors.dtype]}_{OUTPUT_TYPES[dtype]}{_suffix(codes)}"

    def launch(kernel: Any, count: int) -> Tensor:
        out = torch.empty(count, columns, dtype=dtype, device=codes.device)
        kernel(codes, out, factors, layout, **_grid(columns, count))
        return out

    def same(kernel: Any) -> bool:
        count = min(rows, max(1, CHECKED_WEIGHTS // columns))
        return equal(launch(kernel, count), reference(count).cpu().contiguous())

    kernel = checked(format_name, name, same)
    return None if kernel is None else launch(kernel, rows)


def dequantize_rows(
    codes: Tensor,
    format_name: str,
    scales: Tensor | None,
    sides: tuple[int, int],
    rows: Tensor,
    dtype: torch.dtype,
    reference: Callable[[Tensor], Tensor],
) -> Tensor | None:
    """Decode rows of a matrix: [rows.numel(), columns], or None where torch must decode.

    rows: int32 or int64 on codes' device, of any shape; a row outside the matrix becomes zeros. reference: decodes
    the rows it is given (1-D) with torch. The rest as in ``dequantize``.
    """
    n_rows, columns = codes.shape
    if not _usable(codes, format_name, scales, sides) or rows.dtype not in ROW_TYPES or rows.numel() == 0:
        return None
    factors, layout = _factors(codes, scales, sides)
    kinds = f"{ROW_TYPES[rows.dtype]}_{SCALE_TYPES[factors.dtype]}_{OUTPUT_TYPES[dtype]}"

    def launch(kernel: Any, wanted: Tensor) -> Tensor:
        out = torch.empty(wanted.numel(), columns, dtype=dtype, device=codes.device)
        kernel(codes, out, factors, layout, wanted, n_rows, **_grid(columns, wanted.numel()))
        return out

    def same(kernel: Any) -> bool:
        first = wanted[: max(1, CHECKED_WEIGHTS // columns)]
        return equal(launch(kernel, first), reference(first).cpu().contiguous())

    wanted = rows.reshape(-1).contiguous()
    kernel = checked(format_name, f"scaled_rows_{kinds}{_suffix(codes)}", same)
    return None if kernel is None else launch(kernel, wanted)


def _usable(codes: Tensor, format_name: str, scales: Tensor | None, sides: tuple[int, int]) -> bool:
    """A thread decodes four weights of one row with one scale; the kernels divide positions as 32-bit numbers."""
    if format_name not in SCALED_FILES or codes.numel() == 0 or codes.shape[1] % 4 or max(codes.shape) >= 1 << 31:
        return False
    if scales is not None and (scales.dtype not in SCALE_TYPES or (sides[1] % 4 and scales.shape[1] > 1)):
        return False
    return enabled()


def kernel_layout(
    codes: Tensor, format_name: str, scales: Tensor | None, sides: tuple[int, int]
) -> tuple[Tensor, list[int]] | None:
    """The grid of scales, one if there is none, and the kernels' Layout; None where torch must decode.

    The arguments are those of ``dequantize``.
    """
    return _factors(codes, scales, sides) if _usable(codes, format_name, scales, sides) else None


def _factors(codes: Tensor, scales: Tensor | None, sides: tuple[int, int]) -> tuple[Tensor, list[int]]:
    """The grid of scales, one if there is none, and the kernels' Layout."""
    rows, columns = codes.shape
    if scales is None:
        return torch.ones(1, 1, device=codes.device), [columns, rows, columns, 1]
    row_side = rows if scales.shape[0] == 1 else sides[0]
    column_side = columns if scales.shape[1] == 1 else sides[1]
    return scales, [columns, row_side, column_side, scales.shape[1]]


def _suffix(codes: Tensor) -> str:
    return "" if codes.storage_offset() % 4 == 0 else "_unaligned"


def _grid(columns: int, rows: int) -> dict[str, tuple[int, int]]:
    """Threads and group size: groups as wide as a row permits, over several rows if rows are short."""
    across = min(GROUP, columns // 4)
    return {"threads": (columns // 4, rows), "group_size": (across, max(1, GROUP // across))}
