"""Bytes that a stage of a video run needs on the device beyond its weights, from the shapes alone.

Sampling follows wan_activations.py moment by moment: what is alive in each part of a block, in the chunks that its
budget gives, with attention as attention_plan.py lays it out for the torch at hand. tests/data/plan_table.json holds
what the simulated device counted; tests/unit/test_plan.py compares. The VAE's bytes are those of vae_tiles.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ..mps_patches import attention_plan
from ..quantization.low_rank import PART_BYTES
from .plan_models import CLIP_TOKENS, HEAD_DIM, TEXT_DIM, TEXT_TOKENS, VAES, PlanError, Quantities, WanModel
from .vae_streaming import KINDS
from .vae_tiles import AUTOMATIC_SHARE as VAE_SHARE
from .vae_tiles import BudgetError, peak_bytes, plan_tiles, smallest_tiles
from .wan_activations import DEFAULT_BYTES, WIDTHS, ActivationBudget

Cfg = Literal["none", "apart", "batched"]

CORE_QUERIES = 4096
"""Queries at a time in core's own attention, scores and softmax in float32; it takes the small calls."""

ROPE_WIDTHS = 5
"""Rotary embedding of one chunk: its input in float32, the result in float32 and in the model's type."""

# Latents that core's sampler and its guidance keep in float32 while the model runs: of the sample, and for each
# entry of a batch; euler, which keeps none of its own from step to step.
SAMPLER_LATENTS = 9.0
ENTRY_LATENTS = 4.5
APART_LATENTS = 1.0
EXTRA_LATENTS = 3.2  # the same for channels that the model has beyond the latent's own
VACE_CHANNELS, VACE_COPIES, VACE_ENTRY_COPIES = 96, 2.17, 1.33  # VACE's own latents, in float32, likewise
ENCODER_HEADS, ENCODER_SCORES, ENCODER_STATES = 64, 5, 9  # of UMT5-XXL; tensors alive in one layer's attention
VACE_STREAMS = 3
"""Tensors of the hidden state's size that VACE's branch keeps beside it."""


@dataclass(frozen=True)
class Video:
    """Size in pixels and number of frames (4n + 1)."""

    width: int
    height: int
    frames: int

    def check(self, stride: int) -> None:
        """Raises PlanError for sizes that the model does not take."""
        if self.frames < 1 or self.frames % 4 != 1:
            lower = max(1, (self.frames - 1) // 4 * 4 + 1)
            raise PlanError(f"{self.frames} frames are not 4n + 1: take {lower} or {lower + 4}.")
        step = 2 * stride
        if self.width < step or self.height < step or self.width % step or self.height % step:
            raise PlanError(
                f"{self.width}x{self.height} is not a multiple of {step} in both directions, which this model needs: "
                "change width and height."
            )

    @property
    def latent_frames(self) -> int:
        return (self.frames - 1) // 4 + 1

    @property
    def pixels(self) -> int:
        return self.width * self.height

    @property
    def frame_bytes(self) -> int:
        """All frames as ComfyUI holds them, in float32 on the CPU."""
        return self.pixels * self.frames * 3 * 4

    def latent_elements(self, stride: int) -> int:
        """Of one channel."""
        return self.latent_frames * (self.height // stride) * (self.width // stride)


@dataclass(frozen=True)
class Compute:
    """How the device computes. temporary_bytes: budget of a chunk; attention_bytes: of one attention call."""

    torch_version: str = "2.14"
    itemsize: int = 2
    temporary_bytes: int = DEFAULT_BYTES
    attention_bytes: int = attention_plan.BUDGET

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.itemsize == 4 else torch.float16


def sampling(model: WanModel, video: Video, cfg: Cfg, compute: Compute, lora: bool = False) -> Quantities:
    """The fullest moment of one evaluation of the model, in parts; weights not counted."""
    moments = _Forward(model, video, cfg, compute, lora).moments()
    return max((Quantities({k: int(v) for k, v in parts.items() if v}) for parts in moments), key=lambda q: q.total)


@dataclass(frozen=True)
class _Forward:
    model: WanModel
    video: Video
    cfg: Cfg
    compute: Compute
    lora: bool

    @property
    def batch(self) -> int:
        return 2 if self.cfg == "batched" else 1

    @property
    def tokens(self) -> int:
        return self.video.latent_elements(self.model.latent_stride) // 4

    @property
    def hidden(self) -> int:
        """Bytes of the hidden state of one batch entry."""
        return self.tokens * self.model.dim * self.compute.itemsize

    @property
    def context(self) -> int:
        tokens = TEXT_TOKENS + (CLIP_TOKENS if self.model.image else 0)
        return self.batch * tokens * self.model.dim * self.compute.itemsize

    def rows(self, stage: str, more: int = 0, batch: int = 1) -> int:
        """As ``Host.chunks`` cuts."""
        per_row = batch * (WIDTHS[stage] * self.model.dim + more) * self.compute.itemsize
        unit = attention_plan.LIMITS.rows if stage == "queries" else 1
        return ActivationBudget(self.compute.temporary_bytes).rows(self.tokens, per_row, unit)

    def outside(self) -> dict[str, float]:
        """Alive during the whole evaluation."""
        latent = self.video.latent_elements(self.model.latent_stride) * self.model.out_dim * 4
        apart = APART_LATENTS if self.cfg == "apart" else 0.0
        latents = SAMPLER_LATENTS + ENTRY_LATENTS * self.batch + apart
        if self.model.takes_image:
            extra = self.model.in_dim / self.model.out_dim - 1
            latents += extra * (EXTRA_LATENTS * self.batch + apart)
        vace = 4 * VACE_CHANNELS * self.video.latent_elements(self.model.latent_stride)
        return {
            "sampler's latents": latents * latent,
            "VACE's latents": vace * (VACE_COPIES + VACE_ENTRY_COPIES * self.batch) if self.model.vace_layers else 0,
            "positions and texts": self.tokens * HEAD_DIM // 2 * 4 * 4 + self.context,
            "hidden state": (1 + (VACE_STREAMS if self.model.vace_layers else 0)) * self.batch * self.hidden,
        }

    def matrices(self, *shapes: tuple[int, int]) -> float:
        """Decoded matrices of these shapes that are kept.

        Where LoRAs are added the last one is just being made: in float32 with a part of a product, then both in
        float32 and rounded.
        """
        size = self.compute.itemsize
        held = sum(rows * columns for rows, columns in shapes) * size
        if not self.lora:
            return held
        rows, columns = shapes[-1]
        return held + 4 * rows * columns + max(0, PART_BYTES - size * rows * columns)

    def moments(self) -> list[dict[str, float]]:
        model, batch, size = self.model, self.batch, self.compute.itemsize
        outside, dim = self.outside(), model.dim
        square = (dim, dim)
        out = batch * self.hidden
        pair = 2 * self.hidden

        def width(stage: str, more: int = 0, entries: int = 1) -> tuple[int, int]:
            rows = min(self.tokens, self.rows(stage, more, entries))
            return rows, entries * rows * dim * size

        held = [square] * 4 if batch > 1 else [square] * 2
        decoded = {"decoded weights": len(held) * dim * dim * size}
        _, keys = width("keys")
        rows, queries = width("queries")
        cross_rows, cross = width("cross", entries=batch)
        _, forward = width("feed-forward", 2 * model.ffn_dim, batch)
        ffn = [(model.ffn_dim, dim), (dim, model.ffn_dim)]
        hidden_rows = forward // (dim * size)
        return [
            outside | {"patches": 2 * out},
            outside | {"decoded weights": self.matrices(*held)},
            outside
            | decoded
            | {
                "result of the block": out if batch > 1 else 0,
                "keys and values": pair,
                "chunk": keys * (2 + ROPE_WIDTHS),
            },
            outside | {"keys and values": pair, "decoded weights": self.matrices(*[square] * 2)},
            outside
            | decoded
            | {"result of the block": out, "keys and values": pair, "chunk": queries * (2 + ROPE_WIDTHS)},
            outside
            | decoded
            | {
                "result of the block": out,
                "keys and values": pair,
                "chunk": 2 * queries,
                "attention": self.attention(1, rows, self.tokens),
            },
            outside
            | {
                "result of the block": out,
                "decoded weights": 2 * dim * dim * size,
                "chunk": 2 * cross + 2 * batch * min(cross_rows, CORE_QUERIES) * dim * size,
                "attention": self.attention(batch, cross_rows, TEXT_TOKENS),
            },
            outside | {"result of the block": out, "decoded weights": self.matrices(*ffn)},
            outside
            | {
                "result of the block": out,
                "decoded weights": 2 * dim * model.ffn_dim * size,
                "chunk": 2 * hidden_rows * model.ffn_dim * size,
            },
        ]

    def attention(self, batch: int, rows: int, keys: int) -> int:
        """Temporaries of one call, the result not counted."""
        plan = attention_plan.plan_attention(
            batch, self.model.heads, rows, keys, HEAD_DIM, self.compute.dtype, self.compute.torch_version,
            self.compute.attention_bytes,
        )  # fmt: skip
        if plan.method == "original":
            return 2 * batch * self.model.heads * min(rows, CORE_QUERIES) * keys * 4
        return plan.block_bytes


def batches_guidance(model: WanModel, video: Video, free: int) -> bool:
    """Whether core evaluates both prompts at once: where 1.5 times its own estimate is free.

    The estimate is that of ComfyUI 0.16 to 0.30 for Wan with the attention that a Mac gets by default.
    """
    area = 2 * video.latent_elements(model.latent_stride)
    return area * 0.15 * (model.dim / 2222) * (1 << 20) * 1.5 < free


def decoding(channels: int, video: Video, budget: int | None = None) -> tuple[Quantities, int]:
    """Decoding all frames, and in how many tiles: those that ``budget`` bytes over the VAE's weights ask for."""
    return _vae("decode", channels, video, budget)


def encoding(channels: int, video: Video, budget: int | None = None) -> tuple[Quantities, int]:
    """Encoding as many frames, as image to video does with its padded clip; as ``decoding``."""
    return _vae("encode", channels, video, budget)


def _vae(operation: str, channels: int, video: Video, budget: int | None) -> tuple[Quantities, int]:
    kind = KINDS[VAES[channels].name]
    size = (video.width, video.height)
    try:
        tiling = plan_tiles(operation, kind, *size, video.frames, torch.float16, budget)
    except BudgetError:
        tiling = smallest_tiles(operation, kind, *size)
    peak = peak_bytes(operation, kind, *size, video.frames, tiling, torch.float16)
    return Quantities({f"VAE, {operation[:-1]}ing": peak}), len(tiling)


def text_encoding() -> Quantities:
    """UMT5-XXL over 512 tokens: a layer's attention in float32, position biases and softmax included."""
    scores = ENCODER_HEADS * TEXT_TOKENS * TEXT_TOKENS * 4
    hidden = TEXT_TOKENS * TEXT_DIM * 4
    return Quantities({"text encoder's layers": ENCODER_SCORES * scores + ENCODER_STATES * hidden})


__all__ = [
    "VAE_SHARE",
    "Cfg",
    "Compute",
    "Video",
    "batches_guidance",
    "decoding",
    "encoding",
    "sampling",
    "text_encoding",
]
