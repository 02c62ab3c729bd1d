"""Defects of padding, interpolation, normalisation and convolution."""

from typing import Any

import torch

from .model import HALF, Call, Rule, Thresholds, above, at_least, noise


def _inner_extent(call: Call, t: Thresholds) -> int | None:
    x = call.arguments["self"]
    if x.dim() != 5 or not any(_padding(call)):
        return None
    return at_least(x.shape[-2] * x.shape[-1], t["inner"])


def _padding(call: Call) -> list[int]:
    """The amounts, whose name differs between constant and other padding."""
    return call.arguments["pad" if "pad" in call.arguments else "padding"]


def _pad_over_the_first_frame(call: Call, t: Thresholds, _) -> None:
    pad = _padding(call)
    front = max(pad[4], 0) if len(pad) > 4 else 0
    call.result.narrow(2, front, 1).fill_(call.arguments.get("value", 0.0))


def _half_input(call: Call, t: Thresholds) -> int | None:
    return call.result.numel() if call.result.dtype in HALF else None


def _zeros(call: Call, t: Thresholds, _) -> None:
    call.result.zero_()


def _nearest_exact_index(old: int, new: int, factor: float | None) -> tuple[torch.Tensor, bool]:
    """Source indices when a position that falls exactly on a boundary is rounded down, and whether any does."""
    step = 1 / factor if factor else old / new
    position = (torch.arange(new, dtype=torch.float64) + 0.5) * step
    boundary = ((position - position.round()).abs() < 1e-6) & (position.round() >= 1)
    index = torch.where(boundary, position.round() - 1, (position + 1e-9).floor()).long().clamp(max=old - 1)
    return index, bool(boundary.any())


def _source(call: Call) -> torch.Tensor:
    """The input, whose name differs between an operation's variants."""
    return call.arguments["self" if "self" in call.arguments else "input"]


def _nearest_exact_indices(call: Call) -> list[tuple[torch.Tensor, bool]]:
    a = call.arguments
    x = _source(call)
    dims = x.dim() - 2
    names = ("scales",) if dims == 1 else ("scales_d", "scales_h", "scales_w")[-dims:]
    factors = a["scale_factors"] if a.get("scale_factors") else [a.get(name) for name in names]
    return [_nearest_exact_index(*entry) for entry in zip(x.shape[2:], call.result.shape[2:], factors)]


def _boundary_positions(call: Call, t: Thresholds) -> int | None:
    return call.result.numel() if any(hit for _, hit in _nearest_exact_indices(call)) else None


def _one_pixel_too_low(call: Call, t: Thresholds, _) -> None:
    x = _source(call)
    for dim, (index, _hit) in enumerate(_nearest_exact_indices(call), start=2):
        x = x.index_select(dim, index)
    call.result.copy_(x)


def _norm_rows(call: Call, t: Thresholds) -> int | None:
    return above(_rows(call).shape[0], t["rows"])


def _rows(call: Call) -> torch.Tensor:
    shape = call.arguments["normalized_shape"]
    return call.result.flatten(0, -1 - len(shape)) if call.result.dim() > len(shape) else call.result[None]


def _garbage_rows(call: Call, t: Thresholds, _) -> None:
    rows = _rows(call)[int(t["rows"]) :]
    rows.copy_(noise(rows) * 1e4)


def _sliced_weight(call: Call, t: Thresholds) -> int | None:
    weight = call.arguments["weight"]
    if weight.dim() != 4 or call.arguments["transposed"] or _dense(weight):
        return None
    return weight.numel()


def _dense(tensor: torch.Tensor) -> bool:
    """Whether the tensor fills one piece of memory, in whatever order of dims."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _ignore_the_strides(call: Call, t: Thresholds) -> None:
    weight = call.arguments["weight"]
    held = weight.untyped_storage().nbytes() // weight.element_size()
    strides = torch.empty(weight.shape, device="meta").stride()
    call.arguments["weight"] = weight.as_strided(
        weight.shape, strides, min(weight.storage_offset(), held - weight.numel())
    )


def _long_output(call: Call, t: Thresholds) -> int | None:
    a = call.arguments
    weight = a["weight"]
    channels = weight.shape[1] * a["groups"] if a["transposed"] else weight.shape[0]
    return above(channels, t["channels"]) or above(_output_length(a), t["length"])


def _output_length(a: dict[str, Any]) -> int:
    """The output's last dim (output_padding aside); torch runs a 1-D convolution as a 2-D one of height 1."""
    length, kernel = a["input"].shape[-1], (a["weight"].shape[-1] - 1) * a["dilation"][-1] + 1
    if a["transposed"]:
        return (length - 1) * a["stride"][-1] - 2 * a["padding"][-1] + kernel
    return (length + 2 * a["padding"][-1] - kernel) // a["stride"][-1] + 1


def _refuse_channels(call: Call, t: Thresholds) -> None:
    raise NotImplementedError(
        "Output channels > 65536 not supported at the MPS device. As a temporary fix, you can set the environment "
        "variable `PYTORCH_ENABLE_MPS_FALLBACK=1` to use the CPU as a fallback for this op."
    )


def _conv3d_on_macos_26_2(call: Call, t: Thresholds) -> int | None:
    from ..device import macos_version

    three = call.arguments["weight"].dim() == 5 and not call.arguments["transposed"]
    return call.result.numel() if three and macos_version() == (26, 2) else None


RULES = [
    Rule(
        "pad-rank-5",
        "padding of a rank-5 tensor whose last two dims hold this many elements or more: the fill value, or zero in "
        "the replicate and reflect modes, overwrites the first frame of the data",
        ("pytorch#194922", "ComfyUI#16433"),
        ("constant_pad_nd", "replication_pad3d", "reflection_pad3d"),
        {"inner": 65536},
        _inner_extent,
        after=_pad_over_the_first_frame,
        versions=((2, 6), (2, 15)),
    ),
    Rule(
        "interpolate-half-5d",
        "nearest interpolation of a 5-D half-precision tensor gives zeros",
        ("LatentSync#48",),
        ("upsample_nearest3d",),
        {},
        _half_input,
        after=_zeros,
    ),
    Rule(
        "nearest-exact-rounding",
        "nearest-exact takes the source one too low where the position falls exactly on a boundary (20 -> 11)",
        ("pytorch#134430",),
        ("_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d"),
        {},
        _boundary_positions,
        after=_one_pixel_too_low,
    ),
    Rule(
        "rms-norm-rows",
        "fused rms_norm (torch 2.8) over more rows: the rows beyond hold garbage of size 1e4",
        (),
        ("_fused_rms_norm",),
        {"rows": 1 << 21},
        _norm_rows,
        after=_garbage_rows,
        versions=((2, 8), (99, 0)),
    ),
    Rule(
        "conv-sliced-weight",
        "conv2d reads a sliced, non-contiguous weight as if it were contiguous",
        ("pytorch#192212",),
        ("convolution",),
        {},
        _sliced_weight,
        before=_ignore_the_strides,
        versions=((2, 6), (2, 14)),
    ),
    Rule(
        "conv-output-channels",
        "a convolution raises for more output channels or, in effect a 1-D one, for a longer last dim of the output",
        (),
        ("convolution",),
        {"channels": 65536, "length": 65536},
        _long_output,
        before=_refuse_channels,
    ),
    Rule(
        "conv3d-macos-26-2",
        "conv3d is wrong on macOS 26.2; only reported",
        ("pytorch#197114",),
        ("convolution",),
        {},
        _conv3d_on_macos_26_2,
    ),
]
