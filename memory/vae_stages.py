"""A Wan VAE's decoding and encoding by tiles: streams (vae_streaming.py) through a grid (vae_tiles.py) onto a canvas.

The whole picture is a grid of one tile: nothing is weighted then and the result is the full decode's bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .vae_canvas import Canvas
from .vae_streaming import WanKind, decode_stream, encode_stream, frame_count, latent_count
from .vae_tiles import Span, Tiling

Converter = Callable[[Tensor], Tensor]
"""A decoder's frames [1, C, t, H, W] -> pictures [t, H, W, C], away from the model's device."""
Consumer = Callable[[int, Tensor], None]
"""Called with the number of the first of some finished frames [t, H, W, C], in order."""


def decode_tiles(
    model: nn.Module,
    kind: WanKind,
    latent: Tensor,
    tiling: Tiling,
    convert: Converter,
    consume: Consumer,
    canvas: Canvas | None = None,
    progress: Callable[[int], None] = lambda frames: None,
) -> None:
    """Decode latent [1, C, T, H, W], on any device, in the dtype that the model is to run in.

    canvas: for more than one tile, zeros [frames, H * stride, W * stride, C]; the frames that the last tile completes
    are read from it. progress: called with the number of frames done after each piece, counted once for each tile.
    """
    count = frame_count(latent.shape[2])
    for number, tile in enumerate(tiling):
        last = number + 1 == len(tiling)
        told = partial(shifted, progress, number * count)
        _decode_tile(model, kind, latent, tiling, tile, convert, consume if last else None, canvas, told)


def _decode_tile(
    model: nn.Module,
    kind: WanKind,
    latent: Tensor,
    tiling: Tiling,
    tile: tuple[Span, Span],
    convert: Converter,
    consume: Consumer | None,
    canvas: Canvas | None,
    progress: Callable[[int], None],
) -> None:
    row, column = tile
    weights = tiling.weights(row, column, kind.stride).unsqueeze(-1)
    area = _pixels(row, kind), _pixels(column, kind)
    done = 0

    def take(piece: Tensor) -> None:
        nonlocal done
        frames = convert(piece)
        first, count = done, frames.shape[0]
        if canvas is not None:
            canvas.add(first, *area, frames * weights.to(frames))
        if consume is not None:
            consume(first, frames if canvas is None else canvas.frames(first, count))
        done += count
        progress(done)

    part = latent[..., row.first : row.last, column.first : column.last]
    decode_stream(model, kind, part.to(next(model.parameters()).device), take)


def encode_tiles(
    model: nn.Module,
    kind: WanKind,
    size: tuple[int, int, int],
    tiling: Tiling,
    fetch: Callable[[int, int, Span, Span], Tensor],
    progress: Callable[[int], None] = lambda frames: None,
) -> Tensor:
    """Encode size = (frames, height, width), the last two in latent cells, to [1, C, T, H, W] on the CPU, in the
    model's dtype or, from more than one tile, in float32.

    fetch(first, last, row, column): frames first..last - 1 of an area in pixels as [1, channels, t, rows, columns] in
    -1..1, on the CPU in the model's dtype. progress: as for decode_tiles.
    """
    latent: Tensor | None = None
    for number, tile in enumerate(tiling):
        part = _encode_tile(model, kind, size[0], tile, fetch, partial(shifted, progress, number * size[0]))
        if len(tiling) == 1:
            return part
        if latent is None:
            latent = torch.zeros(1, part.shape[1], latent_count(size[0]), *size[1:])
        area = latent[..., tile[0].first : tile[0].last, tile[1].first : tile[1].last]
        area += part.float() * tiling.weights(*tile)
    assert latent is not None
    return latent


def _encode_tile(
    model: nn.Module,
    kind: WanKind,
    frames: int,
    tile: tuple[Span, Span],
    fetch: Callable[[int, int, Span, Span], Tensor],
    progress: Callable[[int], None],
) -> Tensor:
    row, column = (_pixels(span, kind) for span in tile)
    device = next(model.parameters()).device

    def fetched(first: int, last: int) -> Tensor:
        progress(first)
        return fetch(first, last, row, column).to(device)

    latent = encode_stream(model, kind, frames, 1, fetched).cpu()
    progress(frames)
    return latent


def shifted(function: Callable[..., None], offset: int, number: int, *more: Any) -> None:
    """Call a function that counts from `offset`."""
    function(offset + number, *more)


def _pixels(span: Span, kind: WanKind) -> Span:
    return Span(span.first * kind.stride, span.last * kind.stride)
