"""Defects of attention and softmax."""

import torch
import torch.nn.functional as F

from .model import HALF, Call, Rule, Thresholds, above, at_least, noise, spoil_with_noise

SDPA = "scaled_dot_product_attention"
PRODUCTS = ("bmm", "baddbmm", "mm", "_softmax")


def _scores(call: Call, t: Thresholds) -> int | None:
    """Elements of the score tensor, where there is one."""
    if call.operation != SDPA:
        return at_least(call.result.numel(), t["elements"])
    if call.arguments["path"] != "materialised":
        return None
    query, key = call.arguments["query"], call.arguments["key"]
    return at_least(query.numel() // query.shape[-1] * key.shape[-2], t["elements"])


def _noise(call: Call, t: Thresholds, _) -> None:
    spoil_with_noise(call.result)


def _half_keys(call: Call, t: Thresholds) -> int | None:
    if call.operation == SDPA:
        tensor, keys = call.arguments["query"], call.arguments["key"].shape[-2]
    else:
        tensor = call.arguments["self"]
        keys = tensor.shape[call.arguments["dim"]] if tensor.dim() else 1
    return above(keys, t["keys"]) if tensor.dtype in HALF else None


def _wrong_row_sums(call: Call, t: Thresholds, _) -> None:
    """Every row is divided by a sum that is a little off: 0.5 % at the threshold, 2.4 % at 4.7 times the threshold."""
    dim = -1 if call.operation == SDPA else call.arguments["dim"]
    keys = _half_keys(call, t) or 0
    rows = noise(call.result.narrow(dim, 0, 1))
    error = min(0.0052 * keys / t["keys"], 0.25) * (0.5 * rows.sign() + 0.5 * rows)
    call.result.copy_(call.result.float() * (1 + error))


def _causal_half(call: Call, t: Thresholds) -> int | None:
    query = call.arguments["query"]
    return query.shape[-2] if call.arguments["is_causal"] and query.dtype in HALF else None


def _see_the_next_token(call: Call, t: Thresholds, _) -> None:
    a = call.arguments
    visible = torch.ones(a["query"].shape[-2], a["key"].shape[-2], dtype=torch.bool).tril(diagonal=1)
    operands = (a["query"], a["key"], a["value"])
    call.result.copy_(F.scaled_dot_product_attention(*operands, visible, scale=a["scale"], enable_gqa=a["enable_gqa"]))


def _short_query(call: Call, t: Thresholds) -> int | None:
    queries = call.arguments["query"].shape[-2]
    return queries if queries <= t["queries"] and call.arguments["path"] == "vector" else None


def _garbage_in_the_last_row(call: Call, t: Thresholds, _) -> None:
    spoil_with_noise(call.result[..., -1, :])


def _materialise(t: Thresholds | None) -> None:
    from ..device import extension, installed

    table = tuple(map(int, installed()["torch"].split(".")[:2]))
    extension().set_prefill_attention(t is None and table >= (2, 13))


def _after_fallback(call: Call, t: Thresholds) -> int | None:
    return call.arguments["query"].numel() if call.arguments["after_fallback"] else None


RULES = [
    Rule(
        "scores-2-31",
        "a score tensor of this many elements or more comes out as noise: SDPA where it materialises the scores, "
        "results of bmm, baddbmm, mm and softmax",
        ("ComfyUI#14837", "ComfyUI#14838"),
        (SDPA, *PRODUCTS),
        {"elements": 1 << 31},
        _scores,
        after=_noise,
    ),
    Rule(
        "softmax-half",
        "half-precision softmax and SDPA over more keys: each row is scaled by a wrong sum, 0.5 % off at the "
        "threshold, growing with the keys (2.4 % at 14,000)",
        ("pytorch#190791",),
        (SDPA, "_softmax"),
        {"keys": 3000},
        _half_keys,
        after=_wrong_row_sums,
    ),
    Rule(
        "sdpa-causal-half",
        "half-precision SDPA with is_causal: every query also sees the next token",
        ("pytorch#195910",),
        (SDPA,),
        {},
        _causal_half,
        after=_see_the_next_token,
    ),
    Rule(
        "sdpa-short-query",
        "SDPA's vector kernel (at most this many queries): the last query's row is garbage",
        ("pytorch#174861",),
        (SDPA,),
        {"queries": 8},
        _short_query,
        after=_garbage_in_the_last_row,
        versions=((2, 8), (2, 11)),
    ),
    Rule(
        "sdpa-materialises",
        "SDPA allocates the score matrix in the query's dtype and in float32, whatever the op table says; the op "
        "tables before 2.13 do so without this rule",
        ("ComfyUI#11584",),
        switch=_materialise,
        versions=((2, 6), (2, 13)),
    ),
    Rule(
        "command-buffer",
        "SDPA after an operation that fell back to the CPU, without torch.mps.synchronize in between: the real device "
        "may abort; only reported",
        (),
        (SDPA,),
        {},
        _after_fallback,
    ),
]
