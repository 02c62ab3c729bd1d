"""A Wan 2.1 VAE of small width as safetensors, whose decoded video shows soft, moving shapes of colour.

Names and shapes are those of Wan's video VAE (16 latent channels, widths 1, 2, 4, 4 times the base width, time halved
twice and space three times); ComfyUI reads the width from ``decoder.head.0.gamma``. The decoder's convolutions carry
a low-pass profile over space and time, so that noise in a latent becomes smooth shapes that last over several frames.
The VAE of Wan 2.2 has no small form: its width is fixed in ComfyUI and its file is 1.4 GB.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod, sqrt
from pathlib import Path

import torch

from .weights import tensor_seed, write_safetensors

LATENT_CHANNELS = 16
MULTIPLIERS = (1, 2, 4, 4)
BLOCKS_PER_LEVEL = 2
TIME_DOWN = (False, True, True)

Shape = tuple[int, ...]
_LOW_PASS = {1: (1.0,), 3: (0.2, 0.6, 0.2)}
_GAIN = 1.4  # makes up for what the low-pass profile takes away
_GRAIN = 0.2
_CONTRAST = 0.6  # keeps the picture clear of black and white


def vae_tensors(width: int = 8) -> dict[str, Shape]:
    """Every tensor of the VAE, name to shape."""
    tensors: dict[str, Shape] = {}
    tensors.update(_encoder(width))
    tensors.update(_conv("conv1", 2 * LATENT_CHANNELS, 2 * LATENT_CHANNELS, 1, 1, 1))
    tensors.update(_conv("conv2", LATENT_CHANNELS, LATENT_CHANNELS, 1, 1, 1))
    tensors.update(_decoder(width))
    return tensors


def write_vae(path: Path, width: int = 8, seed: int = 200, dtype: torch.dtype = torch.float32) -> Path:
    """Write the VAE as safetensors; 0.9 million weights at width 8."""
    tensors = {name: _weight(name, shape, seed).to(dtype) for name, shape in vae_tensors(width).items()}
    return write_safetensors(path, tensors)


def _weight(name: str, shape: Shape, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tensor_seed(seed, name))
    if name.endswith("gamma"):
        return torch.ones(shape)
    if name.endswith("bias"):
        return torch.randn(shape, generator=generator) * 0.05
    if not name.startswith("decoder."):
        return torch.randn(shape, generator=generator) / sqrt(prod(shape[1:]))
    profile = torch.ones(())
    for taps in shape[2:]:
        profile = profile.unsqueeze(-1) * torch.tensor(_LOW_PASS[taps])
    mixing = torch.randn(shape[:2], generator=generator).reshape(*shape[:2], *[1] * (len(shape) - 2))
    grain = torch.randn(shape, generator=generator)
    gain = _CONTRAST if name == "decoder.head.2.weight" else 1.0
    return (mixing + _GRAIN * grain) * profile * (gain * _GAIN / sqrt(shape[1]))


def _conv(name: str, out: int, inner: int, *kernel: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (out, inner, *kernel)
    yield f"{name}.bias", (out,)


def _residual(name: str, inner: int, out: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.residual.0.gamma", (inner, 1, 1, 1)
    yield from _conv(f"{name}.residual.2", out, inner, 3, 3, 3)
    yield f"{name}.residual.3.gamma", (out, 1, 1, 1)
    yield from _conv(f"{name}.residual.6", out, out, 3, 3, 3)
    if inner != out:
        yield from _conv(f"{name}.shortcut", out, inner, 1, 1, 1)


def _middle(name: str, width: int) -> Iterator[tuple[str, Shape]]:
    yield from _residual(f"{name}.0", width, width)
    yield f"{name}.1.norm.gamma", (width, 1, 1)
    yield from _conv(f"{name}.1.to_qkv", 3 * width, width, 1, 1)
    yield from _conv(f"{name}.1.proj", width, width, 1, 1)
    yield from _residual(f"{name}.2", width, width)


def _head(name: str, width: int, out: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.0.gamma", (width, 1, 1, 1)
    yield from _conv(f"{name}.2", out, width, 3, 3, 3)


def _encoder(width: int) -> Iterator[tuple[str, Shape]]:
    yield from _conv("encoder.conv1", width, 3, 3, 3, 3)
    inner, index = width, 0
    for level, multiplier in enumerate(MULTIPLIERS):
        out = width * multiplier
        for _ in range(BLOCKS_PER_LEVEL):
            yield from _residual(f"encoder.downsamples.{index}", inner, out)
            inner, index = out, index + 1
        if level < len(TIME_DOWN):
            yield from _conv(f"encoder.downsamples.{index}.resample.1", out, out, 3, 3)
            if TIME_DOWN[level]:
                yield from _conv(f"encoder.downsamples.{index}.time_conv", out, out, 3, 1, 1)
            index += 1
    yield from _middle("encoder.middle", inner)
    yield from _head("encoder.head", inner, 2 * LATENT_CHANNELS)


def _decoder(width: int) -> Iterator[tuple[str, Shape]]:
    inner, index = width * MULTIPLIERS[-1], 0
    yield from _conv("decoder.conv1", inner, LATENT_CHANNELS, 3, 3, 3)
    yield from _middle("decoder.middle", inner)
    for level, multiplier in enumerate(reversed(MULTIPLIERS)):
        out = width * multiplier
        for _ in range(BLOCKS_PER_LEVEL + 1):
            yield from _residual(f"decoder.upsamples.{index}", inner, out)
            inner, index = out, index + 1
        if level < len(TIME_DOWN):
            yield from _conv(f"decoder.upsamples.{index}.resample.1", out // 2, out, 3, 3)
            if TIME_DOWN[-1 - level]:
                yield from _conv(f"decoder.upsamples.{index}.time_conv", 2 * out, out, 3, 1, 1)
            inner, index = out // 2, index + 1
    yield from _head("decoder.head", inner, 3)
