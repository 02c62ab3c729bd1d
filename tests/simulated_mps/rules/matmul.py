"""Defects of matrix products: mm, addmm, bmm, baddbmm, linear."""

import torch

from .model import Call, Rule, Thresholds, above, at_least, noise

LEFT = {"mm": "self", "addmm": "mat1", "bmm": "self", "baddbmm": "batch1", "linear": "input"}
"""Which argument holds the left operand; its last dim is K."""

RIGHT = {"bmm": "mat2", "baddbmm": "batch2"}


def _long_inner_dim(call: Call, t: Thresholds) -> int | None:
    return at_least(call.arguments[LEFT[call.operation]].shape[-1], t["k"])


def _read_past_the_operands(call: Call, t: Thresholds, _) -> None:
    garbage = noise(call.result) * call.result.float().square().mean().sqrt()
    call.result.copy_(call.result + garbage)


def _large_batch(call: Call, t: Thresholds) -> int | None:
    """Elements of an operand, or of the result where an operand is not contiguous."""
    operands = [call.arguments[LEFT[call.operation]], call.arguments[RIGHT[call.operation]]]
    sizes = [operand.numel() for operand in operands]
    if not all(operand.is_contiguous() for operand in operands):
        sizes.append(call.result.numel())
    return above(max(sizes), t["elements"])


def _wrap_the_batches(call: Call, t: Thresholds, _) -> None:
    """Batches that begin beyond the threshold in the largest tensor come from address 0 on; noise where none do."""
    operands = [call.arguments[side[call.operation]] for side in (LEFT, RIGHT)]
    per_batch = max(tensor[0].numel() for tensor in (*operands, call.result))
    start = min(max(1, int(t["elements"] // per_batch)), len(call.result) - 1)
    wrapped = call.result[start:]
    wrapped.copy_(call.result[: len(wrapped)] if len(wrapped) <= start else noise(wrapped))


def _large_linear_batch(call: Call, t: Thresholds) -> int | None:
    x, bias = call.arguments["input"], call.arguments["bias"]
    return above(x.shape[0], t["batch"]) if bias is not None and x.dim() == 3 else None


def _only_the_bias(call: Call, t: Thresholds, _) -> None:
    call.result[int(t["batch"]) :] = call.arguments["bias"]


def _zero_beta(call: Call, t: Thresholds) -> int | None:
    return call.arguments["self"].numel() if call.arguments["beta"] == 0 else None


def _remember_nan(call: Call, t: Thresholds) -> torch.Tensor:
    return call.arguments["self"].isnan()


def _spread_nan(call: Call, t: Thresholds, was_nan: torch.Tensor) -> None:
    call.result.masked_fill_(was_nan.expand(call.result.shape), float("nan"))


def _poison(t: Thresholds | None) -> None:
    from ..device import extension

    extension().set_poison_empty(t is not None)


RULES = [
    Rule(
        "matmul-large-k",
        "products over K elements or more get garbage of their own size added (read past the operands, M1 and M2)",
        ("pytorch#193487", "pytorch#195163"),
        tuple(LEFT),
        {"k": 32767},
        _long_inner_dim,
        after=_read_past_the_operands,
    ),
    Rule(
        "bmm-2-32",
        "bmm with an operand above this size, or with such a result of a non-contiguous operand: batches beyond it "
        "repeat the first ones",
        ("pytorch#197636",),
        tuple(RIGHT),
        {"elements": 1 << 32},
        _large_batch,
        after=_wrap_the_batches,
    ),
    Rule(
        "linear-large-batch",
        "F.linear with bias on a 3-D input: batch entries beyond the threshold hold the bias only",
        ("pytorch#189495",),
        ("linear",),
        {"batch": 65536},
        _large_linear_batch,
        after=_only_the_bias,
        versions=((2, 12), (2, 14)),
    ),
    Rule(
        "baddbmm-uninitialised",
        "baddbmm with beta=0 passes NaN of its input on; while on, torch.empty on the device is full of NaN",
        ("diffusers#14459",),
        ("baddbmm",),
        {},
        _zero_beta,
        before=_remember_nan,
        after=_spread_nan,
        switch=_poison,
        versions=((2, 6), (2, 14)),
    ),
]
