"""A weight that stays in its quantised blocks and behaves like an ordinary floating-point tensor.

``QuantizedWeight`` reports the logical shape and the compute dtype, so code that reads ``weight.shape`` or casts
to ``weight.dtype`` is right (a weight that reports uint8 breaks it, see ComfyUI-GGUF issue 454). The blocks are
never written: every operation without a rule below decodes its operands and runs on the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map

from . import mapped_pages
from .formats import BlockFormat, dequantize, dequantize_rows
from .scaled_formats import ScaledFormat, Scales, dequantize_scaled, dequantize_scaled_rows

aten = torch.ops.aten


@dataclass(frozen=True)
class PlainFormat:
    """An unquantised type, under ggml's name, for weights that lie dense in a file."""

    name: str
    dtype: torch.dtype


PLAIN_FORMATS: dict[torch.dtype, PlainFormat] = {
    torch.float32: PlainFormat("F32", torch.float32),
    torch.float16: PlainFormat("F16", torch.float16),
    torch.bfloat16: PlainFormat("BF16", torch.bfloat16),
}

WeightFormat = BlockFormat | PlainFormat | ScaledFormat


class QuantizedWeight(torch.Tensor):
    """Quantised blocks with the face of a dense tensor.

    Args:
        blocks: uint8, the blocks of all rows one after another; any device; never written to.
        block_format: how to decode them.
        shape: logical shape; as a whole, and usually in each row, a whole number of blocks.
        dtype: the floating-point dtype reported and decoded to by default.
        home: the blocks as they lie in the file (a view of the mapping). Moving back to the CPU returns to these
            instead of copying from the device.
        scales: factors of a ScaledFormat that has any, on the device of the blocks.
    """

    _blocks: torch.Tensor
    _format: WeightFormat
    _home: torch.Tensor | None
    _scales: Scales | None

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls,
        blocks: torch.Tensor,
        block_format: WeightFormat,
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        home: torch.Tensor | None = None,
        scales: Scales | None = None,
    ) -> QuantizedWeight:
        self = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, tuple(shape), dtype=dtype, device=blocks.device, requires_grad=False
        )
        self._blocks = blocks
        self._format = block_format
        self._home = blocks if home is None and blocks.device.type == "cpu" else home
        self._scales = scales
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    @classmethod
    def from_dense(cls, tensor: torch.Tensor, dtype: torch.dtype) -> QuantizedWeight:
        """Wrap a float32, float16 or bfloat16 tensor without copying it; ``dtype`` is what the weight reports."""
        block_format = PLAIN_FORMATS[tensor.dtype]
        return cls(tensor.contiguous().view(-1).view(torch.uint8), block_format, tensor.shape, dtype)

    @property
    def blocks(self) -> torch.Tensor:
        """The quantised bytes (uint8)."""
        return self._blocks

    @property
    def block_format(self) -> WeightFormat:
        """The entry of the table of block formats that describes the bytes."""
        return self._format

    @property
    def scales(self) -> Scales | None:
        """Factors that lie beside the bytes (safetensors); None for blocks that hold their own, and where none are."""
        return self._scales

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes really held, so that memory accounting sees the quantised size."""
        return self._blocks.nbytes + (self._scales.nbytes if self._scales is not None else 0)

    def dequantize(  # type: ignore[override]
        self, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> torch.Tensor:
        """Return the dense weight. It may share memory with a plain file tensor: treat it as read-only."""
        dtype = dtype or self.dtype
        blocks = self._blocks if device is None else self._blocks.to(device)
        if isinstance(self._format, PlainFormat):
            return blocks.view(-1).view(self._format.dtype).view(self.shape).to(dtype)
        if isinstance(self._format, ScaledFormat):
            return dequantize_scaled(blocks, self._format, self.shape, self._scales_on(blocks.device), dtype)
        return dequantize(blocks, self._format, (self.numel(),), dtype).view(self.shape)

    def dequantize_rows(self, rows: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Decode only ``rows`` (integer indices of any shape) of a 2-D weight: ``[*rows.shape, columns]``."""
        dtype = dtype or self.dtype
        if isinstance(self._format, PlainFormat):
            table = self._blocks.view(-1).view(self._format.dtype).view(self.shape)
            return torch.nn.functional.embedding(rows, table).to(dtype)
        if isinstance(self._format, ScaledFormat):
            return dequantize_scaled_rows(self._blocks, self._format, tuple(self.shape), rows, self._scales, dtype)
        return dequantize_rows(self._blocks, self._format, tuple(self.shape), rows, dtype)

    def with_dtype(self, dtype: torch.dtype) -> QuantizedWeight:
        """The same blocks, reporting another dtype."""
        return QuantizedWeight(self._blocks, self._format, self.shape, dtype, self._home, self._scales)

    def _scales_on(self, device: torch.device) -> Scales | None:
        return None if self._scales is None else self._scales.to(device)

    def on_device(self, device: torch.device) -> QuantizedWeight:
        """The same weight on ``device``; on the CPU the blocks of the file are used again."""
        if device == self.device or (device.type == self.device.type and device.index is None):
            return self
        at_home = device.type == "cpu" and self._home is not None
        blocks = self._home if at_home else self._blocks.to(device)
        assert blocks is not None
        if device.type != "cpu" and self._home is not None:
            mapped_pages.release(self._home)
        return QuantizedWeight(blocks, self._format, self.shape, self.dtype, self._home, self._scales_on(device))

    def rows_are_blocks(self) -> bool:
        """Whether each row (first dimension) is a whole number of blocks, so that rows can be taken as they are."""
        size = self._format.block_size if isinstance(self._format, BlockFormat) else 1
        return self.dim() > 0 and self.shape[1:].numel() % size == 0

    def rows(self, start: int, stop: int) -> QuantizedWeight:
        """A view of rows ``start`` to ``stop``, still quantised; for weights whose rows are blocks."""
        row_bytes = self._blocks.numel() // self.shape[0]
        cut = slice(start * row_bytes, stop * row_bytes)
        home = None if self._home is None else self._home.reshape(-1)[cut]
        shape = (stop - start, *self.shape[1:])
        scales = None if self._scales is None else self._scales.cut(start, stop)
        return QuantizedWeight(self._blocks.reshape(-1)[cut], self._format, shape, self.dtype, home, scales)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return (
            f"QuantizedWeight({self._format.name}, shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"
        )

    def __deepcopy__(self, memo: dict) -> QuantizedWeight:
        return memo.setdefault(id(self), self.with_dtype(self.dtype))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        rule = _RULES.get(func)
        if rule is not None:
            result = rule(*args, **kwargs)
            if result is not NotImplemented:
                return result
        for argument, value in zip(func._schema.arguments, args):
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, cls):
                raise RuntimeError(
                    f"A {value._format.name} weight is read-only ({func} would write to it): "
                    "apply the change to its decoded copy, weight.dequantize()."
                )
        args, kwargs = tree_map(_decoded, (args, kwargs))
        return func(*args, **kwargs)


def _decoded(value: Any) -> Any:
    return value.dequantize() if isinstance(value, QuantizedWeight) else value


def _alias(weight: QuantizedWeight, **_: Any) -> QuantizedWeight:
    return weight.with_dtype(weight.dtype)


def _to_copy(
    weight: QuantizedWeight, *, dtype: torch.dtype | None = None, device: Any = None, **_: Any
) -> torch.Tensor:
    target = torch.device(device) if device is not None else weight.device
    if dtype is None or dtype == weight.dtype:
        return weight.on_device(target).with_dtype(weight.dtype)
    dense = weight.dequantize(dtype, target)
    return dense.clone() if isinstance(weight._format, PlainFormat) else dense


def _copy_(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> Any:
    if not isinstance(target, QuantizedWeight):
        assert isinstance(source, QuantizedWeight)
        return target.copy_(source.on_device(target.device).dequantize(target.dtype))
    if isinstance(source, QuantizedWeight) and source._format is target._format and source.shape == target.shape:
        moved = source.on_device(target.device)
        target._blocks, target._home, target._scales = moved._blocks, moved._home, moved._scales
        return target
    return NotImplemented


def _like(create: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def rule(weight: QuantizedWeight, *args: Any, **kwargs: Any) -> torch.Tensor:
        meta = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
        kwargs["device"] = kwargs.get("device") or weight.device
        return create(meta, *args, **kwargs)

    return rule


def _slice(
    weight: QuantizedWeight, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Any:
    if dim % weight.dim() != 0 or step != 1 or not weight.rows_are_blocks():
        return NotImplemented
    first, last, _ = slice(start, end).indices(weight.shape[0])
    return weight.rows(first, max(first, last))


def _split(weight: QuantizedWeight, sizes: int | Sequence[int], dim: int = 0) -> Any:
    if dim % weight.dim() != 0 or not weight.rows_are_blocks():
        return NotImplemented
    count = weight.shape[0]
    if isinstance(sizes, int):
        sizes = [min(sizes, count - start) for start in range(0, count, sizes)]
    parts, start = [], 0
    for size in sizes:
        parts.append(weight.rows(start, start + size))
        start += size
    return parts


def _embedding(weight: torch.Tensor, indices: torch.Tensor, *_: Any) -> Any:
    if not isinstance(weight, QuantizedWeight) or not weight.rows_are_blocks():
        return NotImplemented
    return weight.dequantize_rows(indices)


def _index_select(weight: QuantizedWeight, dim: int, index: torch.Tensor) -> Any:
    by_row = weight.dim() == 2 and dim % 2 == 0 and weight.rows_are_blocks()
    return weight.dequantize_rows(index) if by_row else NotImplemented


_RULES: dict[Any, Callable[..., Any]] = {
    aten.detach.default: _alias,
    aten.alias.default: _alias,
    aten.clone.default: _alias,
    aten._to_copy.default: _to_copy,
    aten.copy_.default: _copy_,
    aten.empty_like.default: _like(torch.empty_like),
    aten.zeros_like.default: _like(torch.zeros_like),
    aten.ones_like.default: _like(torch.ones_like),
    aten.rand_like.default: _like(torch.rand_like),
    aten.randn_like.default: _like(torch.randn_like),
    aten.full_like.default: _like(torch.full_like),
    aten.slice.Tensor: _slice,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.embedding.default: _embedding,
    aten.index_select.default: _index_select,
}
