"""Names and shapes of every tensor of the Wan diffusion models, as tables.

Facts: the checkpoints of Wan 2.1 and 2.2 (plain names, as ComfyUI repackages them), the channel counts by which
ComfyUI tells the variants apart, and the published sizes. Small models keep every structural feature of a variant
at width 256 with two heads of 128 and two blocks, so that all K-quants (super-blocks of 256) fit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

TEXT_DIM = 4096
FREQ_DIM = 256
CLIP_DIM = 1280
PATCH = (1, 2, 2)

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class WanShape:
    """What decides the tensors of a Wan model; widths and channel counts in elements, zero where a part is absent."""

    dim: int
    ffn_dim: int
    layers: int
    in_dim: int = 16
    out_dim: int = 16
    image_embedding: bool = False  # img_emb and the k_img, v_img, norm_k_img of every cross-attention
    first_last_tokens: int = 0  # img_emb.emb_pos: CLIP tokens of the first and the last frame
    reference_channels: int = 0  # ref_conv: latent channels of a full reference frame
    camera_channels: int = 0  # control_adapter: channels of the camera embedding before pixel unshuffle
    vace_layers: int = 0
    vace_in_dim: int = 96

    @property
    def heads(self) -> int:
        """Attention heads: Wan's head dim is always 128."""
        return self.dim // 128


SMALL = WanShape(dim=256, ffn_dim=512, layers=2)
SIZES = {
    "1.3b": WanShape(dim=1536, ffn_dim=8960, layers=30),
    "5b": WanShape(dim=3072, ffn_dim=14336, layers=30),
    "14b": WanShape(dim=5120, ffn_dim=13824, layers=40),
}


@dataclass(frozen=True)
class WanVariant:
    """One published model: its size, what it adds to the plain model, and the ComfyUI class that recognises it."""

    size: str
    comfy_class: str
    traits: dict[str, int | bool]
    seed: int = 0


_IMAGE = {"in_dim": 36, "image_embedding": True}
_IMAGE_22 = {"in_dim": 36}

VARIANTS = {
    "wan2.1-t2v-1.3b": WanVariant("1.3b", "WAN21_T2V", {}, seed=1),
    "wan2.1-t2v-14b": WanVariant("14b", "WAN21_T2V", {}, seed=2),
    "wan2.1-i2v-14b": WanVariant("14b", "WAN21_I2V", _IMAGE, seed=3),
    "wan2.1-flf2v-14b": WanVariant("14b", "WAN21_I2V", {**_IMAGE, "first_last_tokens": 514}, seed=4),
    "wan2.1-vace-1.3b": WanVariant("1.3b", "WAN21_Vace", {"vace_layers": 15}, seed=5),
    "wan2.1-vace-14b": WanVariant("14b", "WAN21_Vace", {"vace_layers": 8}, seed=6),
    "wan2.1-fun-control-14b": WanVariant(
        "14b", "WAN21_FunControl2V", {"in_dim": 48, "image_embedding": True, "reference_channels": 16}, seed=7
    ),
    "wan2.1-fun-camera-14b": WanVariant(
        "14b", "WAN21_Camera", {"in_dim": 32, "image_embedding": True, "camera_channels": 24}, seed=8
    ),
    "wan2.2-ti2v-5b": WanVariant("5b", "WAN22_T2V", {"in_dim": 48, "out_dim": 48}, seed=9),
    "wan2.2-t2v-a14b-high": WanVariant("14b", "WAN21_T2V", {}, seed=10),
    "wan2.2-t2v-a14b-low": WanVariant("14b", "WAN21_T2V", {}, seed=11),
    "wan2.2-i2v-a14b-high": WanVariant("14b", "WAN21_T2V", _IMAGE_22, seed=12),
    "wan2.2-i2v-a14b-low": WanVariant("14b", "WAN21_T2V", _IMAGE_22, seed=13),
    "wan2.2-fun-control-a14b-high": WanVariant("14b", "WAN21_T2V", {"in_dim": 52, "reference_channels": 16}, seed=14),
    "wan2.2-fun-camera-a14b-high": WanVariant("14b", "WAN22_Camera", {"in_dim": 36, "camera_channels": 24}, seed=15),
}


def wan_shape(variant: str, full_size: bool = False) -> WanShape:
    """Shape of ``variant`` at its real size or small; a small VACE model has one VACE block for its two blocks."""
    found = VARIANTS[variant]
    shape = replace(SIZES[found.size] if full_size else SMALL, **found.traits)  # type: ignore[arg-type]
    return replace(shape, vace_layers=1) if shape.vace_layers and not full_size else shape


def wan_tensors(shape: WanShape) -> Shapes:
    """Every tensor of the model, name to shape in torch order, in the order of the model's modules."""
    dim = shape.dim
    tensors: Shapes = {}
    tensors.update(_layer("patch_embedding", dim, shape.in_dim, *PATCH))
    tensors.update(_layer("text_embedding.0", dim, TEXT_DIM))
    tensors.update(_layer("text_embedding.2", dim, dim))
    tensors.update(_layer("time_embedding.0", dim, FREQ_DIM))
    tensors.update(_layer("time_embedding.2", dim, dim))
    tensors.update(_layer("time_projection.1", 6 * dim, dim))
    for index in range(shape.layers):
        tensors.update(_block(f"blocks.{index}", shape, shape.image_embedding))
    tensors["head.modulation"] = (1, 2, dim)
    tensors.update(_layer("head.head", shape.out_dim * PATCH[0] * PATCH[1] * PATCH[2], dim))
    if shape.image_embedding:
        tensors.update(_image_embedding(shape))
    if shape.reference_channels:
        tensors.update(_layer("ref_conv", dim, shape.reference_channels, *PATCH[1:]))
    for index in range(shape.vace_layers):
        tensors.update(_block(f"vace_blocks.{index}", shape, False))
        if index == 0:
            tensors.update(_layer(f"vace_blocks.{index}.before_proj", dim, dim))
        tensors.update(_layer(f"vace_blocks.{index}.after_proj", dim, dim))
    if shape.vace_layers:
        tensors.update(_layer("vace_patch_embedding", dim, shape.vace_in_dim, *PATCH))
    if shape.camera_channels:
        tensors.update(_layer("control_adapter.conv", dim, shape.camera_channels * 64, *PATCH[1:]))
        for conv in ("conv1", "conv2"):
            tensors.update(_layer(f"control_adapter.residual_blocks.0.{conv}", dim, dim, 3, 3))
    return tensors


def _layer(name: str, out: int, *inner: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (out, *inner)
    yield f"{name}.bias", (out,)


def _block(name: str, shape: WanShape, image: bool) -> Shapes:
    dim = shape.dim
    tensors: Shapes = {f"{name}.modulation": (1, 6, dim)}
    tensors.update(_attention(f"{name}.self_attn", dim))
    tensors[f"{name}.norm3.weight"] = (dim,)
    tensors[f"{name}.norm3.bias"] = (dim,)
    tensors.update(_attention(f"{name}.cross_attn", dim))
    if image:
        for projection in ("k_img", "v_img"):
            tensors.update(_layer(f"{name}.cross_attn.{projection}", dim, dim))
        tensors[f"{name}.cross_attn.norm_k_img.weight"] = (dim,)
    tensors.update(_layer(f"{name}.ffn.0", shape.ffn_dim, dim))
    tensors.update(_layer(f"{name}.ffn.2", dim, shape.ffn_dim))
    return tensors


def _attention(name: str, dim: int) -> Shapes:
    tensors: Shapes = {}
    for projection in "qkvo":
        tensors.update(_layer(f"{name}.{projection}", dim, dim))
    tensors[f"{name}.norm_q.weight"] = (dim,)
    tensors[f"{name}.norm_k.weight"] = (dim,)
    return tensors


def _image_embedding(shape: WanShape) -> Shapes:
    tensors: Shapes = {}
    if shape.first_last_tokens:
        tensors["img_emb.emb_pos"] = (1, shape.first_last_tokens, CLIP_DIM)
    widths = {"0": (CLIP_DIM,), "1": (CLIP_DIM, CLIP_DIM), "3": (shape.dim, CLIP_DIM), "4": (shape.dim,)}
    for index, weight in widths.items():
        tensors.update(_layer(f"img_emb.proj.{index}", *weight))
    return tensors
