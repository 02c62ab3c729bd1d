"""Tiles of a Wan VAE: what decoding and encoding need over the weights, which tiles a budget asks for, how they blend.

A VAE's memory is proportional to the area that it works on, because the caches of its full-size layers are the most of
it: 4 GiB of caches alone at 1280x720. So tiles go through time one after the other, each with caches of its own size,
and what waits for its neighbours is finished pictures, twelve bytes a pixel and frame, or six on the disk. The bytes
per pixel are counts of the simulated device's dry mode (tests/simulated_mps/inside/test_vae_peaks.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, pi

import torch
from torch import Tensor

from .telemetry import MemorySnapshot
from .vae_streaming import KINDS, WanKind, latent_count

GIB = 1 << 30
OVERLAP = {8: 8, 16: 6}
"""Latent cells that neighbouring tiles share at least, by the cell's side in pixels: 64 and 96 pixels."""
OUTER = 0.25
"""Part of an overlap, on either side, in which the tile that ends there has no say: its border is the least true."""
AUTOMATIC_SHARE = 0.8
"""Of the memory that is free; the rest is for what macOS and other programs take meanwhile."""

PEAK_BYTES = {
    ("decode", "wan2.1"): (6790, 781),
    ("decode", "wan2.1-coarse"): (8235, 781),
    ("decode", "wan2.2"): (7700, 2257),
    ("encode", "wan2.1"): (4280, 772),
    ("encode", "wan2.1-coarse"): (6250, 772),
    ("encode", "wan2.2"): (2980, 952),
}
"""Bytes over the weights per pixel at two bytes an element and the published width: of a video, and at most of a single
frame, whose peak may be attention's and so depend on torch."""


class BudgetError(ValueError):
    """A budget that no tiles fit in; one sentence."""


@dataclass(frozen=True)
class Span:
    """Latent cells first..last - 1 of one axis."""

    first: int
    last: int

    @property
    def size(self) -> int:
        return self.last - self.first


@dataclass(frozen=True)
class Tiling:
    """A grid of tiles: the spans of its rows and of its columns. Neighbours overlap, others do not."""

    rows: tuple[Span, ...]
    columns: tuple[Span, ...]

    def __len__(self) -> int:
        return len(self.rows) * len(self.columns)

    def __iter__(self) -> Iterator[tuple[Span, Span]]:
        return ((row, column) for row in self.rows for column in self.columns)

    @property
    def tile(self) -> tuple[int, int]:
        """(rows, columns) of cells of the largest tile."""
        return max(span.size for span in self.rows), max(span.size for span in self.columns)

    def weights(self, row: Span, column: Span, scale: int = 1) -> Tensor:
        """What a tile contributes to each of its points, float32 [rows * scale, columns * scale]; at every point the
        contributions of all tiles add up to one."""
        vertical, horizontal = _contribution(self.rows, row, scale), _contribution(self.columns, column, scale)
        return vertical[:, None] * horizontal


def make_tiling(height: int, width: int, rows: int = 1, columns: int = 1, overlap: int = 0) -> Tiling:
    """Equal tiles over height x width latent cells, neighbours sharing `overlap` cells or a few more."""
    return Tiling(_spans(height, rows, overlap), _spans(width, columns, overlap))


def decode_peak_bytes(
    kind: str, width: int, height: int, frames: int, tiles: Tiling | None = None, dtype: torch.dtype = torch.float16
) -> int:
    """Bytes on the device over the weights while width x height x frames are decoded; kind: a name of KINDS."""
    return peak_bytes("decode", KINDS[kind], width, height, frames, tiles, dtype)


def encode_peak_bytes(
    kind: str, width: int, height: int, frames: int, tiles: Tiling | None = None, dtype: torch.dtype = torch.float16
) -> int:
    """Bytes on the device over the weights while width x height x frames are encoded; kind: a name of KINDS."""
    return peak_bytes("encode", KINDS[kind], width, height, frames, tiles, dtype)


def plan_tiles(
    operation: str, kind: WanKind, width: int, height: int, frames: int, dtype: torch.dtype, budget: int | None
) -> Tiling:
    """The tiles with the least work whose peak stays in budget bytes; the whole picture where it does, or for None.

    operation: "decode" or "encode". width and height: in pixels. Raises BudgetError if no tiles do.
    """
    cells = height // kind.stride, width // kind.stride

    def peak(tiling: Tiling) -> int:
        return peak_bytes(operation, kind, width, height, frames, tiling, dtype)

    def work(tiling: Tiling) -> tuple[int, int]:
        return len(tiling) * tiling.tile[0] * tiling.tile[1], len(tiling)

    candidates = list(_candidates(*cells, OVERLAP[kind.stride]))
    if budget is None:
        return candidates[0]
    fitting = [tiling for tiling in candidates if peak(tiling) <= budget]
    if not fitting:
        least = min(map(peak, candidates))
        raise BudgetError(
            f"A budget of {budget / GIB:.2f} GiB is too small to {operation} {width}x{height}: "
            f"enter at least {ceil(least / GIB * 100) / 100:.2f} GiB, or 0 to let the free memory decide."
        )
    return min(fitting, key=work)


def smallest_tiles(operation: str, kind: WanKind, width: int, height: int) -> Tiling:
    """The tiles that need the least memory."""
    candidates = _candidates(height // kind.stride, width // kind.stride, OVERLAP[kind.stride])
    return min(candidates, key=lambda tiling: tiling.tile[0] * tiling.tile[1])


def automatic_budget(snapshot: MemorySnapshot, reserved: int = 0) -> int | None:
    """Bytes that the work may take on the device by what memory holds now, or None where nothing is known.

    reserved: bytes that the result will take outside of the device's tensors.
    """
    bounds = []
    if snapshot.recommended is not None and snapshot.live is not None:
        bounds.append(snapshot.recommended - snapshot.live)
    if snapshot.available is not None:
        bounds.append(snapshot.available - reserved)
    return int(max(0, min(bounds)) * AUTOMATIC_SHARE) if bounds else None


def peak_bytes(
    operation: str, kind: WanKind, width: int, height: int, frames: int, tiles: Tiling | None, dtype: torch.dtype
) -> int:
    """As decode_peak_bytes and encode_peak_bytes, for a VAE's own kind; operation: "decode" or "encode"."""
    rows, columns = tiles.tile if tiles is not None else (height // kind.stride, width // kind.stride)
    video, still = PEAK_BYTES[operation, kind.name]
    per_pixel = (video if frames > 1 else still) * dtype.itemsize / 2 * kind.width / KINDS[kind.name].width
    latents = 2 * kind.channels * latent_count(frames) * dtype.itemsize
    return int(rows * columns * (per_pixel * kind.stride**2 + latents))


def _candidates(height: int, width: int, overlap: int) -> Iterator[Tiling]:
    """Every grid whose tiles are at least twice as long as what they share; the whole picture is the first."""
    for rows in range(1, _most_tiles(height, overlap) + 1):
        for columns in range(1, _most_tiles(width, overlap) + 1):
            yield make_tiling(height, width, rows, columns, overlap)


def _most_tiles(length: int, overlap: int) -> int:
    count = 1
    while _spans(length, count + 1, overlap)[0].size >= 2 * overlap + 2:
        count += 1
    return count


def _spans(length: int, count: int, overlap: int) -> tuple[Span, ...]:
    size = min(length, ceil((length + (count - 1) * overlap) / count))
    starts = [round(index * (length - size) / max(1, count - 1)) for index in range(count)]
    return tuple(Span(start, start + size) for start in starts)


def _contribution(spans: tuple[Span, ...], span: Span, scale: int) -> Tensor:
    """One axis' weights of a tile, float32 [size * scale]: a raised cosine over the middle of each overlap."""
    weights = torch.ones(span.size * scale, dtype=torch.float64)
    index = spans.index(span)
    if index > 0:
        shared = (spans[index - 1].last - span.first) * scale
        weights[:shared] = _rise(shared)
    if index + 1 < len(spans):
        shared = (span.last - spans[index + 1].first) * scale
        weights[len(weights) - shared :] = 1 - _rise(shared)
    return weights.to(torch.float32)


def _rise(length: int) -> Tensor:
    """From 0 to 1 over an overlap: 0 in its first part, 1 in its last, a raised cosine between."""
    places = ((torch.arange(length, dtype=torch.float64) + 0.5) / length - OUTER) / (1 - 2 * OUTER)
    return (1 - torch.cos(places.clamp(0, 1) * pi)) / 2
