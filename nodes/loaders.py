"""Loader nodes: diffusion model, text encoder and VAE as core's MODEL, CLIP and VAE."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from . import text_encoders
from .folders import model_files, model_path

CATEGORY = "Apple Silicon Video/loaders"
DTYPES = ["auto", "float16", "bfloat16", "float32"]


def _dtype_input(tooltip: str) -> io.Combo.Input:
    return io.Combo.Input("dtype", options=DTYPES, default="auto", optional=True, advanced=True, tooltip=tooltip)


def _dtype(chosen: str) -> Any:
    """The torch.dtype of a choice, None for auto."""
    import torch

    return None if chosen == "auto" else getattr(torch, chosen)


class LoadDiffusionModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MPSLoadDiffusionModel",
            display_name="Load Diffusion Model (MPS)",
            category=CATEGORY,
            description=(
                "Loads a diffusion model (Wan and every other model that ComfyUI knows) from GGUF or safetensors, also "
                "fp8, scaled fp8, int8 and MXFP8. Quantised weights stay as they are in the file; LoRAs are applied to "
                "them on the fly."
            ),
            search_aliases=["gguf", "fp8", "unet loader", "wan", "load model", "quantized", "apple", "mac"],
            inputs=[
                io.Combo.Input(
                    "unet_name",
                    options=model_files("diffusion_models"),
                    tooltip="A .gguf or .safetensors file (fp8 too) in models/diffusion_models or models/unet.",
                ),
                _dtype_input(
                    "Precision of the computation. auto follows the device and the model; float32 is exact and needs "
                    "twice the memory for activations."
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model, for samplers, LoRA loaders and ModelSampling nodes.")],
        )

    @classmethod
    def execute(cls, unet_name: str, dtype: str = "auto") -> io.NodeOutput:
        from ..quantization.comfy_loader import load_diffusion_model

        return io.NodeOutput(load_diffusion_model(model_path("diffusion_models", unet_name), _dtype(dtype)))


class LoadTextEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MPSLoadTextEncoder",
            display_name="Load Text Encoder (MPS)",
            category=CATEGORY,
            description=(
                "Loads a text encoder: UMT5 and T5 from GGUF, with the tokenizer rebuilt from the file, or any encoder "
                "that ComfyUI knows from safetensors, also fp8. Quantised weights and the embedding table stay as they "
                "are in the file."
            ),
            search_aliases=["clip loader", "gguf", "fp8", "umt5", "t5", "text encoder", "wan", "apple", "mac"],
            inputs=[
                *text_encoders.file_inputs(
                    "A .gguf or .safetensors file (fp8 too) in models/text_encoders or models/clip."
                ),
                text_encoders.device_input(),
            ],
            outputs=[io.Clip.Output(tooltip="The text encoder, for CLIP Text Encode.")],
        )

    @classmethod
    def execute(cls, clip_name: str, type: str = "wan", device: str = "auto") -> io.NodeOutput:
        return io.NodeOutput(text_encoders.load(model_path("text_encoders", clip_name), type, device))


class LoadVAE(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MPSLoadVAE",
            display_name="Load VAE (MPS)",
            category=CATEGORY,
            description="Loads a VAE (Wan 2.1, Wan 2.2 and every other that ComfyUI knows) from safetensors.",
            search_aliases=["vae loader", "wan vae", "apple", "mac"],
            inputs=[
                io.Combo.Input("vae_name", options=model_files("vae"), tooltip="A .safetensors file in models/vae."),
                _dtype_input("Precision of encoding and decoding. auto follows the device."),
            ],
            outputs=[io.Vae.Output(tooltip="The VAE, for VAE Decode and image-to-video nodes.")],
        )

    @classmethod
    def execute(cls, vae_name: str, dtype: str = "auto") -> io.NodeOutput:
        from ..quantization.comfy_loader import load_vae

        return io.NodeOutput(load_vae(model_path("vae", vae_name), _dtype(dtype)))


NODES: list[type[io.ComfyNode]] = [LoadDiffusionModel, LoadTextEncoder, LoadVAE]
