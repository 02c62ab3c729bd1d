"""Flash-attention packages for MPS that a user may have installed: mtlflashattn and mps-flash-attn.

Calling conventions are those of mtlflashattn 0.2.0 (module metal_flash_attn) and mps-flash-attn 0.5.2. Neither is
trusted: the first call of every shape is compared with float32 attention over a sample of its rows, and a package
that disagrees or raises is off for the rest of the process.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from .chunked_attention import reference_attention

log = logging.getLogger(__name__)

CHECKED_ROWS = 64
# Largest relative error (root mean square) that a right kernel makes: rounding of the result and of the weights.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 4e-3, torch.bfloat16: 1.2e-2}


@dataclass(frozen=True)
class FlashPackage:
    """name: as on PyPI. module: to import. call: (module, q, k, v, scale), all [B, H, L, D] with equal heads."""

    name: str
    module: str
    max_head_dim: int
    call: Callable[[ModuleType, Tensor, Tensor, Tensor, float], Tensor]


def _mtlflashattn(module: ModuleType, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    by_length = (t.transpose(1, 2).contiguous() for t in (q, k, v))
    return module.flash_attn_func(*by_length, softmax_scale=scale).transpose(1, 2)


def _mps_flash_attn(module: ModuleType, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return module.flash_attention(q.contiguous(), k.contiguous(), v.contiguous(), scale=scale)


PACKAGES = (
    FlashPackage("mtlflashattn", "metal_flash_attn", 256, _mtlflashattn),
    FlashPackage("mps-flash-attn", "mps_flash_attn", 256, _mps_flash_attn),
)

_off: dict[str, str] = {}
_checked: set[tuple[object, ...]] = set()


def usable_packages(head_dim: int) -> tuple[str, ...]:
    """Names of the packages that are installed, not switched off, and take this head dim; best first."""
    return tuple(p.name for p in PACKAGES if p.name not in _off and head_dim <= p.max_head_dim and _installed(p.module))


def switched_off() -> dict[str, str]:
    """Name -> reason, for the packages that failed in this process."""
    return dict(_off)


def run_package(name: str, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor | None:
    """Attention by one package: q [B, H, Lq, D], k and v [B, Hk, Lk, D], result as q; None if it is or goes off."""
    package = next(p for p in PACKAGES if p.name == name)
    if name in _off:
        return None
    repeats = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(repeats, dim=1) if repeats > 1 else t for t in (k, v))
    try:
        out = package.call(importlib.import_module(package.module), q, k, v, scale)
    except Exception as error:
        fault = f"{type(error).__name__}: {error}"
    else:
        fault = _fault(name, out, q, k, v, scale)
    if not fault:
        return out
    _off[name] = fault
    log.warning("%s is not used for attention in this session: %s.", name, fault)
    return None


def forget() -> None:
    """Trust and distrust nothing, as at the start of the process."""
    _off.clear()
    _checked.clear()
    _installed.cache_clear()


@functools.cache
def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _fault(name: str, out: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> str:
    """What is wrong with a package's result, or ""; its numbers are looked at for the first call of each shape."""
    if out.shape != q.shape or out.dtype != q.dtype:
        return f"it gave {list(out.shape)} {out.dtype} for {list(q.shape)} {q.dtype}"
    signature = (name, tuple(q.shape), tuple(k.shape), q.dtype)
    if signature in _checked:
        return ""
    error = _error(out, q, k, v, scale)
    if not error <= TOLERANCE[q.dtype]:
        return f"relative error {error:.1e} at {list(q.shape)} x {k.shape[2]} keys"
    _checked.add(signature)
    return ""


def _error(out: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> float:
    """Relative root mean square error over rows spread from the first to the last, head by head to save memory."""
    rows = torch.linspace(0, q.shape[2] - 1, min(CHECKED_ROWS, q.shape[2])).round().long().to(q.device)
    wrong = size = 0.0
    for batch in range(q.shape[0]):
        for head in range(q.shape[1]):
            one = (slice(batch, batch + 1), slice(head, head + 1))
            query = q[one].index_select(2, rows)
            right = reference_attention(query.float(), k[one], v[one], scale=scale)
            got = out[one].index_select(2, rows).float()
            wrong += (got - right).square().sum().item()
            size += right.square().sum().item()
    return math.sqrt(wrong / size) if size else math.sqrt(wrong)
