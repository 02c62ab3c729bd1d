"""What the planner must know of a model file: its table of tensors, what of it lies on the device, and which Wan it is.

Nothing but headers is read. What the loader leaves as it is in the file, and what it converts, follows
quantization/comfy_loader.py, and for LoRAs comfy_patcher.py beside it; shapes and channel counts are those of the Wan
checkpoints (2.1: arXiv 2503.20314).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

from ..quantization.gguf import GGUFError, GGUFFile
from ..quantization.model_files import require_file
from ..quantization.safetensors_file import SafetensorsError, SafetensorsFile

Kind = Literal["diffusion", "encoder", "vae", "lora"]

PREFIXES = ("model.diffusion_model.", "diffusion_model.")
FLOAT32 = ("patch_embedding.", "vace_patch_embedding.")
PLAIN_TYPES = ("F32", "F16", "BF16")
LORA_FACTOR = re.compile(
    r"(\.lora_(up|down|mid)\.weight|[._]lora\.(up|down)\.weight|\.lora_[AB](\.default)?(\.weight)?"
    r"|\.lora_linear_layer\.(up|down)\.weight|\.hada_(w[12]_[ab]|t[12])|\.lokr_(w[12](_[ab])?|t2)|\.diff)$"
)
"""What follows a module's name in the factors that comfy_patcher.py keeps in half precision."""
LORA_PREFIX = re.compile(r"^(lora_unet__?|lycoris_)")
PAGE = 16 << 10
LARGE_BUFFER = 10 << 20
LARGE_STEP = 2 << 20
"""From LARGE_BUFFER on, torch's MPS allocator rounds buffers up to LARGE_STEP; below, macOS does, to pages."""


class PlanError(ValueError):
    """A plan cannot be made; the message is one sentence for the user."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: ggml's or the safetensors header's type, the shape in torch's order, bytes in the file."""

    type_name: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class WeightTable:
    """The tensors of a model file by name, without ComfyUI's prefixes. name: of the file, for messages."""

    name: str
    entries: Mapping[str, Entry]
    path: Path | None = None

    @cached_property
    def nbytes(self) -> int:
        """Of all tensors in the file."""
        return sum(entry.nbytes for entry in self.entries.values())

    @cached_property
    def wan(self) -> WanModel:
        """See ``wan_model``."""
        return _recognised(self)

    @cached_property
    def quantised(self) -> frozenset[str]:
        """Modules whose matrix has less than half precision, their dots as underscores."""
        return frozenset(
            _module(name.removesuffix(".weight"))
            for name, entry in self.entries.items()
            if len(entry.shape) == 2 and name.endswith(".weight") and entry.type_name not in PLAIN_TYPES
        )

    @cached_property
    def device_sizes(self) -> list[int]:
        """Bytes of each tensor on the device, once loaded for computing in half precision.

        Matrices stay what they are in the file, and so do one-byte weights; vectors, modulation and convolutions are
        converted to the computing type, but for FLOAT32, which are so in core's model.
        """
        return [_device_bytes(name, entry) for name, entry in self.entries.items()]


def _device_bytes(name: str, entry: Entry) -> int:
    if len(entry.shape) == 2 and name.endswith(".weight"):
        return entry.nbytes
    elements = math.prod(entry.shape)
    return elements * (4 if name.startswith(FLOAT32) else 2)


def lora_sizes(lora: WeightTable, model: WeightTable) -> list[int]:
    """Bytes of each tensor of a LoRA on the device beside ``model``.

    float32 factors of quantised matrices are in float16 there, but for those of DoRAs and of LoRAs that change a shape;
    alphas and shapes are numbers.
    """
    held = (name for name in lora.entries if not name.endswith((".alpha", ".reshape_weight")))
    return [_lora_bytes(name, lora, model) for name in held]


def _lora_bytes(name: str, lora: WeightTable, model: WeightTable) -> int:
    entry, factor = lora.entries[name], LORA_FACTOR.search(name)
    if factor is None or entry.type_name != "F32":
        return entry.nbytes
    stem = name[: factor.start()]
    whole = any(f"{stem}.{part}" in lora.entries for part in ("dora_scale", "reshape_weight"))
    return entry.nbytes if whole or _module(stem) not in model.quantised else entry.nbytes // 2


def _module(name: str) -> str:
    """A module's name without ComfyUI's and kohya's prefixes, its dots as underscores."""
    return LORA_PREFIX.sub("", _plain(name)).replace(".", "_")


def rounded(nbytes: int) -> int:
    """What a buffer of ``nbytes`` takes from the device."""
    step = LARGE_STEP if nbytes >= LARGE_BUFFER else PAGE
    return -(-nbytes // step) * step


def read_table(path: str | Path) -> WeightTable:
    """The table of a .gguf or .safetensors file. Raises PlanError or the reader's error, each one sentence."""
    path = Path(path)
    try:
        require_file(path)
        if path.suffix.lower() == ".gguf":
            tensors = {
                name: Entry(info.type_name, tuple(info.original_shape), info.nbytes)
                for name, info in GGUFFile(path).tensors.items()
            }
        else:
            tensors = {
                name: Entry(info.type_name, tuple(info.shape), info.nbytes)
                for name, info in SafetensorsFile(path).tensors.items()
            }
    except (GGUFError, SafetensorsError) as error:
        raise PlanError(str(error)) from None
    except ValueError as error:
        raise PlanError(str(error)) from None
    return WeightTable(path.name, {_plain(name): entry for name, entry in tensors.items()}, path)


def _plain(name: str) -> str:
    return next((name.removeprefix(prefix) for prefix in PREFIXES if name.startswith(prefix)), name)


@dataclass(frozen=True)
class WanModel:
    """Sizes of a Wan diffusion model, in elements. image: it has attention to CLIP's image tokens."""

    dim: int
    ffn_dim: int
    layers: int
    in_dim: int
    out_dim: int
    image: bool
    vace_layers: int

    @property
    def heads(self) -> int:
        return self.dim // HEAD_DIM

    @property
    def latent_stride(self) -> int:
        """Pixels of a latent's side; 5B's VAE is the one of Wan 2.2."""
        return VAES[self.out_dim].stride if self.out_dim in VAES else 8

    @property
    def takes_image(self) -> bool:
        """Whether a picture or clip is part of the model's input."""
        return self.in_dim > self.out_dim

    @property
    def title(self) -> str:
        size = TITLES.get((self.dim, self.layers), f"of width {self.dim}")
        return f"Wan {size}{' VACE' if self.vace_layers else ' image to video' if self.takes_image else ''}"


@dataclass(frozen=True)
class VaeKind:
    """A VAE by its latent channels: pixels of a latent's side, and the name in vae_streaming.KINDS."""

    stride: int
    name: str


HEAD_DIM = 128
VAES = {16: VaeKind(8, "wan2.1"), 48: VaeKind(16, "wan2.2")}
TITLES = {(1536, 30): "1.3B", (3072, 30): "5B", (5120, 40): "14B"}
TEXT_TOKENS, TEXT_DIM, CLIP_TOKENS = 512, 4096, 257


def wan_model(table: WeightTable) -> WanModel:
    """Which Wan a table is. Raises PlanError for anything else."""
    return table.wan


def _recognised(table: WeightTable) -> WanModel:
    shapes = {name: entry.shape for name, entry in table.entries.items()}
    needed = ("patch_embedding.weight", "patch_embedding.bias", "head.head.bias", "blocks.0.ffn.0.bias")
    if any(name not in shapes for name in needed) or "blocks.0.self_attn.q.weight" not in shapes:
        raise PlanError(f"{table.name} is no Wan diffusion model, the only ones that can be planned: choose its file.")
    dim = shapes["patch_embedding.bias"][0]
    return WanModel(
        dim=dim,
        ffn_dim=shapes["blocks.0.ffn.0.bias"][0],
        layers=_count(shapes, "blocks"),
        in_dim=math.prod(shapes["patch_embedding.weight"]) // (4 * dim),
        out_dim=shapes["head.head.bias"][0] // 4,
        image="blocks.0.cross_attn.k_img.weight" in shapes,
        vace_layers=_count(shapes, "vace_blocks"),
    )


def _count(names: Mapping[str, object], stem: str) -> int:
    found = {int(match[1]) for name in names if (match := re.match(rf"{stem}\.(\d+)\.", name))}
    return max(found, default=-1) + 1


def require_kind(table: WeightTable, kind: Kind) -> WeightTable:
    """The table itself. Raises PlanError where it is of another kind than ``kind``."""
    words, marks = KINDS[kind]
    if not any(mark in name for name in table.entries for mark in marks):
        raise PlanError(f"{table.name} is no {words}: choose the right file for it.")
    return table


KINDS: dict[Kind, tuple[str, tuple[str, ...]]] = {
    "diffusion": ("diffusion model", ("patch_embedding.",)),
    "encoder": ("text encoder", ("enc.blk.", "encoder.block.", "shared.weight")),
    "vae": ("VAE", ("decoder.conv1.", "decoder.conv_in.", "decoder.upsamples.")),
    "lora": ("LoRA", ("lora_", ".diff", "lora.")),
}


def vae_channels(table: WeightTable) -> int:
    """Latent channels of a Wan VAE, a key of VAES. Raises PlanError for another file."""
    entry = require_kind(table, "vae").entries.get("conv2.weight")
    if entry is None or entry.shape[0] not in VAES:
        raise PlanError(f"{table.name} is no VAE of Wan 2.1 or 2.2: choose wan_2.1_vae or wan2.2_vae.")
    return entry.shape[0]


@dataclass(frozen=True)
class Quantities:
    """Parts in bytes that are in memory at one moment, by name."""

    parts: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.parts.values())
