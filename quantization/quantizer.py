"""Quantises weights to ggml's block formats: whole arrays, or tensors of any size a piece at a time.

The error minimised is the squared one, weighted by an importance for each input column if one is given (llama.cpp's
importance matrix). Pieces have a fixed size and each is computed by one thread, so that the result is the same
whatever the number of threads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from .formats import FORMATS
from .gguf_layout import STORED_TYPES_BY_NAME
from .quantizer_blocks import ENCODERS

FLOAT_TYPES = ("F32", "F16", "BF16")
TYPES = (*FLOAT_TYPES, *ENCODERS)

PIECE = 1 << 20  # weights per piece: what a thread does at a time
_TILE = 1 << 16  # weights per call of an encoder: its arrays stay in the cache
_LARGEST = 1e10  # more than any block can hold; beyond it squares could overflow

Reader = Callable[[int, int], torch.Tensor]


class QuantizeError(ValueError):
    """Weights cannot be quantised; the message is one sentence for the user."""


@dataclass(frozen=True)
class Piece:
    """Part of a tensor: its bytes (uint8), number of weights, and sums of squared errors and squared weights."""

    data: np.ndarray
    weights: int
    squared_error: float
    squared_weights: float


def quantize(values: np.ndarray, type_name: str, importance: np.ndarray | None = None, name: str = "") -> np.ndarray:
    """Quantise an array of any float dtype and size, rows last.

    Args:
        values: its last dimension must hold whole blocks.
        type_name: one of ``TYPES``.
        importance: one weight, zero or more, for each column of the last dimension.
        name: of the tensor, for messages.

    Returns:
        uint8 [blocks, bytes of a block] (for plain types, one weight is a block).

    Raises:
        QuantizeError: an infinite or undefined weight or importance, or rows that are not whole blocks.
    """
    columns = values.shape[-1] if values.ndim else 1
    weights = _importance(importance, columns, name)
    _check_rows(columns, type_name, name)
    flat = np.ascontiguousarray(values).reshape(-1)
    with np.errstate(over="ignore"):
        flat = flat.astype(np.float32, copy=False)
    return _quantized(flat, type_name, weights, 0, name)


def quantized_pieces(
    read: Reader,
    shape: tuple[int, ...],
    type_name: str,
    importance: np.ndarray | None = None,
    threads: int = 1,
    name: str = "",
) -> Iterator[Piece]:
    """Quantise a tensor piece by piece, in order; no more than two pieces for each thread are in memory.

    Args:
        read: gives the weights from the first position up to the second, as a flat tensor of any float dtype;
            called from one thread.
        shape: of the tensor; rows are its last dimension.
        type_name, importance, name: as for ``quantize``.
        threads: how many pieces are worked on at a time.

    Raises:
        QuantizeError: as ``quantize``.
    """
    columns = shape[-1] if shape else 1
    weights = _importance(importance, columns, name)
    _check_rows(columns, type_name, name)
    total = int(np.prod(shape, dtype=np.int64))
    starts = range(0, total, PIECE)

    def work(start: int, flat: torch.Tensor) -> Piece:
        values = _float32(flat)
        data = _quantized(values, type_name, weights, start, name)
        return Piece(data.reshape(-1), values.size, *_errors(values, data, type_name))

    tasks = ((start, read(start, min(start + PIECE, total))) for start in starts)
    return _in_order(work, tasks, threads)


def _in_order(
    work: Callable[[int, torch.Tensor], Piece], tasks: Iterable[tuple[int, torch.Tensor]], threads: int
) -> Iterator[Piece]:
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[Piece]] = deque()
        try:
            for task in tasks:
                waiting.append(pool.submit(work, *task))
                if len(waiting) >= 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def decoded(data: np.ndarray, type_name: str) -> np.ndarray:
    """float32 weights, flat, of the bytes of whole blocks of one of ``TYPES``."""
    flat = torch.from_numpy(data.reshape(-1))
    if type_name in FORMATS:
        block_format = FORMATS[type_name]
        return block_format.decode(flat.view(-1, block_format.block_bytes)).view(-1).numpy()
    dtype = STORED_TYPES_BY_NAME[type_name].dtype
    assert dtype is not None
    return flat.view(dtype).float().numpy()


def _float32(flat: torch.Tensor) -> np.ndarray:
    return flat.to(torch.float32).numpy()


def _importance(importance: np.ndarray | None, columns: int, name: str) -> np.ndarray | None:
    if importance is None:
        return None
    weights = np.asarray(importance, np.float32).reshape(-1)
    if weights.size != columns:
        raise QuantizeError(
            f"The importance matrix has {weights.size} columns for tensor {name!r}, which has {columns}: "
            "use one that was made for this model."
        )
    if not (np.isfinite(weights).all() and (weights >= 0).all()):
        raise QuantizeError(f"The importance of tensor {name!r} has negative or undefined values: make it again.")
    mean = weights.mean(dtype=np.float64)
    if mean <= 0:
        return None
    return (weights / mean + 1e-6).astype(np.float32)


def _check_rows(columns: int, type_name: str, name: str) -> None:
    block_size = STORED_TYPES_BY_NAME[type_name].block_size
    if columns % block_size:
        raise QuantizeError(
            f"Tensor {name!r} has rows of {columns} weights, and {type_name} stores blocks of {block_size}: "
            "keep it as F16 or choose a type with smaller blocks."
        )


def _quantized(flat: np.ndarray, type_name: str, importance: np.ndarray | None, start: int, name: str) -> np.ndarray:
    """Blocks of float32 weights that begin at position ``start`` of their tensor."""
    if not np.isfinite(flat).all():
        raise QuantizeError(
            f"Tensor {name!r} holds infinite or undefined weights (inf or NaN), which no quantised type can store: "
            "the file is damaged or its training failed."
        )
    if type_name in FLOAT_TYPES:
        return _as_floats(flat, type_name)
    stored = STORED_TYPES_BY_NAME[type_name]
    encode = ENCODERS[type_name]
    blocks = np.clip(flat, -_LARGEST, _LARGEST).reshape(-1, stored.block_size)
    result = np.empty((blocks.shape[0], stored.block_bytes), np.uint8)
    step = _TILE // stored.block_size
    for first in range(0, blocks.shape[0], step):
        tile = blocks[first : first + step]
        weights = None
        if importance is not None:
            begin = start + first * stored.block_size
            columns = np.arange(begin, begin + tile.size) % importance.size
            weights = importance[columns].reshape(tile.shape)
        result[first : first + step] = encode(tile, weights)
    return result


def _as_floats(flat: np.ndarray, type_name: str) -> np.ndarray:
    if type_name == "F16":
        halves = np.clip(flat, -65504, 65504).astype("<f2")
        return halves.view(np.uint8).reshape(-1, 2)
    if type_name == "F32":
        return flat.astype("<f4").view(np.uint8).reshape(-1, 4)
    bits = flat.view(np.uint32)
    rounded = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16
    return rounded.astype("<u2").view(np.uint8).reshape(-1, 2)


def _errors(values: np.ndarray, data: np.ndarray, type_name: str) -> tuple[float, float]:
    difference = decoded(data, type_name) - values
    with np.errstate(over="ignore"):
        return float(np.square(difference).sum(dtype=np.float64)), float(np.square(values).sum(dtype=np.float64))
