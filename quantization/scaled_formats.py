"""One-byte formats of safetensors files: fp8 e4m3fn and e5m2, int8 and MXFP8, plain or scaled.

A weight is ``table[byte] * scale``: a table of the 256 values of the format, and one factor per tensor, row or block.
No torch float8 dtype is computed with or moved (MPS has none), so everything runs on any device; the tables are the
OCP 8-bit formats as torch casts them on the CPU, the block scales of MXFP8 are OCP's E8M0. On MPS metal_scaled.py
goes first: one launch without temporaries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import prod

import torch
from torch import Tensor

from . import metal_scaled

# Weights per chunk, as for the block formats: 2 MiB of float32 on the CPU, 16 MiB elsewhere.
CPU_CHUNK = 1 << 19
DEVICE_CHUNK = 1 << 22

OUTPUT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MX_BLOCK = 32  # weights per E8M0 scale
GUESSED_BLOCKS = (128, 64, 32, 16, 256, 512)  # side of a block where it does not divide the matrix, likeliest first
SWIZZLE_ROWS, SWIZZLE_COLUMNS = 128, 4


@dataclass(frozen=True)
class ScaledFormat:
    """One byte per weight: ``name`` as in safetensors headers, ``dtype`` whose 256 values the table holds."""

    name: str
    dtype: torch.dtype

    def table(self, device: torch.device) -> Tensor:
        """The value of every byte: float32 [256] on ``device``, to be read only."""
        return _table(self.dtype, device)


SCALED_FORMATS: dict[str, ScaledFormat] = {
    fmt.name: fmt
    for fmt in (
        ScaledFormat("F8_E4M3", torch.float8_e4m3fn),
        ScaledFormat("F8_E5M2", torch.float8_e5m2),
        ScaledFormat("I8", torch.int8),
    )
}


@cache
def _table(dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.arange(256, dtype=torch.uint8).view(dtype).float().to(device)


@cache
def _powers_of_two(device: torch.device) -> Tensor:
    """Values of the E8M0 codes: 2 to the power of code - 127, and 255 is NaN. float32 [256]."""
    with torch.inference_mode(False):
        bits = torch.arange(256, dtype=torch.int32) << 23
        bits[0], bits[255] = 1 << 22, 0x7FC00000
        return bits.view(torch.float32).to(device)


@dataclass(frozen=True)
class Scales:
    """Factors of a matrix, one for each block of ``rows`` x ``columns`` weights.

    Args:
        values: [block rows, block columns], contiguous: float32, or uint8 for E8M0 codes. Blocks at the lower and
            right edge may be cut off by the matrix.
        rows, columns: weights of a block in each direction.
        home: ``values`` on the CPU, to which moving back returns.
    """

    values: Tensor
    rows: int
    columns: int
    home: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    def to(self, device: torch.device) -> Scales:
        """The same factors on ``device``."""
        home = self.values if self.values.device.type == "cpu" else self.home
        if device.type == "cpu" and home is not None:
            return Scales(home, self.rows, self.columns)
        return Scales(self.values.to(device), self.rows, self.columns, home)

    def cut(self, start: int, stop: int) -> Scales:
        """The factors of the matrix' rows ``start`` to ``stop``."""
        values, home = (self._cut(part, start, stop) for part in (self.values, self.home))
        assert values is not None
        return Scales(values, self._cut_rows, self.columns, home)

    @property
    def _cut_rows(self) -> int:
        return self.rows if self.values.shape[0] == 1 else 1

    def _cut(self, values: Tensor | None, start: int, stop: int) -> Tensor | None:
        if values is None or values.shape[0] == 1:
            return values
        if self.rows == 1:
            return values[start:stop]
        first = start // self.rows
        touched = values[first : -(-stop // self.rows)]
        by_row = touched[:, None].expand(-1, self.rows, -1).reshape(-1, touched.shape[1])
        return by_row[start - first * self.rows : stop - first * self.rows]

    def take(self, indices: Tensor, n_rows: int) -> Scales:
        """The factors of single rows (1-D ``indices``) of a matrix of ``n_rows``."""
        if self.values.shape[0] == 1:
            return self
        by_row = self.values if self.rows == 1 else self.cut(0, n_rows).values
        return Scales(by_row.index_select(0, indices), 1, self.columns)

    def multiply(self, dense: Tensor) -> None:
        """Multiply float32 [n, columns] in place; ``values`` must have one row, or one for each of the n."""
        values = self.values
        if values.dtype == torch.uint8:
            table = _powers_of_two(values.device)
            values = table.index_select(0, values.reshape(-1).int()).view(values.shape)
        if values.shape[1] == 1 or self.columns == 1:
            dense.mul_(values)
        elif dense.shape[1] == values.shape[1] * self.columns:
            dense.view(dense.shape[0], -1, self.columns).mul_(values[:, :, None])
        else:
            wide = values[:, :, None].expand(-1, -1, self.columns).reshape(values.shape[0], -1)
            dense.mul_(wide[:, : dense.shape[1]])


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a weight as scales see it: its first dimension, and all others."""
    return shape[0], prod(shape[1:])


def read_scales(stored: Tensor, shape: Sequence[int], group: int | Sequence[int] | None = None) -> Scales:
    """Make Scales of a file's scale tensor.

    stored: one number for the tensor, [rows] or [rows, 1] for its rows, or a grid [row blocks, column blocks] (also
    written [rows, column blocks, 1] and [row blocks, 1, column blocks, 1]); any float dtype, or uint8 for E8M0 codes.
    shape: the weight's. group: side or sides of a block if the file says; derived from the shapes otherwise.
    Raises ValueError if the scales fit the weight in none of these ways.
    """
    rows, columns = matrix_shape(shape)
    sides = [group, group] if isinstance(group, int) else list(group or (None, None))
    grid = _grid(stored, rows)
    sizes = [_block_side(length, count, side) for length, count, side in zip((rows, columns), grid, sides)]
    if sizes[0] is None or sizes[1] is None:
        raise ValueError(f"scales of shape {tuple(stored.shape)} do not fit a weight of shape {tuple(shape)}")
    values = stored.reshape(grid)
    values = values.contiguous() if values.dtype == torch.uint8 else values.float().contiguous()
    return Scales(values, sizes[0], sizes[1])


def _grid(stored: Tensor, rows: int) -> tuple[int, int]:
    if stored.numel() == 1:
        return 1, 1
    dims = tuple(stored.shape)
    if len(dims) == 2:
        return dims[0], dims[1]
    if len(dims) == 1:
        return (dims[0], 1) if dims[0] == rows else (0, 0)
    if len(dims) == 3 and dims[2] == 1:
        return dims[0], dims[1]
    if len(dims) == 4 and dims[1] == dims[3] == 1:
        return dims[0], dims[2]
    return 0, 0


def _block_side(length: int, count: int, stated: int | None) -> int | None:
    """Weights per block where ``count`` blocks cover ``length`` weights, or None if they cannot."""
    if count < 1 or count > length:
        return None
    if count in (1, length):
        return length // count
    candidates = [stated] if stated else [length // count] if length % count == 0 else []
    if not stated and (not candidates or candidates[0] & (candidates[0] - 1)):
        candidates = [*GUESSED_BLOCKS, *candidates]
    return next((side for side in candidates if -(-length // side) == count), None)


def read_mx_scales(stored: Tensor, shape: Sequence[int], swizzled: bool) -> Scales:
    """Make Scales of MXFP8's E8M0 codes (uint8), one for 32 weights of a row.

    swizzled: the codes lie as cuBLAS wants them, in tiles of 128 rows x 4 columns, padded to whole tiles, as ComfyUI
    writes them; otherwise [rows, columns / 32]. Raises ValueError if they do not fit ``shape``.
    """
    rows, columns = matrix_shape(shape)
    count = columns // MX_BLOCK
    tiles = -(-rows // SWIZZLE_ROWS), -(-count // SWIZZLE_COLUMNS)
    expected = prod(tiles) * SWIZZLE_ROWS * SWIZZLE_COLUMNS if swizzled else rows * count
    if stored.dtype != torch.uint8 or columns % MX_BLOCK or stored.numel() != expected:
        raise ValueError(f"MXFP8 scales of shape {tuple(stored.shape)} do not fit a weight of shape {tuple(shape)}")
    if swizzled:
        # A tile holds its 128 rows as 32 lines of four rows each: rows r, r + 32, r + 64 and r + 96.
        parts = stored.reshape(*tiles, 32, 4, SWIZZLE_COLUMNS).permute(0, 3, 2, 1, 4)
        stored = parts.reshape(tiles[0] * SWIZZLE_ROWS, tiles[1] * SWIZZLE_COLUMNS)[:rows, :count]
    values = stored.reshape(rows, count).contiguous()
    return Scales(values, 1, MX_BLOCK)


def dequantize_scaled(
    raw: Tensor, fmt: ScaledFormat, shape: Sequence[int], scales: Scales | None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Decode a weight of two or more dimensions.

    raw: uint8, contiguous, one byte per weight; scales on the same device. Returns a dense tensor of ``shape`` on
    raw's device: the float32 product, rounded once to ``dtype`` (float32, float16 or bfloat16). Raises ValueError for
    another dtype or a wrong number of bytes.
    """
    _check(raw, fmt, shape, dtype)
    codes = raw.view(matrix_shape(shape))
    decoded = None
    if raw.device.type == "mps":

        def first_rows(count: int) -> Tensor:
            part = None if scales is None else scales.cut(0, count)
            return _decode(codes[:count], fmt, part, dtype)

        decoded = metal_scaled.dequantize(codes, fmt.name, *_kernel_scales(scales), dtype, first_rows)
    return (_decode(codes, fmt, scales, dtype) if decoded is None else decoded).view(*shape)


def _kernel_scales(scales: Scales | None) -> tuple[Tensor | None, tuple[int, int]]:
    return (None, (1, 1)) if scales is None else (scales.values, (scales.rows, scales.columns))


def _decode(codes: Tensor, fmt: ScaledFormat, scales: Scales | None, dtype: torch.dtype) -> Tensor:
    """Decode a matrix with torch, in chunks of rows."""
    rows, columns = codes.shape
    out = torch.empty(rows, columns, dtype=dtype, device=codes.device)
    table = fmt.table(codes.device)
    step = max(1, (CPU_CHUNK if codes.device.type == "cpu" else DEVICE_CHUNK) // max(columns, 1))
    for start in range(0, rows, step):
        part = codes[start : start + step]
        dense = table.index_select(0, part.reshape(-1).int()).view(part.shape)
        if scales is not None:
            scales.cut(start, start + part.shape[0]).multiply(dense)
        out[start : start + step] = dense
    return out


def dequantize_scaled_rows(
    raw: Tensor,
    fmt: ScaledFormat,
    shape: Sequence[int],
    rows: Tensor,
    scales: Scales | None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Decode the given rows (int32 or int64 of any shape) of a matrix: [*rows.shape, columns] on raw's device."""
    if len(shape) != 2:
        raise ValueError(f"Rows can only be taken from a matrix, not from a tensor of shape {tuple(shape)}.")
    _check(raw, fmt, shape, dtype)
    n_rows, columns = shape
    codes, indices = raw.view(n_rows, columns), rows.reshape(-1).to(raw.device)

    def decode(wanted: Tensor) -> Tensor:
        part = None if scales is None else scales.take(wanted, n_rows)
        return _decode(codes.index_select(0, wanted), fmt, part, dtype)

    decoded = None
    if raw.device.type == "mps":
        decoded = metal_scaled.dequantize_rows(codes, fmt.name, *_kernel_scales(scales), indices, dtype, decode)
    return (decode(indices) if decoded is None else decoded).view(*rows.shape, columns)


def _check(raw: Tensor, fmt: ScaledFormat, shape: Sequence[int], dtype: torch.dtype) -> None:
    if dtype not in OUTPUT_DTYPES:
        raise ValueError(f"{fmt.name} can be decoded to float32, float16 or bfloat16, not to {dtype}.")
    if raw.dtype != torch.uint8 or raw.numel() != prod(shape):
        raise ValueError(
            f"A {fmt.name} weight of shape {tuple(shape)} takes {prod(shape)} bytes of uint8, "
            f"but {raw.numel()} of {raw.dtype} were given."
        )
