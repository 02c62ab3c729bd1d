"""Convolutions refuse more than 65,536 output channels, and 1-D ones any longer output.

Before macOS 15 the MPS backend raises "Output channels > 65536 not supported" as soon as one dimension of the result is
larger (pytorch#129207 for the wrong results before that, #144445, #152278), which audio decoders reach by length. The
cure computes ranges of channels, or of output positions with the input that they need, and joins them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import gate, probing
from .registry import Cure, Defect, Function, ProbeResult

ID = "conv-output-channels"


def reference(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """``torch.nn.functional.conv1d`` or ``conv2d`` (by the weight's rank) in pieces within the limit."""
    convolve = torch.nn.functional.conv1d if weight.dim() == 3 else torch.nn.functional.conv2d
    return _conv(convolve, input, weight, bias, stride, padding, dilation, groups)


def reference_transposed(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Tensor:
    """``conv_transpose1d`` or ``conv_transpose2d`` (by the weight's rank) in pieces within the limit."""
    functional = torch.nn.functional
    convolve = functional.conv_transpose1d if weight.dim() == 3 else functional.conv_transpose2d
    return _conv_transposed(convolve, input, weight, bias, stride, padding, output_padding, groups, dilation)


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


def _conv(
    original: Function,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
) -> Tensor:
    if weight.size(0) > gate.LIMITS[ID]:

        def compute(input: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
            return _conv(original, input, weight, bias, stride, padding, dilation, groups)

        return _by_channels(compute, input, weight, bias, groups, False)
    if weight.dim() == 3 and (total := _length(input, weight, stride, padding, dilation)) > gate.LIMITS[ID]:
        step, spread = _one(stride), _one(dilation) * (weight.size(-1) - 1)
        before = _sides(padding, spread)[0]
        pieces = []
        for start, length in gate.ranges(total, gate.LIMITS[ID]):
            first = start * step - before
            last = (start + length - 1) * step - before + spread + 1
            part = input[..., max(first, 0) : max(min(last, input.size(-1)), 0)]
            part = torch.nn.functional.pad(part, (max(-first, 0), max(last - max(input.size(-1), first), 0)))
            pieces.append(original(part, weight, bias, stride, 0, dilation, groups))
        return torch.cat(pieces, -1)
    return original(input, weight, bias, stride, padding, dilation, groups)


def _conv_transposed(
    original: Function,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    output_padding: Any,
    groups: int,
    dilation: Any,
) -> Tensor:
    if weight.size(1) * groups > gate.LIMITS[ID]:

        def compute(input: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
            return _conv_transposed(original, input, weight, bias, stride, padding, output_padding, groups, dilation)

        return _by_channels(compute, input, weight, bias, groups, True)
    if weight.dim() > 3:
        return original(input, weight, bias, stride, padding, output_padding, groups, dilation)
    step, before, spread = _one(stride), _one(padding), _one(dilation) * (weight.size(-1) - 1)
    total = (input.size(-1) - 1) * step - 2 * before + spread + _one(output_padding) + 1
    limit = gate.LIMITS[ID]
    if total <= limit:
        return original(input, weight, bias, stride, padding, output_padding, groups, dilation)
    pieces = []
    for start, length in gate.ranges(total, max(1, limit - 2 * (spread + step))):
        low = max(0, -(-(start + before - spread) // step))
        high = min(input.size(-1) - 1, (start + length - 1 + before) // step)
        part = original(input[..., low : high + 1], weight, None, stride, 0, 0, groups, dilation)
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


def _length(input: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any) -> int:
    spread = _one(dilation) * (weight.size(-1) - 1)
    return (input.size(-1) + sum(_sides(padding, spread)) - spread - 1) // _one(stride) + 1


def _make_conv(original: Function) -> Function:
    def cured(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        large = gate.acts_on(weight) and max(weight.size(0), input.size(-1)) > gate.LIMITS[ID] // 2
        if large and _sound(input, weight):
            return _conv(original, input, weight, bias, stride, padding, dilation, groups)
        return original(input, weight, bias, stride, padding, dilation, groups)

    return cured


def _make_transposed(original: Function) -> Function:
    def cured(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Tensor:
        if gate.acts_on(weight) and _sound(input, weight):
            return _conv_transposed(original, input, weight, bias, stride, padding, output_padding, groups, dilation)
        return original(input, weight, bias, stride, padding, output_padding, groups, dilation)

    return cured


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
