"""Builds ComfyUI's MODEL and CLIP from GGUF and safetensors files.

Detection and model classes are core's; this module provides the state dict of quantised weights, the operations and
the patcher, and turns what can be wrong with a file into one sentence.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.model_detection
import comfy.model_management
import comfy.sd
import comfy.text_encoders.wan
import comfy.utils
import safetensors
import torch

from ..mps_patches.comfy_attention import patch_model
from ..mps_patches.comfy_vae import patch_vae
from . import t5
from .comfy_ops import QuantizedOps
from .comfy_patcher import QuantizedModelPatcher
from .formats import FORMATS
from .gguf import GGUFFile
from .tensor import QuantizedWeight
from .tokenizer import sentencepiece_model

GGUF_SUFFIX = ".gguf"
_LANGUAGE_MODEL_TENSORS = (
    "token_embd.weight",
    "output_norm.weight",
    "blk.0.attn_q.weight",
    "blk.0.attn_qkv.weight",
)
_LANGUAGE_MODEL_KEYS = ("model.embed_tokens.weight", "transformer.wte.weight", "tok_embeddings.weight")
_ENCODER_KEYS = ("encoder.block.0.", "text_model.encoder.", "transformer.resblocks.")
_DIFFUSION_KEYS = (
    "model.diffusion_model.",
    "blocks.0.",
    "double_blocks.",
    "transformer_blocks.",
    "joint_blocks.",
)


class ModelFileError(ValueError):
    """A model file cannot be used; the message is one sentence for the user."""


def _gguf_state_dict(file: GGUFFile, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """All tensors of a file: quantised ones as QuantizedWeight reporting ``dtype``, plain ones as they are."""
    state_dict: dict[str, torch.Tensor] = {}
    for name, info in file.tensors.items():
        if info.type_name in FORMATS and info.type_name != "BF16":
            block_format = FORMATS[info.type_name]
            state_dict[name] = QuantizedWeight(file.raw(name), block_format, info.original_shape, dtype)
        else:
            state_dict[name] = file.tensor(name)
    return _with_conv3d_shapes(state_dict)


def _with_conv3d_shapes(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give Conv3d weights their five dimensions back where a file merged the first two.

    ggml has four dimensions, so stable-diffusion.cpp writes (output x input, depth, height, width). The bias tells
    the number of output channels.
    """
    for name, weight in state_dict.items():
        bias = state_dict.get(f"{name.removesuffix('.weight')}.bias")
        if weight.dim() != 4 or bias is None or weight.shape[0] == bias.shape[0] or weight.shape[0] % bias.shape[0]:
            continue
        state_dict[name] = weight.reshape(bias.shape[0], weight.shape[0] // bias.shape[0], *weight.shape[1:])
    return state_dict


def _few(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _starts_with_any(keys: Iterable[str], prefixes: tuple[str, ...]) -> bool:
    return any(key.startswith(prefixes) for key in keys)


def _refuse_other_kinds(path: Path, keys: Iterable[str], architecture: str | None) -> None:
    """Raise for files that are no diffusion model, with the place where they belong."""
    keys = set(keys)
    if architecture in t5.ARCHITECTURES or _starts_with_any(keys, _ENCODER_KEYS):
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


def load_diffusion_model(path: Path, dtype: torch.dtype | None = None) -> Any:
    """Load a diffusion model as core's MODEL.

    Args:
        path: a .gguf file, or anything that core's loader reads.
        dtype: compute dtype; None leaves the choice to core (by device and model).

    Raises:
        ModelFileError, GGUFError: the file cannot be used; one sentence.
    """
    path = Path(path)
    if path.suffix.lower() == GGUF_SUFFIX:
        return _load_gguf_diffusion_model(path, dtype)
    with _one_sentence(path):
        state_dict, metadata = comfy.utils.load_torch_file(str(path), return_metadata=True)
    options = {} if dtype is None else {"dtype": dtype}
    keys = list(state_dict)
    patcher = comfy.sd.load_diffusion_model_state_dict(state_dict, model_options=options, metadata=metadata)
    if patcher is None:
        _refuse_other_kinds(path, keys, None)
        raise _unknown_model(path, "its tensor names")
    patcher.cached_patcher_init = (comfy.sd.load_diffusion_model, (str(path), options))
    return patch_model(patcher)


def _load_gguf_diffusion_model(path: Path, dtype: torch.dtype | None, disable_dynamic: bool = True) -> Any:
    """``disable_dynamic`` is how core calls a patcher's ``cached_patcher_init``; a quantised model is never dynamic."""
    file = GGUFFile(path)
    _refuse_other_kinds(path, file.tensors, file.architecture)
    state_dict = _gguf_state_dict(file, torch.float16)
    names = dict(state_dict)
    options: dict[str, Any] = {"custom_operations": QuantizedOps}
    if dtype is not None:
        options["dtype"] = dtype
    try:
        patcher = comfy.sd.load_diffusion_model_state_dict(state_dict, model_options=options, disable_dynamic=True)
    except KeyError as error:
        raise ModelFileError(
            f"{path.name} lacks {error.args[0]}, by which its model is recognised: the file is incomplete, "
            "download it again."
        ) from None
    except (RuntimeError, IndexError, AttributeError, TypeError, ValueError) as error:
        raise ModelFileError(
            f"{path.name} does not fit the model it looks like ({_first_line(error)}): "
            "the file is incomplete or wrongly converted, download it again or use another conversion."
        ) from None
    if patcher is None:
        raise _unknown_model(
            path, f"the architecture {file.architecture!r}" if file.architecture else "its tensor names"
        )
    _require_all_weights(path, patcher.model, names)
    adopted = QuantizedModelPatcher.adopt(patcher)
    adopted.cached_patcher_init = (_load_gguf_diffusion_model, (path, dtype))
    logging.info("%s: %s, %d tensors, %s", path.name, type(adopted.model).__name__, len(names), _type_summary(file))
    return patch_model(adopted)


def _type_summary(file: GGUFFile) -> str:
    counts: dict[str, int] = {}
    for info in file.tensors.values():
        counts[info.type_name] = counts.get(info.type_name, 0) + 1
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items(), key=lambda item: -item[1]))


def _require_all_weights(path: Path, model: Any, loaded: dict[str, torch.Tensor]) -> None:
    """Raise if the model has parameters that the file did not provide."""
    diffusion_model = model.diffusion_model
    missing = {name for name, parameter in diffusion_model.named_parameters() if parameter.is_meta}
    prefix = comfy.model_detection.unet_prefix_from_state_dict(loaded)
    given = {key.removeprefix(prefix): value for key, value in loaded.items()}
    provided = model.model_config.process_unet_state_dict(given).keys()
    expected = diffusion_model.state_dict().keys()
    if expected & provided:
        missing |= expected - provided
    if missing:
        raise ModelFileError(
            f"{path.name} lacks {len(missing)} of the weights its model needs ({_few(missing)}): "
            "the file is incomplete, download it again."
        )


def _unknown_model(path: Path, what: str) -> ModelFileError:
    return ModelFileError(
        f"{path.name} is no diffusion model that this ComfyUI knows ({what} not recognised): "
        "update ComfyUI or choose another file."
    )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    detail = next((line for line in lines if "has shape" in line or "size mismatch" in line), lines[0] if lines else "")
    return detail[:200].rstrip(".: ") or type(error).__name__


class _one_sentence:
    """Turns any reading error of core's loader into a ModelFileError that names the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        if not self.path.exists():
            raise ModelFileError(f"{self.path.name} is missing or a broken link: put the file back or choose another.")
        if self.path.is_dir():
            raise ModelFileError(f"{self.path.name} is a folder, not a model file: choose the file in it.")
        if self.path.stat().st_size == 0:
            raise ModelFileError(f"{self.path.name} is empty (0 bytes): download it again.")

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (safetensors.SafetensorError, RuntimeError, ValueError, OSError, EOFError)):
            raise ModelFileError(
                f"{self.path.name} cannot be read ({_first_line(error)}): download it again."
            ) from None


def load_text_encoder(
    path: Path,
    clip_type: str = "wan",
    embedding_folders: list[str] | None = None,
    on_cpu: bool = False,
) -> Any:
    """Load a text encoder as core's CLIP.

    Args:
        path: a T5 or UMT5 encoder in llama.cpp's GGUF naming, or anything that core's loader reads.
        clip_type: what the encoder is for, in the words of core's CLIPLoader ("wan", "flux", ...).
        embedding_folders: where textual inversion embeddings lie.
        on_cpu: never run it on the GPU.

    Raises:
        ModelFileError, GGUFError: the file cannot be used; one sentence.
    """
    path = Path(path)
    kind = getattr(comfy.sd.CLIPType, clip_type.upper(), comfy.sd.CLIPType.STABLE_DIFFUSION)
    if path.suffix.lower() == GGUF_SUFFIX:
        return _load_gguf_text_encoder(path, kind, embedding_folders, _encoder_device(on_cpu, ()))
    with _one_sentence(path):
        state_dict, metadata = comfy.utils.load_torch_file(str(path), safe_load=True, return_metadata=True)
    if _starts_with_any(state_dict, _DIFFUSION_KEYS):
        raise _diffusion_model_given(path)
    if comfy.sd.detect_te_model(state_dict) is None and not _starts_with_any(state_dict, _ENCODER_KEYS):
        raise ModelFileError(
            f"{path.name} is no text encoder that this ComfyUI knows: choose a file made for models/text_encoders."
        )
    options = _encoder_device(on_cpu, {tensor.dtype for tensor in state_dict.values() if tensor.dim() > 1})
    state_dict, _ = comfy.utils.convert_old_quants(state_dict, model_prefix="", metadata=metadata)
    return comfy.sd.load_text_encoder_state_dicts(
        [state_dict], embedding_directory=embedding_folders, clip_type=kind, model_options=options
    )


def _encoder_device(on_cpu: bool, dtypes: Iterable[torch.dtype]) -> dict[str, Any]:
    """Loading options that place the encoder.

    Core keeps text encoders on the CPU when GPU and CPU share memory (the state on every Mac), which costs minutes
    per prompt. Here they run on MPS when each of their dtypes exists there.
    """
    cpu = torch.device("cpu")
    if on_cpu:
        return {"load_device": cpu, "offload_device": cpu, "initial_device": cpu}
    device = comfy.model_management.get_torch_device()
    if device.type != "mps" or not all(comfy.model_management.supports_cast(device, dtype) for dtype in dtypes):
        return {}
    return {"load_device": device, "offload_device": cpu, "initial_device": cpu}


def _diffusion_model_given(path: Path) -> ModelFileError:
    return ModelFileError(
        f"{path.name} is a diffusion model, not a text encoder: load it with Load Diffusion Model (MPS)."
    )


def _load_gguf_text_encoder(path: Path, kind: Any, embedding_folders: list[str] | None, options: dict[str, Any]) -> Any:
    file = GGUFFile(path)
    if file.architecture not in t5.ARCHITECTURES:
        if _starts_with_any(file.tensors, _DIFFUSION_KEYS):
            raise _diffusion_model_given(path)
        raise ModelFileError(
            f"{path.name} has the architecture {file.architecture!r}, and only T5 and UMT5 are read from GGUF: "
            "choose a umt5-xxl-encoder file, or load this one from safetensors."
        )
    by_llama_name = _gguf_state_dict(file, torch.float16)
    renamed = ((t5.transformers_name(name), tensor) for name, tensor in by_llama_name.items())
    state_dict = {name: tensor for name, tensor in renamed if name is not None}
    try:
        config = t5.encoder_config(state_dict)
    except KeyError as error:
        raise ModelFileError(
            f"{path.name} lacks the encoder weight {error.args[0]}: the file is incomplete, download it again."
        ) from None

    options = {**options, "custom_operations": QuantizedOps}
    try:
        if kind == comfy.sd.CLIPType.WAN:
            clip = _umt5_clip(path, file, state_dict, config, embedding_folders, options)
        else:
            clip = comfy.sd.load_text_encoder_state_dicts(
                [state_dict],
                embedding_directory=embedding_folders,
                clip_type=kind,
                model_options=options,
                disable_dynamic=True,
            )
    except RuntimeError as error:
        raise ModelFileError(
            f"{path.name} does not fit the text encoder of {kind.name.lower()} ({_first_line(error)}): "
            "choose the type that belongs to this file, or another conversion."
        ) from None
    missing = {name for name, parameter in clip.cond_stage_model.named_parameters() if parameter.is_meta}
    if missing:
        raise ModelFileError(
            f"{path.name} lacks {len(missing)} weights of the text encoder that {kind.name.lower()} needs "
            f"({_few(missing)}): choose the type that belongs to this file."
        )
    clip.patcher = QuantizedModelPatcher.adopt(clip.patcher)
    return clip


def _umt5_clip(
    path: Path,
    file: GGUFFile,
    state_dict: dict[str, torch.Tensor],
    config: dict[str, int],
    embedding_folders: list[str] | None,
    options: dict[str, Any],
) -> Any:
    """Core's Wan text encoder with the file's own size and vocabulary.

    Core recognises a UMT5-XXL by its 24th layer; here the file's tensors say what it is, so encoders of any depth load.
    """
    if not t5.is_umt5(state_dict, config["num_layers"]):
        raise ModelFileError(
            f"{path.name} is a T5 encoder, and Wan needs a UMT5: choose a umt5-xxl-encoder file, or the type that "
            "belongs to this one."
        )
    try:
        vocabulary = sentencepiece_model(file.metadata)
    except KeyError as error:
        raise ModelFileError(
            f"{path.name} has no vocabulary ({error.args[0]} is absent): use a conversion that includes the tokenizer."
        ) from None
    except ValueError as error:
        raise ModelFileError(f"{path.name} cannot be used for Wan: {error}; choose a umt5-xxl-encoder file.") from None
    target = SimpleNamespace(
        params={},
        clip=comfy.text_encoders.wan.te(dtype_t5=torch.float32),
        tokenizer=comfy.text_encoders.wan.WanT5Tokenizer,
    )
    return comfy.sd.CLIP(
        target,
        embedding_directory=embedding_folders,
        tokenizer_data={"spiece_model": torch.frombuffer(bytearray(vocabulary), dtype=torch.uint8)},
        parameters=sum(tensor.numel() for tensor in state_dict.values()),
        state_dict=[state_dict],
        model_options={**options, "umt5xxl_model_config": config},
        disable_dynamic=True,
    )


def load_vae(path: Path, dtype: torch.dtype | None = None) -> Any:
    """Load a VAE as core's VAE; ``dtype`` None leaves the precision to core.

    Raises:
        ModelFileError: the file cannot be used; one sentence.
    """
    path = Path(path)
    if path.suffix.lower() == GGUF_SUFFIX:
        raise ModelFileError(f"{path.name} is a GGUF file, and VAEs come as safetensors: choose the .safetensors file.")
    with _one_sentence(path):
        state_dict, metadata = comfy.utils.load_torch_file(str(path), return_metadata=True)
        vae = comfy.sd.VAE(sd=state_dict, dtype=dtype, metadata=metadata)
    if vae.first_stage_model is None:
        raise ModelFileError(f"{path.name} is no VAE that this ComfyUI knows: choose a file made for models/vae.")
    return patch_vae(vae)
