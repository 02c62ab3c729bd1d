"""The table of ggml block formats, and decoding whole tensors or single rows of them.

Every type that gguf-py 0.19 can dequantise, on any device. Results equal gguf-py's in float32 bit for bit; float16 and
bfloat16 are rounded once from that. On MPS metal_kernels.py goes first: one launch without temporaries. Otherwise
tensors are decoded in chunks, so that temporaries stay small whatever their size.
"""

from collections.abc import Sequence
from functools import cache
from math import prod

import torch
from torch import Tensor

from . import codebook_quants, iq_quants, k_quants, legacy_quants, metal_kernels, ternary_quants
from .block_format import BlockFormat

__all__ = [
    "FORMATS",
    "FORMATS_BY_ID",
    "BlockFormat",
    "dequantize",
    "dequantize_rows",
    "packed_size",
    "random_blocks",
]

_FAMILIES = (legacy_quants, k_quants, ternary_quants, codebook_quants, iq_quants)
FORMATS: dict[str, BlockFormat] = {fmt.name: fmt for family in _FAMILIES for fmt in family.FORMATS}
FORMATS_BY_ID: dict[int, BlockFormat] = {fmt.type_id: fmt for fmt in FORMATS.values()}

OUTPUT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Weights per chunk: on the CPU the float32 of one chunk takes 4 MiB, to stay in the caches; elsewhere 16 MiB.
CPU_CHUNK = 1 << 20
DEVICE_CHUNK = 1 << 22

SCALE_SPREAD = 0.25  # of random_blocks: scales differ from their mean by up to this fraction


def packed_size(fmt: BlockFormat, shape: Sequence[int]) -> int:
    """Return the bytes that a tensor of ``shape`` takes. Raises ValueError if its rows are not whole blocks."""
    row = shape[-1] if shape else 1
    if row % fmt.block_size:
        raise ValueError(
            f"Rows of {row} weights cannot be {fmt.name}, which stores blocks of {fmt.block_size}: "
            f"the shape {tuple(shape)} or the type is wrong."
        )
    return prod(shape) // fmt.block_size * fmt.block_bytes


def dequantize(raw: Tensor, fmt: BlockFormat, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Decode a tensor.

    raw: contiguous uint8 of any leading shape and storage offset, ``packed_size(fmt, shape)`` bytes.
    dtype: float32, float16 or bfloat16. Returns a dense tensor of ``shape`` on raw's device. Raises ValueError for
    rows that are not whole blocks, a wrong number of bytes or another dtype.
    """
    _check(raw, fmt, shape, dtype)
    if raw.device.type == "mps":
        decoded = metal_kernels.dequantize(raw, fmt, prod(shape), dtype)
        if decoded is not None:
            return decoded.view(*shape)
    blocks = raw.view(-1, fmt.block_bytes)
    out = torch.empty(blocks.shape[0], fmt.block_size, dtype=dtype, device=raw.device)
    chunk = (CPU_CHUNK if raw.device.type == "cpu" else DEVICE_CHUNK) // fmt.block_size
    for start in range(0, blocks.shape[0], chunk):
        fmt.decode_into(blocks[start : start + chunk], out[start : start + chunk])
    return out.view(*shape)


def dequantize_rows(
    raw: Tensor, fmt: BlockFormat, shape: Sequence[int], rows: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Decode the given rows of a matrix, and nothing else.

    raw: contiguous uint8 holding ``shape`` = (n_rows, n_cols). rows: int32 or int64 of any shape, from 0 to
    n_rows - 1. Returns [*rows.shape, n_cols] on raw's device. Raises ValueError as ``dequantize`` does, and IndexError
    (on the CPU) for a row outside the matrix.
    """
    if len(shape) != 2:
        raise ValueError(f"Rows can only be taken from a matrix, not from a tensor of shape {tuple(shape)}.")
    _check(raw, fmt, shape, dtype)
    n_rows, n_cols = shape
    if raw.device.type == "mps":
        decoded = metal_kernels.dequantize_rows(raw, fmt, (n_rows, n_cols), rows.to(raw.device), dtype)
        if decoded is not None:
            return decoded.view(*rows.shape, n_cols)
    row_bytes = packed_size(fmt, (n_cols,))
    wanted = raw.view(n_rows, row_bytes).index_select(0, rows.reshape(-1).to(raw.device))
    return dequantize(wanted, fmt, (*rows.shape, n_cols), dtype)


def _check(raw: Tensor, fmt: BlockFormat, shape: Sequence[int], dtype: torch.dtype) -> None:
    if dtype not in OUTPUT_DTYPES:
        raise ValueError(f"{fmt.name} can be decoded to float32, float16 or bfloat16, not to {dtype}.")
    if raw.dtype != torch.uint8:
        raise ValueError(f"{fmt.name} blocks must come as uint8, not as {raw.dtype}.")
    expected = packed_size(fmt, shape)
    if raw.numel() != expected:
        raise ValueError(
            f"A {fmt.name} tensor of shape {tuple(shape)} takes {expected} bytes, but {raw.numel()} were given."
        )


def random_blocks(fmt: BlockFormat, n_blocks: int, seed: int, std: float = 0.02) -> Tensor:
    """Return valid random blocks, uint8 [n_blocks, block_bytes] on the CPU, the same for the same arguments.

    Their weights have about zero mean and the standard deviation ``std``. The quants are uniformly random bits; the
    blocks' scales vary by a quarter and in sign.
    """
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (n_blocks, fmt.block_bytes), dtype=torch.uint8, generator=generator)
    if fmt.block_size == 1:
        factors = torch.randn(n_blocks, generator=generator)
    else:
        factors = torch.rand(n_blocks, generator=generator).mul_(2).sub_(1).mul_(SCALE_SPREAD).add_(1)
        factors /= (1 + SCALE_SPREAD**2 / 3) ** 0.5
        factors *= torch.randint(0, 2, (n_blocks,), generator=generator).mul_(2).sub_(1)
    scale, minimum = _unit_scales(fmt)
    fmt.scale.write(blocks, factors * (scale * std), generator)
    if fmt.minimum is not None:
        fmt.minimum.write(blocks, factors * (minimum * std), generator)
    return blocks


@cache
def _unit_scales(fmt: BlockFormat) -> tuple[float, float]:
    """Return the scale and minimum with which blocks of random bits have zero mean and unit variance."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (1024, fmt.block_bytes), dtype=torch.uint8, generator=generator)

    def decoded(scale: float, minimum: float) -> Tensor:
        fmt.scale.write(blocks, torch.full((blocks.shape[0],), scale), generator)
        if fmt.minimum is not None:
            fmt.minimum.write(blocks, torch.full((blocks.shape[0],), minimum), generator)
        return fmt.decode(blocks)

    minimum = 0.0
    if fmt.minimum is not None:
        minimum = -(decoded(1.0, 0.0).mean() / decoded(0.0, 1.0).mean()).item()
    scale = 1 / decoded(1.0, minimum).square().mean().sqrt().item()
    return scale, minimum * scale
