"""Two defects of nearest interpolation: zeros in half precision on rank 5, and wrong rows in "nearest-exact".

``mode="nearest"`` on a float16 or bfloat16 video gives zeros (bytedance/LatentSync#48: black frames), so half precision
is cast to float32 for the step, which loses nothing. "nearest-exact" rounds an index that lies exactly between two rows
the wrong way (pytorch#134430: 20 rows to 11), so rows are gathered with indices computed here, in float32 as the CPU
and CUDA kernels do. Both are entered through ``F.interpolate``, which ``nn.Upsample`` calls too.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import gate, probing
from .registry import Cure, Defect, Function, ProbeResult

HALF = (torch.float16, torch.bfloat16)


def reference_half(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """``torch.nn.functional.interpolate`` computed in float32, for any rank, mode and way of giving the size."""
    return torch.nn.functional.interpolate(input.float(), *args, **kwargs).to(input.dtype)


def reference_nearest_exact(
    input: Tensor,
    size: int | Sequence[int] | None = None,
    scale_factor: float | Sequence[float] | None = None,
    recompute_scale_factor: bool | None = None,
) -> Tensor:
    """``interpolate(mode="nearest-exact")`` of [N, C, ...] with one to three spatial dimensions, by gathering rows."""
    output = input
    for dim, source, target, scale in _geometry(input, size, scale_factor, recompute_scale_factor):
        if target != source or scale != 1.0:
            output = output.index_select(dim, nearest_exact_rows(source, target, scale).to(output.device))
    return output.clone() if output is input else output


def nearest_exact_rows(source: int, target: int, scale: float | None = None) -> Tensor:
    """Source row of each of ``target`` rows: floor((row + 1/2) * scale), int64 on the CPU.

    scale: source rows per target row; source / target if None.
    """
    step = torch.tensor(float(source)) / float(target) if scale is None else torch.tensor(scale)
    return ((torch.arange(target) + 0.5) * step).floor().long().clamp(max=source - 1)


def _geometry(
    input: Tensor,
    size: int | Sequence[int] | None,
    scale_factor: float | Sequence[float] | None,
    recompute_scale_factor: bool | None,
) -> list[tuple[int, int, int, float | None]]:
    """(dimension, source rows, target rows, source rows per target row where a factor fixes it) for each dimension."""
    sources = list(input.shape[2:])
    if size is not None:
        targets = _each(size, len(sources))
        scales: list[float | None] = [None] * len(sources)
    else:
        assert scale_factor is not None
        factors = _each(scale_factor, len(sources))
        targets = [int(float(source) * factor) for source, factor in zip(sources, factors)]
        scales = [None if recompute_scale_factor else 1.0 / factor for factor in factors]
    return list(zip(range(2, input.dim()), sources, targets, scales))


def _each(value: Any, count: int) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value] * count


def _make_half(original: Function) -> Function:
    def cured(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if gate.acts_on(input) and input.dtype in HALF:
            return original(input.float(), *args, **kwargs).to(input.dtype)
        return original(input, *args, **kwargs)

    return cured


def _make_nearest_exact(original: Function) -> Function:
    def cured(
        input: Tensor,
        size: Any = None,
        scale_factor: Any = None,
        mode: str = "nearest",
        align_corners: bool | None = None,
        recompute_scale_factor: bool | None = None,
        antialias: bool = False,
    ) -> Tensor:
        if (
            mode == "nearest-exact"
            and gate.acts_on(input)
            and align_corners is None
            and not antialias
            and _well_formed(input, size, scale_factor, recompute_scale_factor)
            and _has_ties(input, size, scale_factor)
        ):
            return reference_nearest_exact(input, size, scale_factor, recompute_scale_factor)
        return original(input, size, scale_factor, mode, align_corners, recompute_scale_factor, antialias)

    return cured


def _well_formed(input: Tensor, size: Any, scale_factor: Any, recompute_scale_factor: bool | None) -> bool:
    """Whether the call is one that the original would accept; what it refuses is left to it."""
    spatial = input.dim() - 2
    given = size if size is not None else scale_factor
    if spatial not in (1, 2, 3) or given is None or (size is not None and scale_factor is not None):
        return False
    if size is not None and recompute_scale_factor:
        return False
    values = _each(given, spatial)
    kinds = (int,) if size is not None else (int, float)
    return len(values) == spatial and all(isinstance(value, kinds) and value > 0 for value in values)


def _has_ties(input: Tensor, size: Any, scale_factor: Any) -> bool:
    """Whether a row can lie near the border of two: never when every dimension grows by a whole factor."""
    sources = input.shape[2:]
    if size is not None:
        return any(target % source for source, target in zip(sources, _each(size, len(sources))))
    return any(factor != int(factor) for factor in _each(scale_factor, len(sources)))


def probe_half(device: torch.device, quick: bool) -> ProbeResult:
    """The upsampling step of 3-D UNets, nearest by [1, 2, 2], in float16 (and, not quick, at LatentSync's shapes)."""
    cases = [((1, 2, 2, 6, 8), torch.float16)]
    if not quick:
        cases += [((1, 64, 16, 32, 32), torch.float16), ((1, 64, 16, 32, 32), torch.bfloat16)]
    results = []
    for shape, dtype in cases:
        latents = probing.noise(shape, dtype)
        arguments: dict[str, Any] = {"scale_factor": [1.0, 2.0, 2.0], "mode": "nearest"}
        expected = reference_half(latents, **arguments)
        compute = partial(torch.nn.functional.interpolate, latents.to(device), **arguments)
        results.append(probing.compare(compute, expected, probing.EXACT, f"nearest of {tuple(shape)}, {dtype}"))
    return probing.worst(results)


def probe_nearest_exact(device: torch.device, quick: bool) -> ProbeResult:
    """Shrink 20 rows to 11 (and, not quick, a latent to odd sizes), in float32."""
    cases = [((1, 1, 2, 20), (2, 11))]
    if not quick:
        cases += [((1, 16, 60, 104), (45, 78)), ((1, 16, 90, 160), (64, 112)), ((1, 3, 480, 832), (300, 520))]
    results = []
    for shape, size in cases:
        rows = probing.noise(shape)
        expected = reference_nearest_exact(rows, size)
        compute = partial(torch.nn.functional.interpolate, rows.to(device), size, mode="nearest-exact")
        results.append(probing.compare(compute, expected, probing.EXACT, f"nearest-exact {shape[2:]} to {size}"))
    return probing.worst(results)


TARGETS = (("torch.nn.functional", "interpolate"),)
DEFECTS = (
    Defect(
        id="interpolate-half-5d",
        title="Half-precision interpolation of videos gives zeros",
        symptom="All-black frames (LatentSync and other 3-D UNets)",
        trigger='F.interpolate(mode="nearest") on a rank-5 tensor in float16 or bfloat16',
        cause="the half-precision kernel leaves its output at zero",
        affected="reported with torch 2.5 and later; the exact range is unknown",
        upstream=("bytedance/LatentSync#48", "bytedance/LatentSync#359"),
        seam="torch.nn.functional.interpolate",
        advice="Leave the patch on: interpolation then runs in float32.",
        probe=probe_half,
        cure=Cure(targets=TARGETS, make=_make_half),
        reference="interpolate.reference_half",
    ),
    Defect(
        id="nearest-exact-rounding",
        title="nearest-exact takes the neighbouring row",
        symptom="Images and latents shifted by a pixel in places after resizing",
        trigger='F.interpolate(mode="nearest-exact") by a factor that is not whole, for example 20 rows to 11',
        cause="an index halfway between two rows is rounded down by MPSGraph",
        affected="torch up to 2.13 (MPSGraph); Metal kernels of its own later",
        upstream=("pytorch#134430", "pytorch#186989"),
        seam="torch.nn.functional.interpolate",
        advice="Leave the patch on, or update torch.",
        probe=probe_nearest_exact,
        cure=Cure(targets=TARGETS, make=_make_nearest_exact),
        reference="interpolate.reference_nearest_exact",
    ),
)
