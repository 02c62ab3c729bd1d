"""rms_norm returns garbage above 2^21 to 2^22 rows.

The fused kernel (torch 2.8 on) is right for the token counts of one attention block and wrong for the row counts of
per-head norms over long videos; frames come out black. Beyond the limit the formula is written out in float32, a
bounded number of rows at a time. ComfyUI's norms (comfy.rmsnorm, comfy.ops.RMSNorm) and ``nn.RMSNorm`` call
``torch.nn.functional.rms_norm`` by attribute in 0.16 to 0.30; ``torch.rms_norm`` is its other entry.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from . import gate, probing
from .registry import Cure, Defect, Function, ProbeResult

ID = "rms-norm-rows"
# Elements computed at once: bounds the float32 temporaries to 128 MiB each.
CHUNK_ELEMENTS = 1 << 25


def reference(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """Root-mean-square norm over the last ``len(normalized_shape)`` dimensions, computed in float32.

    eps: float32's if None, as the fused kernels have it. The result has the input's dtype.
    """
    dims = tuple(range(-len(normalized_shape), 0))
    values = input.float()
    floor = torch.finfo(torch.float32).eps if eps is None else eps
    output = values * torch.rsqrt(values.square().mean(dims, keepdim=True) + floor)
    return (output if weight is None else output * weight.float()).to(input.dtype)


def _by_rows(input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, eps: float | None) -> Tensor:
    shape = tuple(normalized_shape)
    size = math.prod(shape)
    rows = input.reshape(-1, *shape)
    most = max(1, min(gate.LIMITS[ID], CHUNK_ELEMENTS // size))
    output = torch.empty_like(rows, memory_format=torch.contiguous_format)
    for start, length in gate.ranges(rows.size(0), most):
        output[start : start + length] = reference(rows[start : start + length], shape, weight, eps)
    return output.view(input.shape)


def _make(original: Function) -> Function:
    def cured(
        input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
    ) -> Tensor:
        if (
            gate.acts_on(input)
            and input.numel() > gate.LIMITS[ID]
            and gate.plain(input, weight)
            and input.is_floating_point()
            and tuple(input.shape[input.dim() - len(normalized_shape) :]) == tuple(normalized_shape)
            and input.numel() > gate.LIMITS[ID] * math.prod(normalized_shape)
        ):
            return _by_rows(input, normalized_shape, weight, eps)
        return original(input, normalized_shape, weight, eps)

    return cured


def probe(device: torch.device, quick: bool) -> ProbeResult:
    """Normalise more rows than the limit, and compare the first and last 1,024.

    Quick: width 4. Otherwise heads of 64, three million rows of them: 40 heads of a 1280x720x81 video's tokens.
    """
    count, width = _rows_and_width(quick)
    ends = probing.noise((1024, width), torch.float16)
    expected = reference(torch.cat([ends, ends]), (width,))
    compute = partial(_normalise_ends, ends.to(device), count)
    return probing.compare(compute, expected, 2e-3, f"rms_norm of {count} rows of {width}")


def _rows_and_width(quick: bool) -> tuple[int, int]:
    limit = gate.LIMITS[ID]
    return (2 * limit + 1, 4) if quick else (min(2 * limit + 1, 40 * 75600), 64)


def _footprint(quick: bool) -> int:
    count, width = _rows_and_width(quick)
    return 4 * (count + 4096) * width + (1 << 24)


def _normalise_ends(ends: Tensor, count: int) -> Tensor:
    """The first and last rows of a norm over ``count`` rows that begin and end with ``ends``."""
    repeats = -(-count // len(ends))
    rows = ends.repeat(repeats, 1)
    output = torch.nn.functional.rms_norm(rows, rows.shape[-1:])
    return torch.cat([output[: len(ends)], output[-len(ends) :]])


DEFECTS = (
    Defect(
        id=ID,
        title="rms_norm fails above two million rows",
        symptom="Black frames, NaN",
        trigger="torch.nn.functional.rms_norm on more than 2^21 rows",
        cause="the row index of the fused kernel overflows",
        affected="torch 2.8 and later (fused kernel); the exact range is unknown",
        upstream=(),
        seam="torch.nn.functional.rms_norm, torch.rms_norm",
        advice="Leave the patch on.",
        probe=probe,
        cure=Cure(targets=(("torch.nn.functional", "rms_norm"), ("torch", "rms_norm")), make=_make),
        reference="rms_norm_rows.reference",
        footprint=_footprint,
    ),
)
