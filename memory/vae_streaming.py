"""Wan's causal VAEs frame by frame: the decoder's output is handed on at once, the encoder's input fetched late.

Both models walk through time in chunks and keep each convolution's last input frames in a cache, so their own loop is
used as it is, whatever the length of its chunks: hooks around `decoder` and `encoder` take each chunk away, or put it
in. The arithmetic is the model's own, so the result is the full decode's or encode's bit for bit, and no tensor of the
device grows with the number of frames but the latent. The facts are those of Wan 2.1's and 2.2's published models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

FRAMES_PER_LATENT = 4
"""One latent frame holds four frames, the first one a single frame."""


@dataclass(frozen=True)
class WanKind:
    """A family of VAEs: pixels of a latent cell's side, channels of a latent, channels at full size, and the side of
    the pixel blocks that are folded to channels before the first convolution."""

    name: str
    stride: int
    channels: int
    width: int
    patch: int = 1


KINDS = {
    kind.name: kind
    for kind in (
        WanKind("wan2.1", 8, 16, 96),
        WanKind("wan2.1-coarse", 8, 16, 96),
        WanKind("wan2.2", 16, 48, 160, patch=2),
    )
}
"""By name, as published. Older ComfyUI takes Wan 2.1's full-size layers four frames at a time, not two: coarse."""


def wan_kind(model: Any) -> WanKind | None:
    """Which Wan VAE a module is, by its structure, with its own width; None for every other module."""
    parts = ("encoder", "decoder", "conv1", "conv2", "temperal_downsample", "dim")
    if not isinstance(model, nn.Module) or any(not hasattr(model, part) for part in parts):
        return None
    module: Any = model
    nested = hasattr(next(iter(getattr(module.decoder, "upsamples", [])), None), "upsamples")
    fine = hasattr(module.decoder, "run_up")
    kind = KINDS["wan2.2" if nested else "wan2.1" if fine else "wan2.1-coarse"]
    convolution = getattr(module.encoder, "conv1", None)
    folds = isinstance(convolution, nn.Conv3d) and convolution.in_channels >= 3 * kind.patch**2
    downsamples = 2 ** len(module.temperal_downsample) * kind.patch
    return replace(kind, width=module.dim) if folds and downsamples == kind.stride else None


def frame_count(latent_frames: int) -> int:
    """Frames that so many latent frames are decoded to."""
    return max(0, FRAMES_PER_LATENT * (latent_frames - 1) + 1)


def latent_count(frames: int) -> int:
    """Latent frames that so many frames are encoded to; those that fill no latent frame are left out."""
    return (frames - 1) // FRAMES_PER_LATENT + 1


def decode_stream(model: Any, kind: WanKind, latent: Tensor, take: Callable[[Tensor], None]) -> None:
    """Decode latent [B, C, T, H, W] and call take with each piece [B, channels, t, H * stride, W * stride] in order.

    The latent is on the model's device in its dtype, and so are the pieces, in the decoder's range -1..1. What take
    raises ends the decoding. The sum of all t is frame_count(T).
    """

    def taken(module: nn.Module, inputs: Any, output: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        pieces = output if isinstance(output, list) else [output]
        empty = pieces[0][:, :, :0].clone()
        for piece in pieces:
            take(_unfolded(piece, kind.patch))
        return [empty] if isinstance(output, list) else empty

    handle = model.decoder.register_forward_hook(taken)
    try:
        type(model).decode(model, latent)
    finally:
        handle.remove()


def encode_stream(model: Any, kind: WanKind, frames: int, batch: int, fetch: Callable[[int, int], Tensor]) -> Tensor:
    """Encode so many frames to a latent [batch, C, latent_count(frames), H / stride, W / stride].

    fetch(first, last) gives frames first..last - 1 as [batch, channels, t, H, W] in -1..1, on the model's device and in
    its dtype; it is asked in order and once for each. What it raises ends the encoding.
    """
    weight = model.encoder.conv1.weight
    done = 0

    def given(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        nonlocal done
        first, done = done, done + inputs[0].shape[2]
        return _folded(fetch(first, done), kind.patch), *inputs[1:]

    channels = weight.shape[1] // kind.patch**2
    clock = torch.zeros(batch, channels, frames, kind.patch, kind.patch, dtype=weight.dtype, device=weight.device)
    handle = model.encoder.register_forward_pre_hook(given)
    try:
        return type(model).encode(model, clock)
    finally:
        handle.remove()


def _folded(frames: Tensor, patch: int) -> Tensor:
    """Blocks of patch x patch pixels to channels, ordered colour, column, row as in Wan 2.2's first convolution."""
    if patch == 1:
        return frames
    batch, channels, time, height, width = frames.shape
    blocks = frames.reshape(batch, channels, time, height // patch, patch, width // patch, patch)
    return blocks.permute(0, 1, 6, 4, 2, 3, 5).reshape(batch, -1, time, height // patch, width // patch)


def _unfolded(frames: Tensor, patch: int) -> Tensor:
    """The reverse of _folded."""
    if patch == 1:
        return frames
    batch, _, time, height, width = frames.shape
    blocks = frames.reshape(batch, -1, patch, patch, time, height, width)
    return blocks.permute(0, 1, 4, 5, 3, 6, 2).reshape(batch, -1, time, height * patch, width * patch)
