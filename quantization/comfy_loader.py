"""Builds ComfyUI's MODEL and CLIP from GGUF and safetensors files.

Detection and model classes are core's; this module provides the state dict of quantised weights, the operations and
the patcher, and turns what can be wrong with a file into one sentence.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.model_detection
import comfy.model_management
import comfy.quant_ops
import comfy.sd
import comfy.text_encoders.wan
import comfy.utils
import torch

from ..memory.comfy_activations import reduce_activations
from ..memory.comfy_runs import watch_runs
from ..memory.comfy_vae_stages import stream_vae
from ..mps_patches.comfy_attention import patch_model
from ..mps_patches.comfy_vae import patch_vae
from . import t5
from .comfy_ops import QuantizedOps
from .comfy_patcher import QuantizedCLIP, QuantizedModelPatcher
from .formats import FORMATS
from .gguf import GGUFFile
from .model_files import (
    DIFFUSION_KEYS,
    ENCODER_KEYS,
    ModelFileError,
    diffusion_model_given,
    few,
    first_line,
    one_sentence,
    refuse_other_kinds,
    require_file,
    starts_with_any,
    unknown_model,
)
from .safetensors_file import SafetensorsError, SafetensorsFile, UnsupportedFormatError
from .scaled_layouts import PLAIN, ScaledLayer, core_formats, scaled_layers, scaled_state_dict
from .tensor import QuantizedWeight
from .tokenizer import sentencepiece_model

GGUF_SUFFIX = ".gguf"
SAFETENSORS_SUFFIXES = (".safetensors", ".sft")
VOCABULARY_KEY = "spiece_model"
_FINAL_NORM = "encoder.final_layer_norm.weight"


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


def _open_own(path: Path, own_loader: bool | None) -> tuple[SafetensorsFile, dict[str, ScaledLayer]] | None:
    """The file and its one-byte weights if the pack loads it itself, None if core does.

    Core computes with float8 tensors, which MPS does not have, and copies dense weights, which doubles the memory of
    loading where the CPU's memory is the device's too. Elsewhere core's way is kept, unless this version of core lacks
    a layout of the file. ``own_loader`` overrides the choice.
    """
    if path.suffix.lower() not in SAFETENSORS_SUFFIXES or own_loader is False:
        return None
    on_mps = comfy.model_management.get_torch_device().type == "mps"
    try:
        file = SafetensorsFile(path)
        layers = scaled_layers(file)
    except SafetensorsError as error:
        if isinstance(error, UnsupportedFormatError) and own_loader is None and not on_mps:
            return None
        raise ModelFileError(str(error)) from None
    if own_loader is None:
        own_loader = _prefers_own(file, layers)
    return (file, layers) if own_loader else None


def _prefers_own(file: SafetensorsFile, layers: dict[str, ScaledLayer]) -> bool:
    device = comfy.model_management.get_torch_device()
    if device.type != "mps":
        return not core_formats(layers.values()) <= {PLAIN, *comfy.quant_ops.QUANT_ALGOS}
    return bool(layers) or _is_half_precision(file, device)


def _is_half_precision(file: SafetensorsFile, device: torch.device) -> bool:
    """Whether most of a dense file is of a half-precision type that ``device`` has; float32 is better cast by core."""
    sizes: dict[str, int] = Counter()
    for info in file.tensors.values():
        sizes[info.type_name] += info.nbytes
    usable = ["F16"]
    try:
        torch.zeros(1, dtype=torch.bfloat16, device=device)
        usable.append("BF16")
    except (TypeError, RuntimeError):
        pass
    return sum(sizes[name] for name in usable) > sum(sizes.values()) / 2


def _scaled_state_dict(
    file: SafetensorsFile, layers: dict[str, ScaledLayer], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    try:
        return scaled_state_dict(file, layers, dtype)
    except SafetensorsError as error:
        raise ModelFileError(str(error)) from None


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


def load_diffusion_model(path: Path, dtype: torch.dtype | None = None, own_loader: bool | None = None) -> Any:
    """Load a diffusion model as core's MODEL.

    Args:
        path: a .gguf file, or anything that core's loader reads.
        dtype: compute dtype; None leaves the choice to core (by device and model).
        own_loader: load safetensors in the pack's own way, the weights staying the file's bytes (True), or in core's
            (False); None is the pack's way on MPS (but for float32), and for fp8 layouts that this core lacks.

    Raises:
        ModelFileError, GGUFError: the file cannot be used; one sentence.
    """
    path = Path(path)
    if path.suffix.lower() == GGUF_SUFFIX:
        return _load_gguf_diffusion_model(path, dtype)
    require_file(path)
    opened = _open_own(path, own_loader)
    if opened is not None:
        return _load_own_diffusion_model(path, dtype, opened=opened)
    with one_sentence(path):
        state_dict, metadata = comfy.utils.load_torch_file(str(path), return_metadata=True)
    options = {} if dtype is None else {"dtype": dtype}
    keys = list(state_dict)
    patcher = comfy.sd.load_diffusion_model_state_dict(state_dict, model_options=options, metadata=metadata)
    if patcher is None:
        refuse_other_kinds(path, keys, None)
        raise unknown_model(path, "its tensor names")
    patcher.cached_patcher_init = (comfy.sd.load_diffusion_model, (str(path), options))
    return _prepared(patcher)


def _load_gguf_diffusion_model(path: Path, dtype: torch.dtype | None, disable_dynamic: bool = True) -> Any:
    """``disable_dynamic`` is how core calls a patcher's ``cached_patcher_init``; a quantised model is never dynamic."""
    file = GGUFFile(path)
    refuse_other_kinds(path, file.tensors, file.architecture)
    clue = f"the architecture {file.architecture!r}" if file.architecture else "its tensor names"
    patcher = _quantised_model(path, _gguf_state_dict(file, torch.float16), dtype, clue)
    patcher.cached_patcher_init = (_load_gguf_diffusion_model, (path, dtype))
    _log_loaded(path, patcher, [info.type_name for info in file.tensors.values()])
    return patcher


def _load_own_diffusion_model(
    path: Path,
    dtype: torch.dtype | None,
    disable_dynamic: bool = True,
    opened: tuple[SafetensorsFile, dict[str, ScaledLayer]] | None = None,
) -> Any:
    """``opened``: what ``_open_own`` returned, if the file is open already. ``disable_dynamic`` as above."""
    opened = opened or _open_own(path, own_loader=True)
    if opened is None:
        raise ModelFileError(f"{path.name} is no longer the file that was loaded: load it again.")
    file, layers = opened
    refuse_other_kinds(path, file.tensors, None)
    patcher = _quantised_model(path, _scaled_state_dict(file, layers, torch.float16), dtype, "its tensor names")
    patcher.cached_patcher_init = (_load_own_diffusion_model, (path, dtype))
    _log_loaded(path, patcher, [info.type_name for info in file.tensors.values()])
    return patcher


def _quantised_model(path: Path, state_dict: dict[str, torch.Tensor], dtype: torch.dtype | None, clue: str) -> Any:
    """core's MODEL of ``state_dict``, with QuantizedOps and the pack's patcher; ``clue``: what core knows it by."""
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
            f"{path.name} does not fit the model it looks like ({first_line(error)}): "
            "the file is incomplete or wrongly converted, download it again or use another conversion."
        ) from None
    if patcher is None:
        raise unknown_model(path, clue)
    _require_all_weights(path, patcher.model, names)
    return _prepared(QuantizedModelPatcher.adopt(patcher))


def _prepared(patcher: Any) -> Any:
    """A MODEL with what every model of this pack gets: right attention and fewer activations on MPS, a watched run."""
    return watch_runs(reduce_activations(patch_model(patcher)))


def _log_loaded(path: Path, patcher: Any, types: list[str]) -> None:
    logging.info("%s: %s, %d tensors, %s", path.name, type(patcher.model).__name__, len(types), _type_summary(types))


def _type_summary(types: list[str]) -> str:
    counts = sorted(Counter(types).items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {count}" for name, count in counts)


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
            f"{path.name} lacks {len(missing)} of the weights its model needs ({few(missing)}): "
            "the file is incomplete, download it again."
        )


def load_text_encoder(
    path: Path,
    clip_type: str = "wan",
    embedding_folders: list[str] | None = None,
    on_cpu: bool = False,
    own_loader: bool | None = None,
) -> Any:
    """Load a text encoder as core's CLIP.

    Args:
        path: a T5 or UMT5 encoder in llama.cpp's GGUF naming, or anything that core's loader reads.
        clip_type: what the encoder is for, in the words of core's CLIPLoader ("wan", "flux", ...).
        embedding_folders: where textual inversion embeddings lie.
        on_cpu: never run it on the GPU.
        own_loader: as for ``load_diffusion_model``.

    Raises:
        ModelFileError, GGUFError: the file cannot be used; one sentence.
    """
    path = Path(path)
    kind = getattr(comfy.sd.CLIPType, clip_type.upper(), comfy.sd.CLIPType.STABLE_DIFFUSION)
    if path.suffix.lower() == GGUF_SUFFIX:
        return _load_gguf_text_encoder(path, kind, embedding_folders, _encoder_device(on_cpu, ()))
    require_file(path)
    opened = _open_own(path, own_loader)
    if opened is not None and (opened[1] or (kind == comfy.sd.CLIPType.WAN and VOCABULARY_KEY in opened[0].tensors)):
        return _load_own_text_encoder(path, kind, embedding_folders, _encoder_device(on_cpu, ()), *opened)
    with one_sentence(path):
        state_dict, metadata = comfy.utils.load_torch_file(str(path), safe_load=True, return_metadata=True)
    if starts_with_any(state_dict, DIFFUSION_KEYS):
        raise diffusion_model_given(path)
    if comfy.sd.detect_te_model(state_dict) is None and not starts_with_any(state_dict, ENCODER_KEYS):
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


def _load_gguf_text_encoder(path: Path, kind: Any, embedding_folders: list[str] | None, options: dict[str, Any]) -> Any:
    file = GGUFFile(path)
    if file.architecture not in t5.ARCHITECTURES:
        if starts_with_any(file.tensors, DIFFUSION_KEYS):
            raise diffusion_model_given(path)
        raise ModelFileError(
            f"{path.name} has the architecture {file.architecture!r}, and only T5 and UMT5 are read from GGUF: "
            "choose a umt5-xxl-encoder file, or load this one from safetensors."
        )
    by_llama_name = _gguf_state_dict(file, torch.float16)
    renamed = ((t5.transformers_name(name), tensor) for name, tensor in by_llama_name.items())
    state_dict = {name: tensor for name, tensor in renamed if name is not None}
    config = _encoder_config(path, state_dict)
    if kind != comfy.sd.CLIPType.WAN:
        return _quantised_encoder(path, kind, state_dict, embedding_folders, options)
    _require_umt5(path, state_dict, config)
    try:
        vocabulary = sentencepiece_model(file.metadata)
    except KeyError as error:
        raise ModelFileError(
            f"{path.name} has no vocabulary ({error.args[0]} is absent): use a conversion that includes the tokenizer."
        ) from None
    except ValueError as error:
        raise ModelFileError(f"{path.name} cannot be used for Wan: {error}; choose a umt5-xxl-encoder file.") from None
    umt5 = _UMT5(config, torch.frombuffer(bytearray(vocabulary), dtype=torch.uint8), torch.float32)
    return _quantised_encoder(path, kind, state_dict, embedding_folders, options, umt5)


def _load_own_text_encoder(
    path: Path,
    kind: Any,
    embedding_folders: list[str] | None,
    options: dict[str, Any],
    file: SafetensorsFile,
    layers: dict[str, ScaledLayer],
) -> Any:
    if starts_with_any(file.tensors, DIFFUSION_KEYS):
        raise diffusion_model_given(path)
    state_dict = _scaled_state_dict(file, layers, torch.float16)
    vocabulary = state_dict.pop(VOCABULARY_KEY, None)
    if kind != comfy.sd.CLIPType.WAN or vocabulary is None:
        if comfy.sd.detect_te_model(state_dict) is None:
            raise ModelFileError(
                f"{path.name} is no text encoder that this ComfyUI knows: choose a file made for models/text_encoders."
            )
        return _quantised_encoder(path, kind, state_dict, embedding_folders, options)
    config = _encoder_config(path, state_dict)
    _require_umt5(path, state_dict, config)
    umt5 = _UMT5(config, vocabulary, state_dict[_FINAL_NORM].dtype)
    return _quantised_encoder(path, kind, state_dict, embedding_folders, options, umt5)


def _encoder_config(path: Path, state_dict: dict[str, torch.Tensor]) -> dict[str, int]:
    try:
        return t5.encoder_config(state_dict)
    except KeyError as error:
        raise ModelFileError(
            f"{path.name} lacks the encoder weight {error.args[0]}: the file is incomplete, download it again."
        ) from None


def _require_umt5(path: Path, state_dict: dict[str, torch.Tensor], config: dict[str, int]) -> None:
    if not t5.is_umt5(state_dict, config["num_layers"]):
        raise ModelFileError(
            f"{path.name} is a T5 encoder, and Wan needs a UMT5: choose a umt5-xxl-encoder file, or the type that "
            "belongs to this one."
        )


@dataclass(frozen=True)
class _UMT5:
    """Wan's encoder as a file has it: hyperparameters, SentencePiece model (uint8), dtype asked of core."""

    config: dict[str, int]
    vocabulary: torch.Tensor
    dtype: torch.dtype


def _quantised_encoder(
    path: Path,
    kind: Any,
    state_dict: dict[str, torch.Tensor],
    embedding_folders: list[str] | None,
    options: dict[str, Any],
    umt5: _UMT5 | None = None,
) -> Any:
    """core's CLIP of a state dict in transformers' naming, with QuantizedOps and the pack's patcher."""
    options = {**options, "custom_operations": QuantizedOps}
    try:
        if umt5 is not None:
            clip = _umt5_clip(state_dict, umt5, embedding_folders, options)
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
            f"{path.name} does not fit the text encoder of {kind.name.lower()} ({first_line(error)}): "
            "choose the type that belongs to this file, or another conversion."
        ) from None
    missing = {name for name, parameter in clip.cond_stage_model.named_parameters() if parameter.is_meta}
    if missing:
        raise ModelFileError(
            f"{path.name} lacks {len(missing)} weights of the text encoder that {kind.name.lower()} needs "
            f"({few(missing)}): choose the type that belongs to this file."
        )
    clip.patcher = QuantizedModelPatcher.adopt(clip.patcher)
    return QuantizedCLIP.adopt(clip)


def _umt5_clip(
    state_dict: dict[str, torch.Tensor], umt5: _UMT5, embedding_folders: list[str] | None, options: dict[str, Any]
) -> Any:
    """Core's Wan text encoder with the file's own size and vocabulary.

    Core recognises a UMT5-XXL by its 24th layer; here the file's tensors say what it is, so encoders of any depth load.
    """
    target = SimpleNamespace(
        params={},
        clip=comfy.text_encoders.wan.te(dtype_t5=umt5.dtype),
        tokenizer=comfy.text_encoders.wan.WanT5Tokenizer,
    )
    return comfy.sd.CLIP(
        target,
        embedding_directory=embedding_folders,
        tokenizer_data={VOCABULARY_KEY: umt5.vocabulary},
        parameters=sum(tensor.numel() for tensor in state_dict.values()),
        state_dict=[state_dict],
        model_options={**options, "umt5xxl_model_config": umt5.config},
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
    with one_sentence(path):
        state_dict, metadata = comfy.utils.load_torch_file(str(path), return_metadata=True)
        vae = comfy.sd.VAE(sd=state_dict, dtype=dtype, metadata=metadata)
    if vae.first_stage_model is None:
        raise ModelFileError(f"{path.name} is no VAE that this ComfyUI knows: choose a file made for models/vae.")
    return stream_vae(patch_vae(vae))
