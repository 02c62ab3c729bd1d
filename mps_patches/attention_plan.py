"""Which way one attention call is computed on MPS, and in blocks of what size.

The ways are a table, tried in order; each says in words why it was taken, for the Doctor, the planner and the log.
The limits come from mac-failures: 2^31 scores (silent noise), 2048 query rows, 32,767 summed elements in a matrix
product, about 3,000 keys in a half-precision softmax; the head dims are those of torch 2.13's prefill kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

Mask = Literal["none", "bool", "same", "other"]

HALF = (torch.float16, torch.bfloat16)
PREFILL_SINCE = (2, 13)
PREFILL_HEAD_DIMS = (32, 64, 72, 80, 96, 128, 256)
VECTOR_KERNEL_ROWS = 8
BUDGET = 512 << 20


@dataclass(frozen=True)
class AttentionLimits:
    """Sizes beyond which MPS goes wrong or gets slow; tests on a simulated device scale them down.

    score_elements: a block of scores stays below this. rows: most query rows of a block. keys: most keys of a block.
    softmax_keys: beyond, a half-precision softmax loses precision. gate_elements: calls with fewer scores in all are
    left to the function that was going to be called.
    """

    score_elements: int = 1 << 31
    rows: int = 2048
    keys: int = 32766
    softmax_keys: int = 3000
    gate_elements: int = 1 << 26


LIMITS = AttentionLimits()


@dataclass(frozen=True)
class AttentionRequest:
    """One attention call: query [batch, heads, q_len, head_dim], key [batch, .., k_len, head_dim].

    budget: bytes that temporaries may take. mask: none, bool, of the query's dtype, or of another.
    half_softmax_exact: whether the device's own half-precision attention passed its probe.
    packages: names of the flash-attention packages that may be used, best first.
    """

    batch: int
    heads: int
    q_len: int
    k_len: int
    head_dim: int
    dtype: torch.dtype
    torch_version: tuple[int, int]
    budget: int = BUDGET
    value_dim: int | None = None
    mask: Mask = "none"
    half_softmax_exact: bool = True
    packages: tuple[str, ...] = ()
    limits: AttentionLimits = field(default_factory=lambda: LIMITS)

    @property
    def scores(self) -> int:
        return self.batch * self.heads * self.q_len * self.k_len

    @property
    def half(self) -> bool:
        return self.dtype in HALF

    @property
    def softmax_suffers(self) -> bool:
        return self.half and not self.half_softmax_exact and self.k_len > self.limits.softmax_keys

    @property
    def has_prefill(self) -> bool:
        return (
            self.torch_version >= PREFILL_SINCE
            and self.q_len > VECTOR_KERNEL_ROWS
            and self.mask != "other"
            and self.value_dim in (None, self.head_dim)
            and self.head_dim <= max(PREFILL_HEAD_DIMS)
        )


@dataclass(frozen=True)
class AttentionPlan:
    """How a call is computed: "original", the name of a package, "sdpa", "sdpa-padded", "sdpa-float32" or "chunks".

    batches, heads, rows, keys: extents of one block. head_dim: of the block, padding included.
    block_bytes: temporaries that are live at once, the result not counted. reason: in words.
    """

    method: str
    reason: str
    batches: int
    heads: int
    rows: int
    keys: int
    head_dim: int
    block_bytes: int = 0

    @property
    def block_scores(self) -> int:
        """Scores of one block; SDPA's prefill kernel and the packages never form them."""
        return self.batches * self.heads * self.rows * self.keys


def plan_attention(
    batch: int,
    heads: int,
    q_len: int,
    k_len: int,
    head_dim: int,
    dtype: torch.dtype,
    torch_version: str | tuple[int, int],
    budget: int = BUDGET,
    *,
    value_dim: int | None = None,
    mask: Mask = "none",
    half_softmax_exact: bool = True,
    packages: tuple[str, ...] = (),
    limits: AttentionLimits | None = None,
) -> AttentionPlan:
    """The plan for one attention call on MPS. budget: bytes for temporaries; the other arguments as in the request."""
    version = parse_version(torch_version) if isinstance(torch_version, str) else torch_version
    return choose(
        AttentionRequest(
            batch, heads, q_len, k_len, head_dim, dtype, version, budget, value_dim, mask, half_softmax_exact,
            packages, limits or LIMITS,
        )
    )  # fmt: skip


def choose(request: AttentionRequest) -> AttentionPlan:
    """The first way of the table that is fit for the request."""
    for way in WAYS:
        if reason := way.fits(request):
            return way.lay_out(request, reason)
    raise AssertionError("the last way fits every request")


def parse_version(text: str) -> tuple[int, int]:
    """(2, 13) from "2.13.0.dev20260101+cpu"."""
    major, minor = text.split("+")[0].split(".")[:2]
    return int(major), int(minor)


def padded_head_dim(head_dim: int) -> int:
    """The smallest head dim of a prefill kernel >= ``head_dim``. Raises ValueError beyond the largest."""
    fitting = [size for size in PREFILL_HEAD_DIMS if size >= head_dim]
    if not fitting:
        raise ValueError(f"no prefill kernel has a head dim of {head_dim} or more")
    return fitting[0]


@dataclass(frozen=True)
class Way:
    fits: Callable[[AttentionRequest], str]
    lay_out: Callable[[AttentionRequest, str], AttentionPlan]


def _small(request: AttentionRequest) -> str:
    few = request.scores <= request.limits.gate_elements
    return f"{request.scores:,} scores: small enough as it is" if few and not request.softmax_suffers else ""


def _package(request: AttentionRequest) -> str:
    fit = request.packages and request.mask == "none" and request.value_dim in (None, request.head_dim)
    return f"{request.packages[0]} is installed and forms no scores" if fit else ""


def _sdpa(request: AttentionRequest) -> str:
    fit = request.has_prefill and request.head_dim in PREFILL_HEAD_DIMS and not request.softmax_suffers
    return f"this torch has a prefill kernel for head dim {request.head_dim}, which forms no scores" if fit else ""


def _sdpa_float32(request: AttentionRequest) -> str:
    if not (request.has_prefill and request.softmax_suffers):
        return ""
    return (
        f"half-precision attention failed its probe and {request.k_len:,} keys are beyond "
        f"{request.limits.softmax_keys:,}: the prefill kernel in float32"
    )


def _sdpa_padded(request: AttentionRequest) -> str:
    if not request.has_prefill:
        return ""
    size = padded_head_dim(request.head_dim)
    return f"no prefill kernel has head dim {request.head_dim}: zeros up to {size}, which has one"


def _chunks(request: AttentionRequest) -> str:
    whole = f"{request.scores:,} scores would be formed at once"
    if request.scores >= request.limits.score_elements:
        return f"{whole}, beyond the {request.limits.score_elements:,} where they turn to noise"
    if request.softmax_suffers:
        return f"half-precision softmax over {request.k_len:,} keys loses precision"
    return f"{whole}, {request.scores * 4 / 2**30:.1f} GiB in float32"


def _sdpa_groups(request: AttentionRequest, reason: str) -> AttentionPlan:
    """As many heads at once as keep SDPA's own result, which is copied into the caller's layout, small."""
    one_head = request.q_len * request.head_dim * request.dtype.itemsize
    batches, heads = _spread(request, max(1, request.budget // 8 // one_head))
    return AttentionPlan(
        "sdpa", reason, batches, heads, request.q_len, request.k_len, request.head_dim, batches * heads * one_head
    )


def _whole(method: str) -> Callable[[AttentionRequest, str], AttentionPlan]:
    def lay_out(request: AttentionRequest, reason: str) -> AttentionPlan:
        name = request.packages[0] if method == "package" else method
        extents = (request.batch, request.heads, request.q_len, request.k_len, request.head_dim)
        return AttentionPlan(name, reason, *extents)

    return lay_out


def _by_heads(method: str) -> Callable[[AttentionRequest, str], AttentionPlan]:
    """Copies of q, k, v and the result for as many heads at once as the budget holds."""

    def lay_out(request: AttentionRequest, reason: str) -> AttentionPlan:
        head_dim = padded_head_dim(request.head_dim)
        item = 4 if method == "sdpa-float32" else request.dtype.itemsize
        one_head = 2 * (request.q_len + request.k_len) * head_dim * item
        batches, heads = _spread(request, max(1, request.budget // max(1, one_head)))
        extents = (batches, heads, request.q_len, request.k_len, head_dim)
        return AttentionPlan(method, reason, *extents, block_bytes=batches * heads * one_head)

    return lay_out


def in_chunks(request: AttentionRequest, reason: str) -> AttentionPlan:
    """Row blocks of float32 scores: rows first, then keys are halved until one head fits; then heads are added."""
    limits, k_len = request.limits, request.k_len
    rows = max(1, min(request.q_len, limits.rows))
    keys = _even(k_len, limits.keys)
    while rows > MIN_ROWS and (_bytes(request, 1, rows, keys) > request.budget or rows * keys >= limits.score_elements):
        rows = max(MIN_ROWS, rows // 2)
    while keys > MIN_KEYS and (_bytes(request, 1, rows, keys) > request.budget or rows * keys >= limits.score_elements):
        keys = _even(k_len, max(MIN_KEYS, keys // 2))
    most = 1
    if keys == k_len:  # slices of several heads would not be contiguous
        most = min(
            (limits.score_elements - 1) // max(1, rows * keys),
            request.budget // max(1, _bytes(request, 1, rows, keys)),
        )
    batches, heads = _spread(request, max(1, most))
    plan = AttentionPlan("chunks", reason, batches, heads, rows, keys, request.head_dim)
    words = f"{reason}: {rows:,} rows x {keys:,} keys of {batches * heads} head(s) at a time"
    return replace(plan, reason=words, block_bytes=_bytes(request, batches * heads, rows, keys))


MIN_ROWS = 64
MIN_KEYS = 256


def _even(length: int, most: int) -> int:
    """The extent of equal parts of ``length``, none above ``most``."""
    return math.ceil(length / max(1, math.ceil(length / most)))


def _bytes(request: AttentionRequest, heads: int, rows: int, keys: int) -> int:
    """Temporaries of ``heads`` heads in float32: scores and their softmax, keys and values, query and result rows."""
    value_dim = request.value_dim or request.head_dim
    copies = request.k_len * (request.head_dim + value_dim) + 2 * rows * (request.head_dim + value_dim)
    masks = rows * keys if request.mask in ("same", "other") else 0
    return 4 * heads * (2 * rows * keys + copies + masks)


def _spread(request: AttentionRequest, units: int) -> tuple[int, int]:
    """Batches and heads of one block that holds at most ``units`` heads: several batches only with all their heads."""
    if units < request.heads:
        return 1, _even(request.heads, units)
    return max(1, min(request.batch, units // max(1, request.heads))), request.heads


WAYS = (
    Way(_small, _whole("original")),
    Way(_package, _whole("package")),
    Way(_sdpa, _sdpa_groups),
    Way(_sdpa_float32, _by_heads("sdpa-float32")),
    Way(_sdpa_padded, _by_heads("sdpa-padded")),
    Way(_chunks, in_chunks),
)


@contextmanager
def scaled(**limits: int) -> Iterator[None]:
    """Other limits for a while, for tests on a simulated device; names as in ``AttentionLimits``."""
    global LIMITS
    before = LIMITS
    LIMITS = replace(before, **limits)
    try:
        yield
    finally:
        LIMITS = before
