"""What a ggml block format is, and where its blocks keep their scales.

A quantised tensor is a sequence of blocks of ``block_bytes`` bytes, each holding ``block_size`` consecutive weights of
one row. Names, type ids and layouts are ggml's (ggml-common.h, gguf-py's quants.py).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class HalfField:
    """A float16 at byte ``offset`` of every block."""

    offset: int

    def write(self, blocks: Tensor, values: Tensor, generator: torch.Generator) -> None:
        """Store ``values`` (float32 [n_blocks]) in ``blocks`` (uint8 [n_blocks, block_bytes])."""
        blocks[:, self.offset : self.offset + 2] = values.half().view(torch.uint8).view(-1, 2)


@dataclass(frozen=True)
class SplitHalfField:
    """A float16 cut into four nibbles, lowest first: the top nibbles of four 16-bit words at byte ``offset``."""

    offset: int

    def write(self, blocks: Tensor, values: Tensor, generator: torch.Generator) -> None:
        """Store ``values`` (float32 [n_blocks]); the other twelve bits of the words stay."""
        half = values.half().view(torch.uint8).view(-1, 2)
        nibbles = torch.stack((half & 0x0F, half >> 4), dim=-1).view(-1, 4)
        high_bytes = blocks[:, self.offset + 1 : self.offset + 8 : 2]
        high_bytes.copy_((high_bytes & 0x0F) | (nibbles << 4))


@dataclass(frozen=True)
class CodeField:
    """``count`` one-byte scales at byte ``offset``: indices into ``values``, of which the first ``usable`` ascend."""

    offset: int
    count: int
    values: tuple[float, ...]
    usable: int

    def write(self, blocks: Tensor, values: Tensor, generator: torch.Generator) -> None:
        """Store, for every |value|, one of its two neighbours at random, so that the mean square is kept."""
        squares = torch.tensor(self.values[: self.usable], dtype=torch.float64).square()
        target = values.double().square()[:, None].expand(-1, self.count).contiguous()
        upper = torch.searchsorted(squares, target).clamp_(1, self.usable - 1)
        low, high = squares[upper - 1], squares[upper]
        noise = torch.rand(target.shape, generator=generator, dtype=torch.float64)
        codes = torch.where((target - low) / (high - low) > noise, upper, upper - 1)
        blocks[:, self.offset : self.offset + self.count] = codes.to(torch.uint8)


@dataclass(frozen=True)
class BFloat16Field:
    """The whole block is one bfloat16."""

    def write(self, blocks: Tensor, values: Tensor, generator: torch.Generator) -> None:
        """Store ``values`` (float32 [n_blocks]), rounded."""
        blocks.copy_(values.bfloat16().view(torch.uint8).view(-1, 2))


ScaleField = HalfField | SplitHalfField | CodeField | BFloat16Field


@dataclass(frozen=True)
class BlockFormat:
    """One row of the table of formats.

    ``decode_into(blocks, out)`` reads uint8 [n, block_bytes] at any storage offset and writes the weights into ``out``,
    a contiguous [n, block_size] of float32, float16 or bfloat16 on the same device: computed in float32, rounded once.
    ``scale`` and ``minimum`` say where the block's two factors are stored (``minimum``: of the minimums or offsets).
    """

    name: str
    type_id: int
    block_size: int
    block_bytes: int
    decode_into: Callable[[Tensor, Tensor], None]
    scale: ScaleField
    minimum: HalfField | None = None

    def decode(self, blocks: Tensor) -> Tensor:
        """Decode uint8 [n, block_bytes] to float32 [n, block_size] on the same device."""
        out = torch.empty(blocks.shape[0], self.block_size, dtype=torch.float32, device=blocks.device)
        self.decode_into(blocks, out)
        return out
