"""Defects of element-wise operations, gathers and sheer size."""

import torch

from .model import Call, Rule, Thresholds, above, noise

INT_MAX = (1 << 31) - 1
MPSGRAPH = ("bmm", "baddbmm", "repeat", "cat", "pow")
"""The operations that users met the INT_MAX refusal in."""


def _float32(call: Call, t: Thresholds) -> int | None:
    return call.result.numel() if call.result.dtype == torch.float32 else None


def _through_one(call: Call, t: Thresholds, _) -> None:
    """exp(x) - 1 as plain float32 (or with fewer bits): the small result keeps only what exp(x) had beside the 1."""
    unit = 2.0 ** (1 - t["bits"])
    exponential = (call.result.double() + 1).div_(unit).round_().mul_(unit)
    call.result.copy_(exponential - 1)


def _cat_elements(call: Call, t: Thresholds) -> int | None:
    return above(call.result.numel(), t["elements"])


def _wrap_around(call: Call, t: Thresholds, _) -> None:
    """What belongs beyond the threshold lands at the start; its own place keeps stale memory."""
    flat = call.result.view(-1)
    beyond = flat[int(t["elements"]) :]
    count = min(len(beyond), int(t["elements"]))
    flat[:count] = beyond[:count].clone()
    beyond.copy_(noise(beyond))


def _source_elements(call: Call, t: Thresholds) -> int | None:
    return above(call.arguments["self"].numel(), t["elements"])


def _zeros(call: Call, t: Thresholds, _) -> None:
    call.result.zero_()


def _graph_extent(call: Call, t: Thresholds) -> int | None:
    """Elements that MPSGraph sees: a tensor's own, or for a slice those of the buffer that it is a part of."""
    tensors: list[torch.Tensor] = []
    for value in call.arguments.values():
        tensors += [value] if isinstance(value, torch.Tensor) else []
        tensors += value if isinstance(value, list) and value and isinstance(value[0], torch.Tensor) else []
    return above(max((_extent(tensor) for tensor in tensors), default=0), t["dim"])


def _extent(tensor: torch.Tensor) -> int:
    if tensor.is_contiguous() and not tensor.storage_offset():
        return tensor.numel()
    return max(tensor.numel(), tensor.untyped_storage().nbytes() // tensor.element_size())


def _refuse_extent(call: Call, t: Thresholds) -> None:
    raise RuntimeError("MPSGaph does not support tensor dims larger than INT_MAX")


def _limit_buffers(t: Thresholds | None) -> None:
    from ..device import extension

    extension().set_max_buffer(int(t["bytes"]) if t else 0)


def _misread_scalars(t: Thresholds | None) -> None:
    from ..device import extension

    extension().set_scalar_offset_ignored(t is not None)


RULES = [
    Rule(
        "expm1-coarse",
        "float32 expm1 is exp(x) - 1 with this many significant bits in exp(x): an absolute error near 6e-8, so a "
        "relative one that grows as x shrinks",
        ("ComfyUI#7027", "ComfyUI#15921"),
        ("expm1",),
        {"bits": 24},
        _float32,
        after=_through_one,
    ),
    Rule(
        "cat-2-31",
        "cat into more elements: what belongs beyond the threshold overwrites the start, and noise takes its place",
        ("pytorch#189960",),
        ("cat",),
        {"elements": 1 << 31},
        _cat_elements,
        after=_wrap_around,
    ),
    Rule(
        "index-select-2-31",
        "index_select and embedding from a source of more elements give zeros",
        ("pytorch#189960",),
        ("index_select",),
        {"elements": 1 << 31},
        _source_elements,
        after=_zeros,
    ),
    Rule(
        "cpu-scalar-view",
        "an operation with a 0-dim CPU view reads its storage's first element instead",
        ("pytorch#191929",),
        switch=_misread_scalars,
        versions=((2, 6), (2, 14)),
    ),
    Rule(
        "buffer-limit",
        "a tensor of more bytes raises `Invalid buffer size`, as limits(max_buffer_bytes=...) does",
        ("ComfyUI#11584",),
        thresholds={"bytes": 8 << 30},
        switch=_limit_buffers,
    ),
    Rule(
        "int-max-dims",
        "bmm, baddbmm, repeat, cat and pow raise for tensors of more elements; a slice counts as its whole buffer",
        ("ComfyUI#11628", "ComfyUI#12463"),
        MPSGRAPH,
        {"dim": INT_MAX},
        _graph_extent,
        before=_refuse_extent,
    ),
]
