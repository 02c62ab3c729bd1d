"""What a model file may be instead of what was asked for, and the sentence that says so.

Kinds are told by tensor names, which differ between diffusion models, text encoders, language models, LoRAs and VAEs.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import safetensors

from . import t5

_LANGUAGE_MODEL_TENSORS = (
    "token_embd.weight",
    "output_norm.weight",
    "blk.0.attn_q.weight",
    "blk.0.attn_qkv.weight",
)

_LANGUAGE_MODEL_KEYS = ("model.embed_tokens.weight", "transformer.wte.weight", "tok_embeddings.weight")

ENCODER_KEYS = ("encoder.block.0.", "text_model.encoder.", "transformer.resblocks.")

DIFFUSION_KEYS = (
    "model.diffusion_model.",
    "blocks.0.",
    "double_blocks.",
    "transformer_blocks.",
    "joint_blocks.",
)


class ModelFileError(ValueError):
    """A model file cannot be used; the message is one sentence for the user."""


def few(names: Iterable[str]) -> str:
    """The first three names, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def starts_with_any(keys: Iterable[str], prefixes: tuple[str, ...]) -> bool:
    """Whether any key has one of the prefixes."""
    return any(key.startswith(prefixes) for key in keys)


def refuse_other_kinds(path: Path, keys: Iterable[str], architecture: str | None) -> None:
    """Raise for files that are no diffusion model, with the place where they belong."""
    keys = set(keys)
    if architecture in t5.ARCHITECTURES or starts_with_any(keys, ENCODER_KEYS):
        raise ModelFileError(
            f"{path.name} is a text encoder, not a diffusion model: load it with Load Text Encoder (MPS)."
        )
    if keys & {*_LANGUAGE_MODEL_TENSORS, *_LANGUAGE_MODEL_KEYS}:
        kind = f" (architecture {architecture})" if architecture else ""
        raise ModelFileError(
            f"{path.name} is a language model{kind}, not a diffusion model: choose a video or image model's file."
        )
    if any("lora_" in key or ".lora" in key for key in keys):
        raise ModelFileError(
            f"{path.name} is a LoRA, not a diffusion model: move it to models/loras and load it there."
        )
    if {"encoder.conv1.weight", "decoder.conv1.weight"} & keys or "decoder.conv_in.weight" in keys:
        raise ModelFileError(f"{path.name} is a VAE, not a diffusion model: load it with Load VAE (MPS).")


def unknown_model(path: Path, what: str) -> ModelFileError:
    """The error for a model that core does not recognise by ``what``."""
    return ModelFileError(
        f"{path.name} is no diffusion model that this ComfyUI knows ({what} not recognised): "
        "update ComfyUI or choose another file."
    )


def diffusion_model_given(path: Path) -> ModelFileError:
    """The error for a diffusion model in the place of a text encoder."""
    return ModelFileError(
        f"{path.name} is a diffusion model, not a text encoder: load it with Load Diffusion Model (MPS)."
    )


def first_line(error: BaseException) -> str:
    """What matters of an error of torch or core, without its full stop, for use inside a sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    detail = next((line for line in lines if "has shape" in line or "size mismatch" in line), lines[0] if lines else "")
    return detail[:200].rstrip(".: ") or type(error).__name__


def require_file(path: Path) -> None:
    """Raise ModelFileError unless there is a file with something in it."""
    if not path.exists():
        raise ModelFileError(f"{path.name} is missing or a broken link: put the file back or choose another.")
    if path.is_dir():
        raise ModelFileError(f"{path.name} is a folder, not a model file: choose the file in it.")
    if path.stat().st_size == 0:
        raise ModelFileError(f"{path.name} is empty (0 bytes): download it again.")


class one_sentence:
    """Turns any reading error of core's loader into a ModelFileError that names the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        require_file(self.path)

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (safetensors.SafetensorError, RuntimeError, ValueError, OSError, EOFError)):
            raise ModelFileError(f"{self.path.name} cannot be read ({first_line(error)}): download it again.") from None
