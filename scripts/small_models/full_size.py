"""Full-size models at a few megabytes on disk, for what depends on real sizes: tables of 1,095 tensors, mappings of
6 GB, a vocabulary of 256,384 tokens. Their weights are zeros.

"sparse" files are holes of the right size, so that the file's apparent size is the published one; in "shared" files
all tensors of a type share the data of the largest, which fits file systems without holes.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path

from apple_silicon_video.quantization.gguf_writer import GGUFWriter

from .recipes import FILE_TYPES, Types, encoder_types, wan_types
from .text_encoders import UMT5_XXL, encoder_tensors, write_encoder_metadata
from .vocabulary import synthetic_vocabulary
from .wan import QUANTIZATION_VERSION
from .wan_shapes import wan_shape, wan_tensors


def write_full_size_wan(path: Path, variant: str, recipe: str, kind: str = "sparse") -> Path:
    """Write ``variant`` at its real shapes with the types of ``recipe``; ``kind`` is "sparse" or "shared"."""
    shapes = wan_tensors(wan_shape(variant, full_size=True))
    writer = GGUFWriter(path)
    writer.metadata("general.architecture", "wan", "STRING")
    writer.metadata("general.quantization_version", QUANTIZATION_VERSION, "UINT32")
    writer.metadata("general.file_type", FILE_TYPES[recipe], "UINT32")
    _add_empty_tensors(writer, shapes, wan_types(shapes, recipe), kind)
    writer.write()
    return path


def write_full_size_encoder(path: Path, recipe: str, kind: str = "sparse") -> Path:
    """Write UMT5-XXL at its real shapes with a made-up vocabulary of the real size; ``kind`` as above."""
    shapes = encoder_tensors(UMT5_XXL)
    writer = GGUFWriter(path)
    tokens = synthetic_vocabulary(UMT5_XXL.pieces, UMT5_XXL.rows)
    write_encoder_metadata(writer, UMT5_XXL, recipe, tokens)
    _add_empty_tensors(writer, shapes, encoder_types(shapes, recipe), kind)
    writer.write()
    return path


def _add_empty_tensors(writer: GGUFWriter, shapes: Mapping[str, tuple[int, ...]], types: Types, kind: str) -> None:
    if kind not in ("sparse", "shared"):
        raise ValueError(f"{kind!r} is no kind of full-size file: use sparse or shared.")
    if kind == "sparse":
        for name, shape in shapes.items():
            writer.tensor(name, shape, types[name], sparse=True)
        return
    owners: dict[str, str] = {}
    for name, shape in sorted(shapes.items(), key=lambda item: -prod(item[1])):
        owner = owners.setdefault(types[name], name)
        if owner == name:
            writer.tensor(name, shape, types[name], sparse=True)
        else:
            writer.tensor(name, shape, types[name], share=owner)
