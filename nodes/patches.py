"""Patch nodes: what the pack's loaders do for MPS, for models and VAEs that other nodes loaded."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

CATEGORY = "Apple Silicon Video/patches"
CHOICES = ["auto", "on", "off"]

ATTENTION = (
    "Attention in blocks where it would form too many scores at once. auto: on MPS, and only for calls that are too "
    "large; on: on every device; off: ComfyUI's own."
)
SOFTMAX = (
    "Scores and softmax in float32 for long sequences. auto: where this Mac's half-precision attention fails its "
    "check; on: always beyond 3,000 tokens; off: never for precision alone."
)
PACKAGES = (
    "Flash-attention packages (mtlflashattn, mps-flash-attn). auto and on: used on MPS if installed and right in a "
    "check at the sizes in use; off: never."
)


def _choice(name: str, tooltip: str, advanced: bool = False) -> io.Combo.Input:
    return io.Combo.Input(name, options=CHOICES, default="auto", tooltip=tooltip, optional=advanced, advanced=advanced)


class PatchModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MPSPatchModel",
            display_name="Patch Model for MPS",
            category=CATEGORY,
            description=(
                "Makes attention right and memory-saving on Apple Silicon for a model loaded by any node. The models "
                "of Load Diffusion Model (MPS) are patched already. Elsewhere than on MPS, auto changes nothing."
            ),
            search_aliases=["mps attention", "flash attention", "chunked attention", "noise fix", "apple", "mac"],
            inputs=[
                io.Model.Input("model", tooltip="The model to patch. It is not changed; a patched clone comes out."),
                _choice("attention", ATTENTION),
                _choice("float32_softmax", SOFTMAX, advanced=True),
                _choice("flash_packages", PACKAGES, advanced=True),
            ],
            outputs=[io.Model.Output(tooltip="The patched model, for samplers, LoRA loaders and ModelSampling nodes.")],
        )

    @classmethod
    def execute(cls, model: Any, attention: str, **choices: str) -> io.NodeOutput:
        from ..mps_patches.comfy_attention import patch_model

        return io.NodeOutput(patch_model(model, {"attention": attention, **choices}))


class PatchVAE(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MPSPatchVAE",
            display_name="Patch VAE for MPS",
            category=CATEGORY,
            description=(
                "Makes a VAE's attention right and memory-saving on Apple Silicon, whatever node loaded it. The VAEs "
                "of Load VAE (MPS) are patched already. Elsewhere than on MPS, auto changes nothing."
            ),
            search_aliases=["mps vae", "vae attention", "wan vae", "apple", "mac"],
            inputs=[
                io.Vae.Input("vae", tooltip="The VAE to patch. It is not changed; a patched copy comes out."),
                _choice("attention", ATTENTION),
                _choice("float32_softmax", SOFTMAX, advanced=True),
            ],
            outputs=[io.Vae.Output(tooltip="The patched VAE, for VAE Decode and image-to-video nodes.")],
        )

    @classmethod
    def execute(cls, vae: Any, attention: str, **choices: str) -> io.NodeOutput:
        from ..mps_patches.comfy_vae import patch_vae

        return io.NodeOutput(patch_vae(vae, {"attention": attention, **choices}))


NODES: list[type[io.ComfyNode]] = [PatchModel, PatchVAE]
