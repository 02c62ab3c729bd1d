"""Decoding and encoding with core's VAE object: which VAEs can be streamed, what they may take, and how core waits.

A VAE that is none of Wan's (vae_streaming.py knows them by structure), or a latent that is no video's, goes through
core's own decode and encode. Value ranges, formats and places of results are those of core's VAE.
"""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .awake import awake
from .comfy_models import have_device_to_itself, keep_on_mps
from .telemetry import MemorySnapshot, take_snapshot
from .vae_canvas import Canvas, FileCanvas, TensorCanvas
from .vae_stages import Consumer, decode_tiles, encode_tiles, shifted
from .vae_streaming import WanKind, frame_count, wan_kind
from .vae_tiles import (
    GIB,
    BudgetError,
    Span,
    Tiling,
    automatic_budget,
    peak_bytes,
    plan_tiles,
    smallest_tiles,
)

log = logging.getLogger(__name__)

OPERATIONS = ("decode", "encode")
Canvases = Callable[[int, tuple[int, int, int, int]], AbstractContextManager[Canvas | None]]
Progress = Callable[[int], None]
Preview = Callable[[], Any]


def streamable(vae: Any) -> WanKind | None:
    """The kind of a VAE that is streamed, or None where core's own way is taken."""
    return wan_kind(getattr(vae, "first_stage_model", None)) if getattr(vae, "latent_dim", None) == 3 else None


def decode(vae: Any, samples: Tensor, budget: float = 0.0) -> Tensor:
    """An IMAGE [frames, H, W, C] of a LATENT's samples [B, C, T, H, W], written frame by frame into one tensor.

    budget: GiB that the decoding may take over the VAE's weights, 0 for what is free. Raises BudgetError.
    """
    samples = _dense(samples)
    kind = streamable(vae) if samples.ndim == 5 else None
    if kind is None:
        return _flat(vae.decode(samples))
    shape = decoded_shape(vae, samples)
    images = torch.zeros(samples.shape[0] * shape[0], *shape[1:], dtype=_dtype(vae), device=vae.output_device)

    def consume(first: int, frames: Tensor) -> None:
        images[first : first + frames.shape[0]] = frames.clamp(0, 1)

    def canvases(first: int, shape: tuple[int, int, int, int]) -> AbstractContextManager[Canvas | None]:
        return nullcontext(TensorCanvas(images[first : first + shape[0]]))

    _decode(vae, kind, samples, budget, consume, canvases, images.nbytes)
    return images


def decode_to(
    vae: Any,
    samples: Tensor,
    budget: float,
    consume: Consumer,
    scratch: str | Path,
    preview: Preview = lambda: None,
) -> None:
    """Decode a LATENT's samples and hand each few frames [t, H, W, C] to consume in order, keeping none of them.

    budget: as for `decode`. scratch: a folder for frames that wait for their other tiles. preview: asked for the
    progress bar's picture. Raises BudgetError or ScratchError, and what consume raises.
    """
    samples = _dense(samples)
    kind = streamable(vae) if samples.ndim == 5 else None
    if kind is None:
        consume(0, _flat(vae.decode(samples)))
        return

    def canvases(first: int, shape: tuple[int, int, int, int]) -> AbstractContextManager[Canvas | None]:
        return FileCanvas(shape, Path(scratch))

    _decode(vae, kind, samples, budget, consume, canvases, 0, preview)


def encode(vae: Any, pixels: Tensor, budget: float = 0.0) -> Tensor:
    """A LATENT's samples [1, C, T, H, W] of an IMAGE [frames, H, W, C], whose frames go to the device as their turn
    comes.

    budget: GiB that the encoding may take over the VAE's weights, 0 for what is free. Raises BudgetError.
    """
    kind = streamable(vae) if pixels.ndim == 4 and not getattr(vae, "not_video", False) else None
    if kind is None:
        return vae.encode(pixels)
    pixels = vae.vae_encode_crop_pixels(pixels)
    count, height, width = pixels.shape[:3]
    tiling = _prepare(vae, kind, "encode", (count, height, width), budget, 0)

    def fetch(first: int, last: int, row: Span, column: Span) -> Tensor:
        part = pixels[first:last, row.first : row.last, column.first : column.last]
        return vae.process_input(part.movedim(-1, 0)[None]).to(vae.vae_dtype)

    with awake():
        size = (count, height // kind.stride, width // kind.stride)
        progress = _progress(len(tiling) * count)
        latent = encode_tiles(vae.first_stage_model, kind, size, tiling, fetch, progress)
    latent = latent.to(device=vae.output_device, dtype=_dtype(vae))
    form = getattr(vae, "format_encoded", None)
    return latent if form is None else form(latent)


def decoded_shape(vae: Any, samples: Tensor) -> tuple[int, int, int, int]:
    """(frames, H, W, channels) that one video of a latent [B, C, T, H, W] is decoded to; vae: a streamable one."""
    kind = streamable(vae)
    assert kind is not None
    channels = vae.first_stage_model.decoder.head[-1].out_channels // kind.patch**2
    return frame_count(samples.shape[2]), samples.shape[3] * kind.stride, samples.shape[4] * kind.stride, channels


def stream_vae(vae: Any, choice: str = "auto") -> Any:
    """A shallow copy of a VAE whose own decode and encode stream, and take tiles where the free memory asks for them.

    choice: "auto" where the VAE runs on MPS, "on" on every device. Every node that uses the VAE gains by it: core's
    VAE Decode, image-to-video nodes. Another VAE than Wan's, or one that streams already, is returned as it is; the
    input is never changed. The model gets its own methods back when it is unloaded.
    """
    kind = streamable(vae)
    wanted = choice == "on" or (choice == "auto" and vae.patcher.load_device.type == "mps")
    if kind is None or not wanted or "decode" in vae.patcher.object_patches:
        return vae
    streamed = copy.copy(vae)
    streamed.patcher = vae.patcher.clone()
    for operation, method in (("decode", _decode_whole), ("encode", _encode_whole)):
        streamed.patcher.add_object_patch(operation, partial(method, weakref.ref(vae.first_stage_model), kind))
        estimate = getattr(vae, f"memory_used_{operation}")
        setattr(streamed, f"memory_used_{operation}", partial(_needed, operation, kind, estimate))
    return streamed


def _decode(
    vae: Any,
    kind: WanKind,
    samples: Tensor,
    budget: float,
    consume: Consumer,
    canvases: Canvases,
    reserved: int,
    preview: Preview = lambda: None,
) -> None:
    """Decode each video of a batch, one after the other."""
    shape = decoded_shape(vae, samples)
    count = shape[0]
    tiling = _prepare(vae, kind, "decode", shape[:3], budget, reserved)
    progress = _progress(samples.shape[0] * len(tiling) * count, preview)

    def convert(piece: Tensor) -> Tensor:
        frames = piece.to(device=vae.output_device, dtype=_dtype(vae), copy=True)
        return vae.process_output(frames)[0].movedim(0, -1)

    with awake():
        for index, latent in enumerate(samples.to(vae.vae_dtype).split(1)):
            first = index * count
            moved = partial(shifted, consume, first)
            told = partial(shifted, progress, first * len(tiling))
            with canvases(first, shape) if len(tiling) > 1 else nullcontext() as canvas:
                decode_tiles(vae.first_stage_model, kind, latent, tiling, convert, moved, canvas, told)


def _prepare(
    vae: Any, kind: WanKind, operation: str, size: tuple[int, int, int], budget: float, reserved: int
) -> Tiling:
    """Put the VAE on its device and choose the tiles for size = (frames, height, width)."""
    import comfy.model_management as management

    frames, height, width = size
    asked = int(budget * GIB) or None
    if asked is not None:
        plan_tiles(operation, kind, width, height, frames, vae.vae_dtype, asked)  # refused before anything is loaded
    needed = peak_bytes(operation, kind, width, height, frames, None, vae.vae_dtype)
    have_device_to_itself(vae.patcher)
    management.load_models_gpu(
        [vae.patcher],
        memory_required=min(needed, asked or needed),
        force_full_load=getattr(vae, "disable_offload", False),
    )
    return _tiling(kind, operation, size, vae.vae_dtype, asked, vae.device, reserved)


def _tiling(
    kind: WanKind,
    operation: str,
    size: tuple[int, int, int],
    dtype: torch.dtype,
    asked: int | None,
    device: torch.device,
    reserved: int,
) -> Tiling:
    """Tiles for the bytes that were asked for, or for what is free; the smallest ones where even those do not fit."""
    frames, height, width = size
    budget = asked or automatic_budget(_memory(device), reserved)
    try:
        tiling = plan_tiles(operation, kind, width, height, frames, dtype, budget)
    except BudgetError as error:
        if asked is not None:
            raise
        tiling = smallest_tiles(operation, kind, width, height)
        log.warning("Memory is short: %s Going on with the smallest tiles.", error)
    peak = peak_bytes(operation, kind, width, height, frames, tiling, dtype)
    rows, columns = (side * kind.stride for side in tiling.tile)
    log.info(
        "VAE %s of %dx%d, %d frames: %s, %.2f GiB over the weights.", operation, width, height, frames,
        "the whole picture" if len(tiling) == 1 else f"{len(tiling)} tiles of {columns}x{rows}", peak / GIB,
    )  # fmt: skip
    return tiling


def _memory(device: torch.device) -> MemorySnapshot:
    """What memory holds, as far as work on this device is concerned."""
    import comfy.model_management as management

    snapshot = take_snapshot()
    if device.type == "mps":
        return snapshot
    return MemorySnapshot(available=snapshot.available if device.type == "cpu" else management.get_free_memory(device))


def _progress(total: int, preview: Preview = lambda: None) -> Progress:
    """Shows how many frames of all tiles are done, and obeys an interruption."""
    import comfy.model_management as management
    import comfy.utils

    bar = comfy.utils.ProgressBar(total)

    def tell(done: int) -> None:
        management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, preview=preview())

    return tell


def _alone(model: weakref.ref[nn.Module]) -> nn.Module:
    """The VAE's module, with every other model off MPS if it is there."""
    module = model()
    assert module is not None
    if next(module.parameters()).is_mps:
        keep_on_mps(module)
    return module


def _decode_whole(model: weakref.ref[nn.Module], kind: WanKind, latent: Tensor, **options: Any) -> Tensor:
    """In place of the model's decode: latent [B, C, T, H, W] -> [B, channels, frames, H, W] in -1..1 on the CPU."""
    module = _alone(model)
    count, height, width = frame_count(latent.shape[2]), *(side * kind.stride for side in latent.shape[3:])
    channels = module.decoder.head[-1].out_channels // kind.patch**2  # type: ignore[union-attr, index]
    reserved = 4 * latent.shape[0] * count * height * width * channels
    tiling = _tiling(kind, "decode", (count, height, width), latent.dtype, None, latent.device, reserved)
    dtype = latent.dtype if len(tiling) == 1 else torch.float32
    frames = torch.zeros(latent.shape[0], count, height, width, channels, dtype=dtype)
    progress = _progress(latent.shape[0] * len(tiling) * count)

    def convert(piece: Tensor) -> Tensor:
        return piece[0].movedim(0, -1).to("cpu", dtype)

    with awake():
        for index, (one, result) in enumerate(zip(latent.split(1), frames)):
            canvas = TensorCanvas(result) if len(tiling) > 1 else None
            told = partial(shifted, progress, index * len(tiling) * count)
            decode_tiles(module, kind, one, tiling, convert, partial(_put, result), canvas, told)
    return frames.movedim(-1, 1)


def _put(result: Tensor, first: int, frames: Tensor) -> None:
    result[first : first + frames.shape[0]] = frames


def _encode_whole(model: weakref.ref[nn.Module], kind: WanKind, pixels: Tensor, **options: Any) -> Tensor:
    """In place of the model's encode: pixels [B, channels, T, H, W] in -1..1 -> latent [B, C, T, H, W], same device."""
    module = _alone(model)
    count, height, width = pixels.shape[2:]
    tiling = _tiling(kind, "encode", (count, height, width), pixels.dtype, None, pixels.device, 0)
    progress = _progress(pixels.shape[0] * len(tiling) * count)

    def fetch(one: Tensor, first: int, last: int, row: Span, column: Span) -> Tensor:
        return one[:, :, first:last, row.first : row.last, column.first : column.last]

    with awake():
        size = (count, height // kind.stride, width // kind.stride)
        latents = []
        for index, one in enumerate(pixels.split(1)):
            told = partial(shifted, progress, index * len(tiling) * count)
            latents.append(encode_tiles(module, kind, size, tiling, partial(fetch, one), told))
    return torch.cat(latents).to(device=pixels.device, dtype=pixels.dtype)


def _needed(operation: str, kind: WanKind, estimate: Callable[..., float], shape: Any, dtype: torch.dtype) -> float:
    """Bytes that core is to make free: for a latent's shape [B, C, T, H, W], or the pixels'."""
    if len(shape) != 5:
        return estimate(shape, dtype)
    if operation == "decode":
        size = frame_count(shape[2]), shape[3] * kind.stride, shape[4] * kind.stride
    else:
        size = shape[2], shape[3], shape[4]
    whole = peak_bytes(operation, kind, size[2], size[1], size[0], None, dtype)
    return whole + (0 if operation == "decode" else 3 * size[0] * size[1] * size[2] * dtype.itemsize)


def _dense(samples: Tensor) -> Tensor:
    """The video of a LATENT that holds sound too."""
    return samples.unbind()[0] if getattr(samples, "is_nested", False) else samples


def _flat(images: Tensor) -> Tensor:
    return images.reshape(-1, *images.shape[-3:]) if images.ndim == 5 else images


def _dtype(vae: Any) -> torch.dtype:
    """Of what core's VAE gives."""
    return vae.vae_output_dtype() if hasattr(vae, "vae_output_dtype") else torch.float32
