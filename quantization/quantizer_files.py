"""Quantises a model file to GGUF: which types, what metadata, one tensor at a time, and a report of the errors.

Keys and metadata follow the published Wan files (ComfyUI-GGUF) and llama.cpp's T5 encoders. Tensors of five
dimensions keep their shape.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod, sqrt
from pathlib import Path

import numpy as np

from .gguf_writer import GGUFWriter
from .quantizer import QuantizeError, quantized_pieces
from .quantizer_imatrix import read_importance
from .quantizer_lora import with_loras
from .quantizer_sources import Source, open_source
from .quantizer_vocabulary import write_vocabulary
from .recipes import FILE_TYPES, RECIPES, Types, encoder_types, wan_types

QUANTIZATION_VERSION = 2
_CONTEXT = 512
_EPSILON = 1e-6
_BUCKETS = 32

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class TensorReport:
    """One tensor written: ``error`` is the root mean square of the errors over that of the weights."""

    name: str
    type_name: str
    weights: int
    nbytes: int
    error: float


@dataclass(frozen=True)
class Report:
    """A file written, its size in bytes, its tensors in the file's order and what else is worth knowing."""

    path: Path
    size: int
    tensors: tuple[TensorReport, ...]
    notes: tuple[str, ...] = ()

    @property
    def bits_per_weight(self) -> float:
        """Of all tensors together."""
        return 8 * sum(t.nbytes for t in self.tensors) / sum(t.weights for t in self.tensors)

    def worst(self, count: int = 5) -> list[TensorReport]:
        """The tensors with the largest errors, largest first."""
        return sorted(self.tensors, key=lambda tensor: -tensor.error)[:count]

    def text(self) -> str:
        """The report as lines for people."""
        lines = [
            f"{self.path.name}: {self.size / 2**30:.2f} GiB, {len(self.tensors)} tensors, "
            f"{self.bits_per_weight:.2f} bits per weight",
            "largest errors (relative to the weights):",
            *(f"  {100 * t.error:6.2f} %  {t.type_name:<6}  {t.name}" for t in self.worst()),
            *self.notes,
        ]
        return "\n".join(lines)


def default_threads() -> int:
    """As many as there are processors, at most eight."""
    return min(os.cpu_count() or 1, 8)


def quantize_file(
    source_path: Path,
    destination: Path,
    recipe: str,
    threads: int | None = None,
    imatrix: Path | None = None,
    loras: Sequence[tuple[Path, float]] = (),
    progress: Progress | None = None,
) -> Report:
    """Quantise a model file; the new one appears at its name when it is complete.

    Args:
        source_path: as for ``open_source``.
        destination: the .gguf file to make; an existing one is replaced.
        recipe: one of ``RECIPES``.
        threads: to compute with; None for ``default_threads()``. The result does not depend on it.
        imatrix: importance matrix in one of llama.cpp's formats, with the tensors' names of the new file.
        loras: files and strengths of LoRAs to merge in.
        progress: called with weights done, weights of all tensors and the tensor's name; may raise to stop.

    Raises:
        QuantizeError, GGUFError: the source cannot be read or quantised, or the destination not be written.
    """
    if recipe not in RECIPES:
        raise QuantizeError(f"{recipe!r} is no type of file that can be made: choose one of {', '.join(RECIPES)}.")
    if destination.exists() and source_path.exists() and destination.samefile(source_path):
        raise QuantizeError(f"{destination.name} would replace the file it is made from: choose another name.")
    source = with_loras(open_source(source_path), loras)
    importance = _matched(read_importance(imatrix), source, imatrix) if imatrix is not None else {}
    types = _types(source, recipe)
    writer = GGUFWriter(destination)
    _write_metadata(writer, source, recipe)
    reports: dict[str, TensorReport] = {}
    total = sum(prod(tensor.shape) for tensor in source.tensors.values())
    done = 0

    def pieces(name: str) -> Iterator[np.ndarray]:
        nonlocal done
        tensor = source.tensors[name]
        errors = weights = nbytes = 0.0
        stream = quantized_pieces(
            tensor.read, tensor.shape, types[name], importance.get(name), threads or default_threads(), name
        )
        for piece in stream:
            errors, weights = errors + piece.squared_error, weights + piece.squared_weights
            nbytes += piece.data.nbytes
            yield piece.data
            done += piece.weights
            if progress is not None:
                progress(done, total, name)
        error = sqrt(errors / weights) if weights else 0.0
        reports[name] = TensorReport(name, types[name], prod(tensor.shape), int(nbytes), error)

    for name, tensor in source.tensors.items():
        writer.tensor(name, tensor.shape, types[name], lambda name=name: pieces(name))  # type: ignore[misc]
    try:
        writer.write()
    except OSError as error:
        raise QuantizeError(f"{destination} cannot be written ({error.strerror}): choose another place.") from error
    return Report(
        destination, destination.stat().st_size, tuple(reports[name] for name in source.tensors), source.notes
    )


def _types(source: Source, recipe: str) -> Types:
    shapes = {name: tensor.shape for name, tensor in source.tensors.items()}
    if source.architecture == "t5encoder":
        return encoder_types(shapes, recipe)
    if recipe in ("F32", "BF16"):
        return wan_types(shapes, recipe, recipe)
    kinds = {tensor.type_name for tensor in source.tensors.values() if len(tensor.shape) == 2}
    return wan_types(shapes, recipe, "BF16" if "BF16" in kinds and recipe != "F16" else "F16")


def _matched(found: dict[str, np.ndarray], source: Source, path: Path) -> Mapping[str, np.ndarray]:
    matched = {name: values for name, values in found.items() if name in source.tensors}
    if not matched:
        raise QuantizeError(
            f"{path.name} has no tensor of {source.path.name}: use an importance matrix that was made for this model."
        )
    return matched


def _write_metadata(writer: GGUFWriter, source: Source, recipe: str) -> None:
    writer.metadata("general.architecture", source.architecture, "STRING")
    for key, value, kind in source.metadata:
        writer.metadata(key, value, kind)
    if source.vocabulary is not None:
        _write_encoder_metadata(writer, source, source.vocabulary)
    writer.metadata("general.quantization_version", QUANTIZATION_VERSION, "UINT32")
    writer.metadata("general.file_type", FILE_TYPES[recipe], "UINT32")


def _write_encoder_metadata(writer: GGUFWriter, source: Source, vocabulary: bytes) -> None:
    shapes = {name: tensor.shape for name, tensor in source.tensors.items()}
    blocks = [int(match[1]) for name in shapes if (match := re.match(r"enc\.blk\.(\d+)\.attn_q\.", name))]
    rows, width = shapes["token_embd.weight"]
    heads = shapes["enc.blk.0.attn_rel_b.weight"][1]
    head_dim = shapes["enc.blk.0.attn_q.weight"][0] // heads
    writer.metadata("general.type", "model", "STRING")
    writer.metadata("general.name", source.path.stem, "STRING")
    numbers = {
        "context_length": _CONTEXT,
        "embedding_length": width,
        "feed_forward_length": shapes["enc.blk.0.ffn_up.weight"][0],
        "block_count": max(blocks) + 1,
        "attention.head_count": heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_epsilon": _EPSILON,
        "attention.relative_buckets_count": _BUCKETS,
        "attention.layer_norm_rms_epsilon": _EPSILON,
    }
    for key, value in numbers.items():
        writer.metadata(f"t5encoder.{key}", value, "FLOAT32" if isinstance(value, float) else "UINT32")
    write_vocabulary(writer, vocabulary, rows, source.path.name)
