"""Opens what can be quantised, a piece at a time: safetensors (one file or shards), or another GGUF file.

Pieces are read, not mapped, so that memory stays small whatever the file's size. Names and shapes become those of
published GGUF files: native Wan names, llama.cpp's for T5 and UMT5 encoders. The diffusers names are facts from
diffusers' Wan conversion script.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch

from .formats import FORMATS, dequantize
from .gguf import GGUFError, GGUFFile
from .gguf_layout import STORED_TYPES_BY_NAME
from .quantizer import QuantizeError
from .safetensors_file import DTYPES, SafetensorsError, SafetensorsShards
from .scaled_formats import ScaledFormat, Scales, dequantize_scaled, matrix_shape
from .scaled_layouts import ScaledLayer, layer_scales, model_names, scaled_layers
from .t5 import transformers_name

_DENSE_TYPES = ("F64", "F32", "F16", "BF16")
_VOCABULARY = "spiece_model"
_PREFIXES = ("model.diffusion_model.", "diffusion_model.")

_DIFFUSERS_MARK = "condition_embedder."
_DIFFUSERS_NAMES = (
    ("condition_embedder.time_embedder.linear_1.", "time_embedding.0."),
    ("condition_embedder.time_embedder.linear_2.", "time_embedding.2."),
    ("condition_embedder.text_embedder.linear_1.", "text_embedding.0."),
    ("condition_embedder.text_embedder.linear_2.", "text_embedding.2."),
    ("condition_embedder.time_proj.", "time_projection.1."),
    ("condition_embedder.image_embedder.norm1.", "img_emb.proj.0."),
    ("condition_embedder.image_embedder.ff.net.0.proj.", "img_emb.proj.1."),
    ("condition_embedder.image_embedder.ff.net.2.", "img_emb.proj.3."),
    ("condition_embedder.image_embedder.norm2.", "img_emb.proj.4."),
    ("condition_embedder.image_embedder.pos_embed", "img_emb.emb_pos"),
    (".attn1.", ".self_attn."),
    (".attn2.", ".cross_attn."),
    (".to_q.", ".q."),
    (".to_k.", ".k."),
    (".to_v.", ".v."),
    (".to_out.0.", ".o."),
    (".add_k_proj.", ".k_img."),
    (".add_v_proj.", ".v_img."),
    (".norm_added_k.", ".norm_k_img."),
    (".norm2.", ".norm3."),
    (".ffn.net.0.proj.", ".ffn.0."),
    (".ffn.net.2.", ".ffn.2."),
    (".proj_in.", ".before_proj."),
    (".proj_out.", ".after_proj."),
    (".scale_shift_table", ".modulation"),
)
_DIFFUSERS_WHOLE = {
    "scale_shift_table": "head.modulation",
    "proj_out.weight": "head.head.weight",
    "proj_out.bias": "head.head.bias",
}

_ENCODER_PARTS = (
    "attn_q", "attn_k", "attn_v", "attn_o", "attn_rel_b", "attn_norm", "ffn_gate", "ffn_up", "ffn_down", "ffn_norm",
)  # fmt: skip
_ENCODER_BLOCK = re.compile(r"encoder\.block\.(\d+)\.layer\.0\.SelfAttention\.q\.")
_ENCODER_EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight")


class Tensor(Protocol):
    """A tensor of a source: its shape, its type's name, and its weights from one position to another."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def type_name(self) -> str: ...

    def read(self, start: int, stop: int) -> torch.Tensor: ...


@dataclass(frozen=True)
class DenseTensor:
    """A tensor of a safetensors file."""

    path: Path
    shape: tuple[int, ...]
    type_name: str
    offset: int

    def read(self, start: int, stop: int) -> torch.Tensor:
        """The weights from position ``start`` up to ``stop``, flat."""
        dtype = DTYPES[self.type_name]
        return _read(self.path, self.offset + start * dtype.itemsize, (stop - start) * dtype.itemsize).view(dtype)


@dataclass(frozen=True)
class ScaledTensor:
    """A one-byte weight (fp8, int8, MXFP8) of a safetensors file, with its scales."""

    path: Path
    shape: tuple[int, ...]
    format: ScaledFormat
    offset: int
    scales: Scales | None

    @property
    def type_name(self) -> str:
        """The format's name."""
        return self.format.name

    def read(self, start: int, stop: int) -> torch.Tensor:
        """The weights from position ``start`` up to ``stop``, flat, float32; whole rows are read and decoded."""
        rows, columns = matrix_shape(self.shape if len(self.shape) > 1 else (1, prod(self.shape)))
        first, last = start // columns, min(-(-stop // columns), rows)
        data = _read(self.path, self.offset + first * columns, (last - first) * columns)
        scales = None if self.scales is None else self.scales.cut(first, last)
        dense = dequantize_scaled(data, self.format, (last - first, columns), scales)
        return dense.view(-1)[start - first * columns : stop - first * columns]


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor of a GGUF file."""

    path: Path
    shape: tuple[int, ...]
    type_name: str
    offset: int

    def read(self, start: int, stop: int) -> torch.Tensor:
        """The weights from position ``start`` up to ``stop``, both at the beginning of a block, flat."""
        stored = STORED_TYPES_BY_NAME[self.type_name]
        first, last = start // stored.block_size, -(-stop // stored.block_size)
        data = _read(self.path, self.offset + first * stored.block_bytes, (last - first) * stored.block_bytes)
        if stored.dtype is not None:
            return data.view(stored.dtype)
        return dequantize(data, FORMATS[self.type_name], ((last - first) * stored.block_size,))


@dataclass(frozen=True)
class Source:
    """What is to be quantised.

    ``tensors`` have the names of published GGUF files. ``architecture`` is GGUF's: "wan" or "t5encoder".
    ``metadata`` are the entries to take over (key, value, kind); ``vocabulary`` is a SentencePiece model.
    ``notes`` are sentences for the report.
    """

    path: Path
    architecture: str
    tensors: dict[str, Tensor]
    metadata: list[tuple[str, Any, str]] = field(default_factory=list)
    vocabulary: bytes | None = None
    notes: tuple[str, ...] = ()


def open_source(path: Path) -> Source:
    """Open a file to quantise.

    Args:
        path: .gguf; .safetensors, also one shard of several; the shards' .safetensors.index.json; or the folder of one
            model.

    Raises:
        QuantizeError, GGUFError: it cannot be read or is no Wan model and no T5 or UMT5 encoder.
    """
    try:
        if path.suffix == ".gguf":
            return _gguf_source(path)
        tensors, vocabulary = _safetensors(path)
    except OSError as error:
        raise QuantizeError(f"{path} cannot be read ({error.strerror}): check the name and its permissions.") from error
    if any(_ENCODER_BLOCK.match(name) for name in tensors):
        return Source(path, "t5encoder", _encoder_tensors(path, tensors), vocabulary=_spiece(path, vocabulary))
    return Source(path, "wan", _wan_tensors(path, tensors))


def native_name(name: str) -> str:
    """Native Wan name of a tensor in diffusers' naming."""
    if name in _DIFFUSERS_WHOLE:
        return _DIFFUSERS_WHOLE[name]
    for theirs, ours in _DIFFUSERS_NAMES:
        name = name.replace(theirs, ours)
    return name


def _read(path: Path, offset: int, size: int) -> torch.Tensor:
    data = bytearray(size)
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            count = file.readinto(data)
    except OSError as error:
        raise QuantizeError(f"{path} cannot be read ({error.strerror}): check the disk and try again.") from error
    if count != size:
        raise QuantizeError(f"{path.name} ends too early: the download is not complete, download it again.")
    return torch.frombuffer(data, dtype=torch.uint8) if size else torch.empty(0, dtype=torch.uint8)


def _without_prefix(names: Iterable[str]) -> dict[str, str]:
    names = list(names)
    for prefix in _PREFIXES:
        if any(name.startswith(prefix) for name in names):
            return {name: name.removeprefix(prefix) for name in names if name.startswith(prefix)}
    return {name: name for name in names}


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts block 2 before block 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _wan_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    names = _without_prefix(tensors)
    if any(name.startswith(_DIFFUSERS_MARK) for name in names.values()):
        names = {old: native_name(new) for old, new in names.items()}
    renamed = {new: tensors[old] for old, new in sorted(names.items(), key=lambda item: _natural(item[1]))}
    if "blocks.0.self_attn.q.weight" not in renamed or "head.modulation" not in renamed:
        raise QuantizeError(
            f"{path.name} is no Wan model and no T5 or UMT5 encoder (it lacks blocks.0.self_attn.q.weight): "
            "choose one of those."
        )
    return renamed


def _encoder_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    last = max(int(match[1]) for name in tensors if (match := _ENCODER_BLOCK.match(name)))
    wanted = [f"enc.blk.{block}.{part}.weight" for block in range(last + 1) for part in _ENCODER_PARTS]
    found: dict[str, Tensor] = {}
    embedding = next((tensors[name] for name in _ENCODER_EMBEDDINGS if name in tensors), None)
    if embedding is not None:
        found["token_embd.weight"] = embedding
    for name in [*wanted, "enc.output_norm.weight"]:
        theirs = transformers_name(name)
        if theirs in tensors:
            found[name] = tensors[theirs]
        elif "attn_rel_b" not in name or ".blk.0." in name:
            raise QuantizeError(f"{path.name} lacks the encoder's tensor {theirs}: download it again.")
    if embedding is None:
        raise QuantizeError(f"{path.name} lacks the embedding table shared.weight: choose the whole encoder's file.")
    return found


def _spiece(path: Path, vocabulary: Tensor | None) -> bytes:
    if vocabulary is not None:
        return vocabulary.read(0, prod(vocabulary.shape)).numpy().tobytes()
    folder = path if path.is_dir() else path.parent
    for place in (folder, folder / "tokenizer", folder.parent / "tokenizer"):
        for name in ("spiece.model", "sentencepiece.bpe.model"):
            if (place / name).is_file():
                return (place / name).read_bytes()
    raise QuantizeError(
        f"{path.name} has no vocabulary (spiece_model) and no spiece.model lies beside it: "
        "put the tokenizer's spiece.model into the same folder."
    )


def _gguf_source(path: Path) -> Source:
    file = GGUFFile(path)
    tensors: dict[str, Tensor] = {
        name: GGUFTensor(path, info.original_shape, info.type_name, info.offset) for name, info in file.tensors.items()
    }
    if file.architecture in ("t5", "t5encoder") or "enc.blk.0.attn_q.weight" in tensors:
        kept = {name: tensor for name, tensor in tensors.items() if transformers_name(name) is not None}
        architecture = "t5encoder"
    elif file.architecture in (None, "wan"):
        kept, architecture = _wan_tensors(path, tensors), "wan"
    else:
        raise GGUFError(
            f"{path.name} holds a model of the kind {file.architecture!r}: choose a Wan model or a T5 encoder."
        )
    skipped = ("general.architecture", "general.file_type", "general.quantization_version", "general.alignment")
    metadata = [
        (key.replace("t5.", "t5encoder.", 1) if key.startswith("t5.") else key, value, file.metadata.kind(key))
        for key, value in file.metadata.items()
        if key not in skipped and not key.startswith("comfy.gguf.orig_shape.")
    ]
    return Source(path, architecture, kept, metadata)


def _safetensors(path: Path) -> tuple[dict[str, Tensor], Tensor | None]:
    """All tensors of a model, one-byte weights with their scales, and its vocabulary if the file has one."""
    tensors = safetensors_tensors(path, _shards(path))
    vocabulary = tensors.pop(_VOCABULARY, None)
    for name, tensor in tensors.items():
        if isinstance(tensor, DenseTensor) and tensor.type_name not in _DENSE_TYPES:
            raise QuantizeError(
                f"{path.name} holds {name} as {tensor.type_name}, which cannot be quantised: "
                "choose the fp32, fp16, bf16 or fp8 file."
            )
    return tensors, vocabulary


def safetensors_tensors(path: Path, files: Iterable[Path]) -> dict[str, Tensor]:
    """The tensors of a model in one or several safetensors files; ``path`` is its name in messages.

    Raises:
        QuantizeError: a file is missing or damaged, or weights are stored in a way that cannot be decoded.
    """
    try:
        model = SafetensorsShards(path, files)
        layers = scaled_layers(model)
        return {name: _tensor(model, name, layers.get(name)) for name in model_names(model, layers)}
    except SafetensorsError as error:
        raise QuantizeError(str(error)) from None


def _tensor(model: SafetensorsShards, name: str, layer: ScaledLayer | None) -> Tensor:
    info = model.tensors[name]
    if layer is None:
        return DenseTensor(model.file_of(name), info.shape, info.type_name, info.offset)
    return ScaledTensor(model.file_of(name), info.shape, layer.format, info.offset, layer_scales(model, layer))


def _shards(path: Path) -> list[Path]:
    if path.is_dir():
        indexes, files = sorted(path.glob("*.safetensors.index.json")), sorted(path.glob("*.safetensors"))
        if len(indexes) != 1 and len(files) != 1:
            raise QuantizeError(f"{path} holds no model or several: give the .safetensors or .index.json file itself.")
        path = indexes[0] if len(indexes) == 1 else files[0]
    shard = re.fullmatch(r"(.+)-\d{5}-of-\d{5}\.safetensors", path.name)
    if shard:
        path = path.with_name(f"{shard[1]}.safetensors.index.json")
        if not path.is_file():
            raise QuantizeError(f"{path.name} is missing beside the shards of the model: download it too.")
    if path.suffix != ".json":
        return [path]
    try:
        names = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise QuantizeError(f"{path.name} is no index of safetensors shards: download it again.") from error
    files = [path.with_name(Path(name).name) for name in names]
    missing = next((file.name for file in files if not file.is_file()), None)
    if missing:
        raise QuantizeError(f"{missing}, which {path.name} names, is missing beside it: download all shards.")
    return files
