"""What a rule is: one known defect of a real MPS backend, added to the simulated device on request."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

HALF = (torch.float16, torch.bfloat16)
Thresholds = Mapping[str, float]


@dataclass
class Call:
    """One call of an operation, seen by the rules.

    `arguments` and `results` are CPU tensors over the device's memory: writing to a result changes what the caller
    gets, assigning to an argument's name changes what the operation reads. In dry mode they are meta tensors.
    """

    operation: str
    arguments: dict[str, Any]
    results: list[torch.Tensor] = field(default_factory=list)

    @property
    def result(self) -> torch.Tensor:
        """The first result."""
        return self.results[0]


@dataclass(frozen=True)
class Rule:
    """A defect.

    `trigger` gives the size that made the defect appear (elements, rows, keys, ... as `thresholds` says), None where
    it does not. `before` runs ahead of the operation and may change arguments, raise, or return something for
    `after`, which spoils the results in place. A rule with neither is only reported. A rule with `switch` changes
    the device itself instead. `versions` are the torch versions (first, first without) that have the defect,
    as far as known; dry mode reports a rule only for op tables among them.
    """

    name: str
    effect: str
    upstream: tuple[str, ...]
    operations: tuple[str, ...] = ()
    thresholds: dict[str, float] = field(default_factory=dict)
    trigger: Callable[[Call, Thresholds], int | None] | None = None
    before: Callable[[Call, Thresholds], Any] | None = None
    after: Callable[[Call, Thresholds, Any], None] | None = None
    switch: Callable[[Thresholds | None], None] | None = None
    versions: tuple[tuple[int, int], tuple[int, int]] = ((2, 6), (99, 0))


def above(size: int, limit: float) -> int | None:
    """The size if it is beyond the limit."""
    return size if size > limit else None


def at_least(size: int, limit: float) -> int | None:
    """The size if it reaches the limit."""
    return size if size >= limit else None


def noise(like: torch.Tensor) -> torch.Tensor:
    """Numbers in [-1, 1] without structure, the same for every tensor of this shape; float32."""
    index = torch.arange(like.numel(), dtype=torch.float64)
    wave = (index * 12.9898 + 78.233).sin() * 43758.5453
    return ((wave - wave.floor()) * 2 - 1).float().reshape(like.shape)


def spoil_with_noise(tensor: torch.Tensor) -> None:
    """Replace a tensor by noise of its own root mean square (at least 1e-3)."""
    level = tensor.float().square().mean().sqrt().nan_to_num(1.0).clamp(min=1e-3)
    tensor.copy_(noise(tensor) * level * 3**0.5)
