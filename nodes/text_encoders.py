"""What the nodes that load a text encoder share: its file, its family, its device, and the loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

import nodes as core_nodes

from .folders import model_files


def file_inputs(tooltip: str) -> list[Any]:
    """``clip_name`` and ``type``; the tooltip is the first one's."""
    return [
        io.Combo.Input("clip_name", options=model_files("text_encoders"), tooltip=tooltip),
        io.Combo.Input(
            "type",
            options=core_nodes.CLIPLoader.INPUT_TYPES()["required"]["type"][0],  # type: ignore[attr-defined]
            default="wan",
            tooltip="The family of models the encoder is for: wan for Wan 2.1 and 2.2.",
        ),
    ]


def device_input() -> io.Combo.Input:
    """``device``, an advanced input."""
    return io.Combo.Input(
        "device",
        options=["auto", "cpu"],
        default="auto",
        optional=True,
        advanced=True,
        tooltip="auto runs the encoder on the GPU when every weight can be used there; cpu never does.",
    )


def load(path: Path, family: str, device: str) -> Any:
    """A CLIP of the file, by the values of ``type`` and ``device``."""
    from ..quantization.comfy_loader import load_text_encoder

    return load_text_encoder(path, family, folder_paths.get_folder_paths("embeddings"), on_cpu=device == "cpu")
