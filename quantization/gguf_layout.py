"""The constants of GGUF files: header, kinds of metadata values, types of tensors, and files mistaken for them.

Numbers and names are those of ggml's docs/gguf.md and ggml.h; which quantised types can be decoded is
``formats.FORMATS``'s to say.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import torch

from .formats import FORMATS_BY_ID

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
ALIGNMENT_KEY = "general.alignment"
ARCHITECTURE_KEY = "general.architecture"
ORIGINAL_SHAPE_PREFIX = "comfy.gguf.orig_shape."

STRING = 8
ARRAY = 9
SCALARS: dict[int, tuple[str, np.dtype]] = {
    0: ("UINT8", np.dtype("<u1")),
    1: ("INT8", np.dtype("<i1")),
    2: ("UINT16", np.dtype("<u2")),
    3: ("INT16", np.dtype("<i2")),
    4: ("UINT32", np.dtype("<u4")),
    5: ("INT32", np.dtype("<i4")),
    6: ("FLOAT32", np.dtype("<f4")),
    7: ("BOOL", np.dtype("?")),
    10: ("UINT64", np.dtype("<u8")),
    11: ("INT64", np.dtype("<i8")),
    12: ("FLOAT64", np.dtype("<f8")),
}
KIND_NAMES: dict[int, str] = {kind: name for kind, (name, _) in SCALARS.items()} | {
    STRING: "STRING",
    ARRAY: "ARRAY",
}


@dataclass(frozen=True)
class StoredType:
    """A tensor type: ``block_size`` weights in ``block_bytes`` bytes; ``dtype`` for plain types only."""

    name: str
    type_id: int
    block_size: int
    block_bytes: int
    dtype: torch.dtype | None = None


_PLAIN_TYPES = (
    StoredType("F32", 0, 1, 4, torch.float32),
    StoredType("F16", 1, 1, 2, torch.float16),
    StoredType("I8", 24, 1, 1, torch.int8),
    StoredType("I16", 25, 1, 2, torch.int16),
    StoredType("I32", 26, 1, 4, torch.int32),
    StoredType("I64", 27, 1, 8, torch.int64),
    StoredType("F64", 28, 1, 8, torch.float64),
    StoredType("BF16", 30, 1, 2, torch.bfloat16),
)
STORED_TYPES: dict[int, StoredType] = {
    fmt.type_id: StoredType(fmt.name, fmt.type_id, fmt.block_size, fmt.block_bytes) for fmt in FORMATS_BY_ID.values()
} | {plain.type_id: plain for plain in _PLAIN_TYPES}
STORED_TYPES_BY_NAME: dict[str, StoredType] = {stored.name: stored for stored in STORED_TYPES.values()}

# Types that ggml only computes with (Q8_1, Q8_K), that it removed, or that gguf-py 0.19 cannot decode (Q1_0).
UNREADABLE_TYPES: dict[int, str] = {
    4: "Q4_2",
    5: "Q4_3",
    9: "Q8_1",
    15: "Q8_K",
    31: "Q4_0_4_4",
    32: "Q4_0_4_8",
    33: "Q4_0_8_8",
    36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
    41: "Q1_0",
}

# First bytes, what they look like, what to do.
LOOKALIKES: tuple[tuple[re.Pattern[bytes], str, str], ...] = (
    (
        re.compile(rb"version https://git-lfs"),
        "a Git LFS pointer",
        "download the file it points to (git lfs pull)",
    ),
    (
        re.compile(rb"\s*<(!doctype|!--|html|head|\?xml)", re.IGNORECASE),
        "a web page",
        "download the file itself, not the page about it",
    ),
    (
        re.compile(rb"(?s).{5}\0\0\0\{"),
        "a safetensors file",
        "give it its .safetensors name and load it as such",
    ),
    (
        re.compile(rb"PK\x03\x04"),
        "a zip archive (perhaps a PyTorch checkpoint)",
        "unpack it or download the .gguf file",
    ),
    (re.compile(rb"\x80[\x02-\x05]"), "a pickled PyTorch checkpoint", "download the .gguf file"),
    (re.compile(rb"\x1f\x8b"), "a gzip archive", "unpack it"),
    (re.compile(rb"lmgg|fmgg|tjgg|algg"), "a GGML file from before GGUF", "download a .gguf file"),
    (re.compile(rb"\0{64}"), "an unfinished download (it begins with zeros)", "download it again"),
    (
        re.compile(rb"[\t\n\r\x20-\x7e]{4,}\Z"),
        "a text file (perhaps a server's error message)",
        "download it again",
    ),
)
