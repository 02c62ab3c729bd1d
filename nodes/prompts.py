"""Prompt nodes: text to conditioning without a text encoder that stays in memory."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..memory.comfy_server import show_text
from . import text_encoders
from .folders import model_path
from .rerun import always, file_fingerprint

CATEGORY = "Apple Silicon Video/conditioning"


class EncodePrompts(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MPSEncodePrompts",
            display_name="Encode Prompts (MPS)",
            category=CATEGORY,
            description=(
                "Encodes a positive and a negative prompt and gives the text encoder's memory back at once. Encoded "
                "prompts are kept on disk: a prompt that was used before loads no text encoder at all."
            ),
            search_aliases=["prompt", "clip text encode", "text encode", "prompt cache", "umt5", "t5", "low memory"],
            inputs=[
                *text_encoders.file_inputs("A .gguf or .safetensors file in models/text_encoders or models/clip."),
                io.String.Input(
                    "positive", multiline=True, dynamic_prompts=True, tooltip="What the video should show."
                ),
                io.String.Input(
                    "negative", multiline=True, dynamic_prompts=True, tooltip="What the video should not show."
                ),
                text_encoders.device_input(),
                io.Boolean.Input(
                    "keep_on_disk",
                    default=True,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "Keep encoded prompts in ComfyUI's user folder, 1 GiB at most. They are found again by the "
                        "text and the encoder's file; the text itself is not stored."
                    ),
                ),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="The positive prompt, for samplers."),
                io.Conditioning.Output(display_name="negative", tooltip="The negative prompt, for samplers."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, clip_name: str | None, **_: Any) -> Any:
        if clip_name is None:
            return always()
        try:
            return file_fingerprint(model_path("text_encoders", clip_name))
        except FileNotFoundError:
            return "missing"

    @classmethod
    def execute(
        cls,
        clip_name: str,
        type: str,
        positive: str,
        negative: str,
        device: str = "auto",
        keep_on_disk: bool = True,
    ) -> io.NodeOutput:
        from ..memory.comfy_prompts import default_cache, encode_prompts

        path = model_path("text_encoders", clip_name)
        result = encode_prompts(
            [positive, negative],
            path,
            lambda: text_encoders.load(path, type, device),
            {"type": type, "device": device},
            default_cache() if keep_on_disk else None,
        )
        report = f"{result.from_cache} of 2 from disk" if result.from_cache else "encoded"
        if not result.loaded_encoder:
            report = "both from disk, no text encoder loaded"
        show_text(report, cls.hidden.unique_id)
        return io.NodeOutput(*result.conditionings, ui=ui.PreviewText(report))


NODES: list[type[io.ComfyNode]] = [EncodePrompts]
