"""Reads GGUF files over one memory mapping: header, metadata, tensor table and the tensors' bytes.

Opening walks the header only; arrays of metadata are stepped over and decoded when asked for, and tensors are
views of the mapping. The layout is ggml's docs/gguf.md (versions 2 and 3, little endian), with two habits of Wan
files: tensors of more than four dimensions, and ``comfy.gguf.orig_shape.<tensor>`` for those stored flattened.
"""

from __future__ import annotations

import mmap
import os
import stat
import struct
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from . import mapped_pages
from .gguf_layout import (
    ALIGNMENT_KEY,
    ARCHITECTURE_KEY,
    ARRAY,
    DEFAULT_ALIGNMENT,
    KIND_NAMES,
    LOOKALIKES,
    MAGIC,
    ORIGINAL_SHAPE_PREFIX,
    SCALARS,
    STORED_TYPES,
    STORED_TYPES_BY_NAME,
    STRING,
    UNREADABLE_TYPES,
    VERSIONS,
    StoredType,
)

# The most that a header may ask for; real files have some 1,300 tensors, 300,000 tokens, strings of 20 MB.
MAX_TENSORS = 65_536
MAX_PAIRS = 65_536
MAX_DIMS = 8
MAX_NAME_BYTES = 65_535
MAX_STRING_BYTES = 64 << 20
MAX_WALKED_ITEMS = 4 << 20  # strings and arrays inside arrays, in the whole file
MAX_ARRAY_DEPTH = 4
MAX_ALIGNMENT = 1 << 20

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_COUNTS = struct.Struct("<QQ")
_ARRAY_HEAD = struct.Struct("<IQ")
_TENSOR_TAIL = [struct.Struct(f"<{n_dims}QIQ") for n_dims in range(MAX_DIMS + 1)]
_SMALLEST_PAIR = 8 + 4 + 1
_SMALLEST_TENSOR = 8 + 4 + 4 + 8
_SHAPE_KINDS = {"INT32[]", "UINT32[]", "INT64[]", "UINT64[]"}
_DAMAGED = "the file is damaged, download it again"


class GGUFError(ValueError):
    """A GGUF file cannot be used, or not as asked: one sentence for the user, with the file's name."""


@dataclass(frozen=True)
class TensorInfo:
    """One row of the tensor table.

    ``shape`` is in torch order (ggml's dimensions reversed). It is the original shape where the file gives one,
    except when that one's rows are not whole blocks: then it is the stored shape, and only ``original_shape`` is
    the original one. ``offset`` is absolute, in bytes.
    """

    name: str
    type_name: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    original_shape: tuple[int, ...]


class _Field(NamedTuple):
    """Where a metadata value lies: ``offset`` of the value, or of an array's first item."""

    kind: int
    offset: int
    item: int = -1
    length: int = 0


class Metadata(Mapping[str, Any]):
    """A file's metadata, each value decoded when it is asked for and never kept.

    Scalars come as int, float or bool, strings as str (invalid UTF-8 as surrogate escapes), arrays of numbers
    as 1-D numpy arrays, arrays of strings as ``list[str]``, arrays of arrays as lists of those.
    """

    def __init__(self, buffer: mmap.mmap, fields: dict[str, _Field]) -> None:
        self._buffer = buffer
        self._fields = fields

    def __getitem__(self, key: str) -> Any:
        field = self._fields[key]
        if field.kind == ARRAY:
            return _decode_array(self._buffer, field.item, field.length, field.offset)[0]
        if field.kind == STRING:
            return _decode_strings(self._buffer, 1, field.offset)[0][0]
        return _decode_numbers(self._buffer, field.kind, 1, field.offset)[0].item()

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def __contains__(self, key: object) -> bool:
        return key in self._fields

    def kind(self, key: str) -> str:
        """The value's kind in ggml's words, ``UINT32`` or ``STRING``; arrays have brackets, ``INT32[]``."""
        field = self._fields[key]
        return f"{KIND_NAMES[field.item]}[]" if field.kind == ARRAY else KIND_NAMES[field.kind]

    def length(self, key: str) -> int | None:
        """Number of items of an array, known without decoding it; None for other kinds."""
        field = self._fields[key]
        return field.length if field.kind == ARRAY else None


class GGUFFile:
    """A GGUF file, opened for reading.

    The whole file is mapped copy-on-write: tensors are views of it, keep it alive, and a stray write into one
    reaches neither the file nor another process. Raises GGUFError when the file cannot be read.
    """

    path: Path
    version: int
    alignment: int
    architecture: str | None
    metadata: Metadata
    tensors: dict[str, TensorInfo]

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._map = _map_file(self.path)
        mapped_pages.register(self._map)
        header = _Header(self.path, self._map)
        self.version = header.version()
        n_tensors, n_pairs = header.counts()
        self.metadata = Metadata(self._map, header.pairs(n_pairs))
        self.alignment = self._read_alignment()
        self.architecture = self._read_architecture()
        self.tensors = self._tensor_table(header, n_tensors)

    def raw(self, name: str) -> torch.Tensor:
        """The tensor's bytes as stored: a uint8 tensor [nbytes], a view of the mapping."""
        info = self._info(name)
        return torch.frombuffer(self._map, dtype=torch.uint8, count=info.nbytes, offset=info.offset)

    def tensor(self, name: str) -> torch.Tensor:
        """A plain tensor (F32 F16 BF16 F64 I8 I16 I32 I64) in its dtype and shape, a view of the mapping.

        Copied only where the file stores it off its dtype's alignment. Raises GGUFError for quantised types.
        """
        info = self._info(name)
        dtype = STORED_TYPES_BY_NAME[info.type_name].dtype
        if dtype is None:
            raise self._refuse(f"stores tensor {_shown(name)} as {info.type_name}, which must be dequantised first")
        raw = self.raw(name)
        if info.offset % dtype.itemsize:
            raw = raw.clone()
        return raw.view(dtype).reshape(info.shape)

    def __repr__(self) -> str:
        return f"GGUFFile({str(self.path)!r}, architecture={self.architecture!r}, {len(self.tensors)} tensors)"

    def _refuse(self, problem: str) -> GGUFError:
        return GGUFError(f"{self.path.name} {problem}.")

    def _info(self, name: str) -> TensorInfo:
        info = self.tensors.get(name)
        if info is None:
            raise self._refuse(f"has no tensor named {_shown(name)}")
        return info

    def _read_alignment(self) -> int:
        if ALIGNMENT_KEY not in self.metadata:
            return DEFAULT_ALIGNMENT
        value = self.metadata[ALIGNMENT_KEY] if self.metadata.kind(ALIGNMENT_KEY) == "UINT32" else 0
        if not 8 <= value <= MAX_ALIGNMENT or value & (value - 1):
            raise self._refuse(f"has a {ALIGNMENT_KEY} that is no power of two from 8 up; {_DAMAGED}")
        return value

    def _read_architecture(self) -> str | None:
        if ARCHITECTURE_KEY not in self.metadata:
            return None
        if self.metadata.kind(ARCHITECTURE_KEY) != "STRING":
            raise self._refuse(f"has a {ARCHITECTURE_KEY} that is no name; {_DAMAGED}")
        return self.metadata[ARCHITECTURE_KEY]

    def _tensor_table(self, header: _Header, n_tensors: int) -> dict[str, TensorInfo]:
        rows: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(n_tensors):
            name, shape, type_id, offset = header.tensor_row()
            if name in rows:
                raise self._refuse(f"has two tensors named {_shown(name)}; {_DAMAGED}")
            rows[name] = shape, type_id, offset
        data_start = -(-header.position // self.alignment) * self.alignment
        return {name: self._tensor_info(name, *row, data_start) for name, row in rows.items()}

    def _tensor_info(
        self, name: str, stored_shape: tuple[int, ...], type_id: int, relative_offset: int, data_start: int
    ) -> TensorInfo:
        stored = self._stored_type(name, type_id)
        if 0 in stored_shape:
            raise self._refuse(f"has tensor {_shown(name)} with a dimension of zero; {_DAMAGED}")
        if not _whole_blocks(stored_shape, stored):
            raise self._refuse(
                f"has tensor {_shown(name)} whose rows are not whole blocks of {stored.block_size} weights, "
                f"as {stored.name} needs; {_DAMAGED}"
            )
        nbytes = prod(stored_shape) // stored.block_size * stored.block_bytes
        offset = data_start + relative_offset
        if offset + nbytes > len(self._map):
            raise self._refuse(
                f"has {len(self._map)} bytes but its tensor {_shown(name)} ends at byte {offset + nbytes}; "
                "the download is incomplete or damaged, download it again"
            )
        original = self._original_shape(name, stored_shape)
        shape = original if _whole_blocks(original, stored) else stored_shape
        return TensorInfo(name, stored.name, shape, offset, nbytes, original)

    def _stored_type(self, name: str, type_id: int) -> StoredType:
        stored = STORED_TYPES.get(type_id)
        if stored is not None:
            return stored
        known = UNREADABLE_TYPES.get(type_id)
        if known is not None:
            raise self._refuse(
                f"stores tensor {_shown(name)} as {known} (ggml type {type_id}), which cannot be decoded; "
                "use a file in another quantisation, such as Q5_K_M"
            )
        raise self._refuse(
            f"stores tensor {_shown(name)} as ggml type {type_id}, which is unknown; "
            "the file is damaged or newer than this pack, update the pack or use another quantisation"
        )

    def _original_shape(self, name: str, stored_shape: tuple[int, ...]) -> tuple[int, ...]:
        key = ORIGINAL_SHAPE_PREFIX + name
        if key not in self.metadata:
            return stored_shape
        if self.metadata.kind(key) not in _SHAPE_KINDS or (self.metadata.length(key) or 0) > MAX_DIMS:
            raise self._refuse(f"has a {_shown(key)} that is not a shape; {_DAMAGED}")
        shape = tuple(self.metadata[key].tolist())
        if min(shape, default=1) < 1 or prod(shape) != prod(stored_shape):
            raise self._refuse(
                f"gives tensor {_shown(name)} the original shape {list(shape)}, which does not fit "
                f"the stored shape {list(stored_shape)}; {_DAMAGED}"
            )
        return shape


class _Header:
    """A cursor over the header; every step is checked against the file's size and the limits above."""

    def __init__(self, path: Path, buffer: mmap.mmap) -> None:
        self.path = path
        self.buffer = buffer
        self.position = 0
        self.walked = 0

    def refuse(self, problem: str) -> GGUFError:
        return GGUFError(f"{self.path.name} {problem}.")

    def version(self) -> int:
        head = self.buffer[:512]
        if not (head.startswith(MAGIC) or MAGIC.startswith(head)):
            for pattern, likeness, advice in LOOKALIKES:
                if pattern.match(head):
                    raise self.refuse(f"is not a GGUF file but looks like {likeness}; {advice}")
            raise self.refuse("is not a GGUF file; download it again or choose another file")
        self.skip(len(MAGIC))
        (version,) = self.read(_U32)
        if version in VERSIONS:
            return version
        if version == 1:
            raise self.refuse("is a GGUF file of version 1; download a newer one (versions 2 and 3 can be read)")
        if int.from_bytes(version.to_bytes(4, "little"), "big") in (1, *VERSIONS):
            raise self.refuse("is a big-endian GGUF file; download or convert it to little endian")
        raise self.refuse(f"says it is GGUF version {version} (2 and 3 can be read); {_DAMAGED} or update the pack")

    def counts(self) -> tuple[int, int]:
        n_tensors, n_pairs = self.read(_COUNTS)
        left = len(self.buffer) - self.position
        for count, limit, smallest, what in (
            (n_tensors, MAX_TENSORS, _SMALLEST_TENSOR, "tensors"),
            (n_pairs, MAX_PAIRS, _SMALLEST_PAIR, "metadata entries"),
        ):
            if count > limit or count * smallest > left:
                raise self.refuse(f"has {len(self.buffer)} bytes but announces {count} {what}; {_DAMAGED}")
        return n_tensors, n_pairs

    def pairs(self, count: int) -> dict[str, _Field]:
        fields: dict[str, _Field] = {}
        for _ in range(count):
            key = self.name("a metadata key")
            if key in fields:
                raise self.refuse(f"has the metadata key {_shown(key)} twice; {_DAMAGED}")
            fields[key] = self.field(key)
        return fields

    def field(self, key: str) -> _Field:
        (kind,) = self.read(_U32)
        if kind == ARRAY:
            item, count = self.read(_ARRAY_HEAD)
            field = _Field(kind, self.position, item, count)
            self.skip_items(key, item, count, depth=1)
            return field
        field = _Field(kind, self.position)
        self.skip_items(key, kind, 1, depth=0)
        return field

    def skip_items(self, key: str, kind: int, count: int, depth: int) -> None:
        if kind in SCALARS:
            self.skip(count * SCALARS[kind][1].itemsize)
            return
        if kind not in KIND_NAMES:
            raise self.refuse(f"has metadata {_shown(key)} of the unknown kind {kind}; {_DAMAGED}")
        self.walked += count
        if self.walked > MAX_WALKED_ITEMS:
            raise self.refuse(f"announces {count} items in its metadata {_shown(key)}; {_DAMAGED}")
        if kind == STRING:
            self.skip_strings(key, count)
            return
        if depth >= MAX_ARRAY_DEPTH:
            raise self.refuse(f"has arrays nested more than {MAX_ARRAY_DEPTH} deep in {_shown(key)}; {_DAMAGED}")
        for _ in range(count):
            item, length = self.read(_ARRAY_HEAD)
            self.skip_items(key, item, length, depth + 1)

    def skip_strings(self, key: str, count: int) -> None:
        position, buffer, unpack = self.position, self.buffer, _U64.unpack_from
        try:
            for _ in range(count):
                (length,) = unpack(buffer, position)
                if length > MAX_STRING_BYTES:
                    raise self.refuse(f"has a string of {length} bytes in its metadata {_shown(key)}; {_DAMAGED}")
                position += 8 + length
        except struct.error:
            raise self.truncated() from None
        self.skip(position - self.position)

    def tensor_row(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.name("a tensor name")
        (n_dims,) = self.read(_U32)
        if n_dims > MAX_DIMS:
            raise self.refuse(f"has tensor {_shown(name)} with {n_dims} dimensions; {_DAMAGED}")
        *dims, type_id, offset = self.read(_TENSOR_TAIL[n_dims])
        return name, tuple(reversed(dims)), type_id, offset

    def name(self, what: str) -> str:
        (length,) = self.read(_U64)
        if length > MAX_NAME_BYTES:
            raise self.refuse(f"has {what} of {length} bytes; {_DAMAGED}")
        start = self.position
        self.skip(length)
        try:
            return self.buffer[start : self.position].decode()
        except UnicodeDecodeError:
            raise self.refuse(f"has {what} that is not UTF-8; {_DAMAGED}") from None

    def read(self, layout: struct.Struct) -> tuple[int, ...]:
        start = self.position
        self.skip(layout.size)
        return layout.unpack_from(self.buffer, start)

    def skip(self, nbytes: int) -> None:
        self.position += nbytes
        if self.position > len(self.buffer):
            raise self.truncated()

    def truncated(self) -> GGUFError:
        return self.refuse(f"ends inside its header, after {len(self.buffer)} bytes; {_DAMAGED}")


_LINUX_MAP_NORESERVE = 0x4000  # without it Linux refuses a private writable mapping larger than its memory


def _map_file(path: Path) -> mmap.mmap:
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            state = os.fstat(file.fileno())
            if not stat.S_ISREG(state.st_mode):
                raise GGUFError(f"{path} is not an ordinary file; choose a .gguf file.")
            if state.st_size == 0:
                raise GGUFError(f"{path} is empty (0 bytes); download it again.")
            if sys.platform == "linux":
                flags = mmap.MAP_PRIVATE | _LINUX_MAP_NORESERVE
                return mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except FileNotFoundError:
        if path.is_symlink():
            target = os.readlink(path)
            raise GGUFError(f"{path} is a link to {target}, which does not exist; restore that file.") from None
        raise GGUFError(f"{path} does not exist; check its name and folder.") from None
    except (IsADirectoryError, PermissionError) as error:
        if path.is_dir():
            raise GGUFError(f"{path} is a folder; choose a .gguf file in it.") from None
        raise GGUFError(f"{path} may not be read ({error.strerror}); change its permissions.") from None
    except OSError as error:
        raise GGUFError(f"{path} cannot be opened ({error.strerror}); check the disk it lies on.") from error


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _shown(name: str) -> str:
    """A name from a file, fit for a one-line message."""
    shortened = name if len(name) <= 80 else f"{name[:77]}..."
    return repr(shortened)


def _whole_blocks(shape: tuple[int, ...], stored: StoredType) -> bool:
    return stored.block_size == 1 or (len(shape) > 0 and shape[-1] % stored.block_size == 0)


def _decode_array(buffer: mmap.mmap, item: int, count: int, position: int) -> tuple[Any, int]:
    """Items of an array that starts at ``position``, and the position after it."""
    if item in SCALARS:
        numbers = _decode_numbers(buffer, item, count, position)
        return numbers, position + numbers.nbytes
    if item == STRING:
        return _decode_strings(buffer, count, position)
    arrays = []
    for _ in range(count):
        inner, length = _ARRAY_HEAD.unpack_from(buffer, position)
        array, position = _decode_array(buffer, inner, length, position + _ARRAY_HEAD.size)
        arrays.append(array)
    return arrays, position


def _decode_numbers(buffer: mmap.mmap, kind: int, count: int, position: int) -> np.ndarray:
    name, dtype = SCALARS[kind]
    data = buffer[position : position + count * dtype.itemsize]
    if name == "BOOL":
        return np.frombuffer(data, np.uint8) != 0
    return np.frombuffer(bytearray(data), dtype)


def _decode_strings(buffer: mmap.mmap, count: int, position: int) -> tuple[list[str], int]:
    strings = []
    for _ in range(count):
        start = position + 8
        position = start + _U64.unpack_from(buffer, position)[0]
        strings.append(buffer[start:position].decode("utf-8", "surrogateescape"))
    return strings, position
