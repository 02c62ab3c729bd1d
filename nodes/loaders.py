"""Loader nodes: diffusion model, text encoder and VAE as core's MODEL, CLIP and VAE."""

from __future__ import annotations

import folder_paths
from comfy_api.latest import io

import nodes as core_nodes

from .folders import model_files, model_path

CATEGORY = "Apple Silicon Video/loaders"
DTYPES = ["auto", "float16", "bfloat16", "float32"]


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
                io.Combo.Input(
                    "dtype",
                    options=DTYPES,
                    default="auto",
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "Precision of the computation. auto follows the device and the model; float32 is exact and "
                        "needs twice the memory for activations."
                    ),
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model, for samplers, LoRA loaders and ModelSampling nodes.")],
        )

    @classmethod
    def execute(cls, unet_name: str, dtype: str = "auto") -> io.NodeOutput:
        import torch

        from ..quantization.comfy_loader import load_diffusion_model

        compute_dtype = None if dtype == "auto" else getattr(torch, dtype)
        return io.NodeOutput(load_diffusion_model(model_path("diffusion_models", unet_name), compute_dtype))


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
                io.Combo.Input(
                    "clip_name",
                    options=model_files("text_encoders"),
                    tooltip="A .gguf or .safetensors file (fp8 too) in models/text_encoders or models/clip.",
                ),
                io.Combo.Input(
                    "type",
                    options=core_nodes.CLIPLoader.INPUT_TYPES()["required"]["type"][0],  # type: ignore[attr-defined]
                    default="wan",
                    tooltip="The family of models the encoder is for: wan for Wan 2.1 and 2.2.",
                ),
                io.Combo.Input(
                    "device",
                    options=["auto", "cpu"],
                    default="auto",
                    optional=True,
                    advanced=True,
                    tooltip="auto runs the encoder on the GPU when every weight can be used there; cpu never does.",
                ),
            ],
            outputs=[io.Clip.Output(tooltip="The text encoder, for CLIP Text Encode.")],
        )

    @classmethod
    def execute(cls, clip_name: str, type: str = "wan", device: str = "auto") -> io.NodeOutput:
        from ..quantization.comfy_loader import load_text_encoder

        path = model_path("text_encoders", clip_name)
        embeddings = folder_paths.get_folder_paths("embeddings")
        return io.NodeOutput(load_text_encoder(path, type, embeddings, on_cpu=device == "cpu"))


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
                io.Combo.Input(
                    "vae_name",
                    options=folder_paths.get_filename_list("vae"),
                    tooltip="A .safetensors file in models/vae.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=DTYPES,
                    default="auto",
                    optional=True,
                    advanced=True,
                    tooltip="Precision of encoding and decoding. auto follows the device.",
                ),
            ],
            outputs=[io.Vae.Output(tooltip="The VAE, for VAE Decode and image-to-video nodes.")],
        )

    @classmethod
    def execute(cls, vae_name: str, dtype: str = "auto") -> io.NodeOutput:
        import torch

        from ..quantization.comfy_loader import load_vae

        path = folder_paths.get_full_path("vae", vae_name)
        if path is None:
            raise FileNotFoundError(f"{vae_name} is not in models/vae (or its link is broken): put it there.")
        return io.NodeOutput(load_vae(path, None if dtype == "auto" else getattr(torch, dtype)))


NODES = [LoadDiffusionModel, LoadTextEncoder, LoadVAE]
