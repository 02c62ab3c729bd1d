"""Convolutions refuse more than 65,536 output channels, and 1-D ones any longer output.

Before macOS 15 the MPS backend raises "Output channels > 65536 not supported" as soon as one dimension of the result is
larger (pytorch#129207 for the wrong results before that, #144445, #152278), which audio decoders reach by length. The
cure computes ranges of channels, or of output positions with the input that they need, and joins them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import gate, probing
from .registry import Cure, Defect, Function, ProbeResult

ID = "conv-output-channels"


@dataclass(frozen=True)
class Options:
    """How a convolution is done, with torch's names; ``output_padding`` belongs to transposed ones."""

    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    groups: int = 1
    output_padding: Any = 0

    def convolve(self, function: Function, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``function`` is conv1d or conv2d."""
        return function(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def transpose(self, function: Function, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``function`` is conv_transpose1d or conv_transpose2d."""
        rest = (self.stride, self.padding, self.output_padding, self.groups, self.dilation)
        return function(input, weight, bias, *rest)


_CONV = ("stride", "padding", "dilation", "groups")
_TRANSPOSED = ("stride", "padding", "output_padding", "groups", "dilation")


def reference(input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
    """``torch.nn.functional.conv1d`` or ``conv2d`` (by the weight's rank), in pieces within the limit."""
    convolve = torch.nn.functional.conv1d if weight.dim() == 3 else torch.nn.functional.conv2d
    return _conv(convolve, input, weight, bias, Options(**dict(zip(_CONV, args)), **kwargs))


def reference_transposed(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    """``conv_transpose1d`` or ``conv_transpose2d`` (by the weight's rank), in pieces within the limit."""
    functional = torch.nn.functional
    convolve = functional.conv_transpose1d if weight.dim() == 3 else functional.conv_transpose2d
    return _conv_transposed(convolve, input, weight, bias, Options(**dict(zip(_TRANSPOSED, args)), **kwargs))


def _by_channels(
    compute: Callable[..., Tensor], input: Tensor, weight: Tensor, bias: Tensor | None, groups: int, transposed: bool
) -> Tensor:
    """Join ``compute(input, weight, bias, groups)`` over ranges of output channels, whole groups where it can."""
    limit, channel_dim = gate.LIMITS[ID], 1 - weight.dim()
    of_group = weight.size(1) if transposed else weight.size(0) // groups
    taken = input.size(channel_dim) // groups
    pieces = []
    if groups == 1:
        for start, length in gate.ranges(of_group, limit):
            part = weight.narrow(1 if transposed else 0, start, length).contiguous()
            pieces.append(compute(input, part, None if bias is None else bias.narrow(0, start, length), 1))
    else:
        for start, length in gate.ranges(groups, max(1, limit // of_group)):
            part = input.narrow(channel_dim, start * taken, length * taken)
            rows = (start * taken, length * taken) if transposed else (start * of_group, length * of_group)
            part_bias = None if bias is None else bias.narrow(0, start * of_group, length * of_group)
            pieces.append(compute(part, weight.narrow(0, *rows), part_bias, length))
    return torch.cat(pieces, channel_dim)


def _conv(original: Function, input: Tensor, weight: Tensor, bias: Tensor | None, options: Options) -> Tensor:
    limit = gate.LIMITS[ID]
    if weight.size(0) > limit:

        def compute(input: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
            return _conv(original, input, weight, bias, replace(options, groups=groups))

        return _by_channels(compute, input, weight, bias, options.groups, False)
    total = _length(input, weight, options) if weight.dim() == 3 else 0
    if total <= limit:
        return options.convolve(original, input, weight, bias)
    step, spread = _one(options.stride), _one(options.dilation) * (weight.size(-1) - 1)
    before = _sides(options.padding, spread)[0]
    pieces = []
    for start, length in gate.ranges(total, limit):
        first = start * step - before
        last = (start + length - 1) * step - before + spread + 1
        part = input[..., max(first, 0) : max(min(last, input.size(-1)), 0)]
        part = torch.nn.functional.pad(part, (max(-first, 0), max(last - max(input.size(-1), first), 0)))
        pieces.append(replace(options, padding=0).convolve(original, part, weight, bias))
    return torch.cat(pieces, -1)


def _conv_transposed(
    original: Function, input: Tensor, weight: Tensor, bias: Tensor | None, options: Options
) -> Tensor:
    limit = gate.LIMITS[ID]
    if weight.size(1) * options.groups > limit:

        def compute(input: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
            return _conv_transposed(original, input, weight, bias, replace(options, groups=groups))

        return _by_channels(compute, input, weight, bias, options.groups, True)
    if weight.dim() > 3:
        return options.transpose(original, input, weight, bias)
    step, before = _one(options.stride), _one(options.padding)
    spread = _one(options.dilation) * (weight.size(-1) - 1)
    total = (input.size(-1) - 1) * step - 2 * before + spread + _one(options.output_padding) + 1
    if total <= limit:
        return options.transpose(original, input, weight, bias)
    bare = replace(options, padding=0, output_padding=0)
    pieces = []
    for start, length in gate.ranges(total, max(1, limit - 2 * (spread + step))):
        low = max(0, -(-(start + before - spread) // step))
        high = min(input.size(-1) - 1, (start + length - 1 + before) // step)
        part = bare.transpose(original, input[..., low : high + 1], weight, None)
        offset = start + before - low * step
        piece = part[..., max(offset, 0) : offset + length]
        pieces.append(torch.nn.functional.pad(piece, (max(-offset, 0), length - max(-offset, 0) - piece.size(-1))))
    output = torch.cat(pieces, -1)
    return output if bias is None else output + bias[:, None]


def _one(value: Any) -> int:
    """A number given as such or as a list of one."""
    return value[0] if isinstance(value, (list, tuple)) else value


def _sides(padding: Any, spread: int) -> tuple[int, int]:
    """Zeros before and after, as conv1d understands ``padding``."""
    if padding == "same":
        return spread // 2, spread - spread // 2
    count = 0 if padding == "valid" else _one(padding)
    return count, count


def _length(input: Tensor, weight: Tensor, options: Options) -> int:
    spread = _one(options.dilation) * (weight.size(-1) - 1)
    return (input.size(-1) + sum(_sides(options.padding, spread)) - spread - 1) // _one(options.stride) + 1


def _make_conv(original: Function) -> Function:
    def cured(input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        large = gate.acts_on(weight) and _sound(input, weight)
        if large and max(weight.size(0), input.size(-1)) > gate.LIMITS[ID] // 2 and _known(_CONV, args, kwargs):
            return _conv(original, input, weight, bias, Options(**dict(zip(_CONV, args)), **kwargs))
        return original(input, weight, bias, *args, **kwargs)

    return cured


def _make_transposed(original: Function) -> Function:
    def cured(input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        if gate.acts_on(weight) and _sound(input, weight) and _known(_TRANSPOSED, args, kwargs):
            return _conv_transposed(original, input, weight, bias, Options(**dict(zip(_TRANSPOSED, args)), **kwargs))
        return original(input, weight, bias, *args, **kwargs)

    return cured


def _known(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the arguments are those of the convolution, each given once; others are left to the original."""
    return len(args) <= len(names) and set(kwargs) <= set(names[len(args) :])


def _sound(input: Any, weight: Tensor) -> bool:
    return gate.acts_on(input) and gate.plain(input, weight) and input.dim() in (weight.dim(), weight.dim() - 1)


def probe(device: torch.device, quick: bool) -> ProbeResult:
    """Give conv1d, transposed and not, one output channel and one output position too many."""
    size = gate.LIMITS[ID] + 1
    wide, tall = probing.noise((size, 1, 1)), probing.noise((1, 1, 2), seed=1)
    long = probing.noise((1, 1, size + 2), seed=2)
    cases: list[tuple[Function, Tensor, Tensor]] = [
        (torch.nn.functional.conv1d, tall, wide),
        (torch.nn.functional.conv1d, long, tall),
    ]
    if not quick:
        cases += [
            (torch.nn.functional.conv_transpose1d, tall, wide.transpose(0, 1).contiguous()),
            (torch.nn.functional.conv_transpose1d, long, tall),
        ]
    results = []
    for convolve, input, weight in cases:
        expected = convolve(input, weight)
        compute = partial(convolve, input.to(device), weight.to(device))
        results.append(probing.compare(compute, expected, 1e-5, f"{convolve.__name__} to {tuple(expected.shape)}"))
    return probing.worst(results)


DEFECTS = (
    Defect(
        id=ID,
        title="Convolutions stop at 65,536 channels or positions",
        symptom='"Output channels > 65536 not supported at the MPS device" (audio VAEs and vocoders)',
        trigger="a convolution with more than 65,536 output channels, or a 1-D one with a longer output",
        cause="a 16-bit extent in Apple's convolution kernels",
        affected="macOS 14 and older (reported on 14.8); lifted on macOS 15",
        upstream=("pytorch#144445", "pytorch#152278", "pytorch#129207"),
        seam="torch.nn.functional.conv1d, conv2d, conv_transpose1d, conv_transpose2d, the same of torch",
        advice="Leave the patch on, or update macOS.",
        probe=probe,
        cure=Cure(
            targets=tuple(
                (path, name)
                for path in ("torch.nn.functional", "torch")
                for name in ("conv1d", "conv2d", "conv_transpose1d", "conv_transpose2d")
            ),
            make={
                "conv1d": _make_conv,
                "conv2d": _make_conv,
                "conv_transpose1d": _make_transposed,
                "conv_transpose2d": _make_transposed,
            },
        ),
        reference="conv_output_channels.reference",
    ),
)
