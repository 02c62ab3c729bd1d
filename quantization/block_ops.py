"""The few torch operations that every block decoder is written with.

All unpacking is done in uint8, a quarter of float32's traffic; float32 arithmetic follows ggml's order of operations,
so that results equal gguf-py's bit for bit. Only operations and dtypes that MPS has had since torch 2.6 are used.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor


@cache
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a small 1-D constant, kept on its device."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)


def half_field(blocks: Tensor, offset: int, count: int = 1) -> Tensor:
    """Return ``count`` float16 at the even byte ``offset`` as [n, count]; a copy where they are not aligned."""
    field = blocks[:, offset : offset + 2 * count]
    if field.storage_offset() % 2 or field.stride(0) % 2:
        field = field.clone(memory_format=torch.contiguous_format)
    return field.view(torch.float16)


def halves(blocks: Tensor, offset: int, count: int = 1) -> Tensor:
    """Return ``count`` float16 fields at the even byte ``offset`` as float32 [n, count]."""
    return half_field(blocks, offset, count).float()


def integers(blocks: Tensor, offset: int, count: int, dtype: torch.dtype) -> Tensor:
    """Return ``count`` little-endian integers (int16 or int32) at byte ``offset`` as [n, count]."""
    field = blocks[:, offset : offset + count * dtype.itemsize].clone(memory_format=torch.contiguous_format)
    return field.view(dtype)


def bit_planes(field: Tensor, bits: int) -> Tensor:
    """Cut the bytes of ``field`` into fields of ``bits`` bits, lowest first: uint8 [8 // bits, *field.shape]."""
    shifts = constant(tuple(range(0, 8, bits)), torch.uint8, field.device)
    planes = field.unsqueeze(0) >> shifts.view(-1, *[1] * field.dim())
    return planes.bitwise_and_((1 << bits) - 1)


def along(values: tuple[int, ...] | tuple[float, ...], dims: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a constant that runs along the first of ``dims`` dimensions."""
    return constant(values, dtype, device).view(-1, *[1] * (dims - 1))


def write(operation: Callable[..., Tensor], left: Tensor, right: Tensor, out: Tensor) -> None:
    """Write ``operation(left, right)``, computed in float32, into ``out``, rounded to its dtype.

    MPS kernels compute in the dtype of ``out``, so there a half-precision ``out`` takes a launch of its own.
    """
    if out.dtype == torch.float32 or out.device.type != "mps":
        operation(left, right, out=out)
    else:
        out.copy_(operation(left, right))


def write_multiply_add(factor: Tensor, quants: Tensor, summand: Tensor, out: Tensor) -> None:
    """Write ``factor * quants + summand``, computed in float32, into ``out``, rounded to its dtype.

    The products must be exact in float32 (in K-quants they are: 11 bits of a float16, 6 of a scale and 5 of a quant),
    so that it does not matter whether a kernel rounds them before the sum.
    """
    if out.dtype == torch.float32:
        torch.mul(quants, factor, out=out).add_(summand)
    elif out.device.type == "mps":
        out.copy_(torch.addcmul(summand, quants, factor))
    else:
        torch.addcmul(summand, quants, factor, out=out)
