"""Writes GGUF files: any metadata, any tensor type, tensors that share data or are holes in a sparse file.

Tensors are written one after another from what the caller gives, or produced on the spot by a function, so
memory holds no second copy. The layout is ggml's docs/gguf.md, versions 2 and 3.
"""

from __future__ import annotations

import glob
import os
import secrets
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import torch

try:
    import fcntl
except ModuleNotFoundError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

from .gguf import GGUFError
from .gguf_layout import (
    ALIGNMENT_KEY,
    ARRAY,
    DEFAULT_ALIGNMENT,
    KIND_NAMES,
    MAGIC,
    SCALARS,
    STORED_TYPES_BY_NAME,
    STRING,
    VERSIONS,
    StoredType,
)

Data: TypeAlias = bytes | bytearray | memoryview | np.ndarray | torch.Tensor
DataSource: TypeAlias = Data | Callable[[], Iterable[Data]]

_FRAGMENT = ".part"
_ABANDONED_SECONDS = 60.0

_KIND_IDS = {name: kind for kind, name in KIND_NAMES.items() if kind != ARRAY}
_KIND_OF_TYPE = {bool: "BOOL", float: "FLOAT32", str: "STRING"}
_INTEGER_LIMITS = {kind: np.iinfo(kind.lower()) for kind in ("UINT32", "INT32", "UINT64", "INT64")}
_KIND_OF_DTYPE = {dtype.newbyteorder("="): name for name, dtype in SCALARS.values()}


@contextmanager
def written_beside(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary file to write, synced and moved to ``path`` when the block ends, removed when it raises.

    A killed process cannot remove what it wrote; the next write to the same name does.
    """
    path = Path(path)
    _remove_abandoned(path)
    fragment = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_FRAGMENT}")
    with open(fragment, "xb") as file:
        _lock(file)
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            file.close()
            os.replace(fragment, path)
        except BaseException:
            file.close()
            fragment.unlink(missing_ok=True)
            raise


def _remove_abandoned(path: Path) -> None:
    """Delete fragments of ``path`` that no living process has locked and that nobody has just begun."""
    for fragment in path.parent.glob(f".{glob.escape(path.name)}.????????{_FRAGMENT}"):
        try:
            with open(fragment, "rb") as file:
                old = time.time() - os.fstat(file.fileno()).st_mtime > _ABANDONED_SECONDS
                if old and _lock(file):
                    fragment.unlink()
        except OSError:
            continue


def _lock(file: BinaryIO) -> bool:
    """Lock a file until it is closed or the process ends; False where another has it or there are no locks."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@dataclass(frozen=True)
class _Row:
    """One tensor to write; ``data`` is None where nothing is written (a hole, or another tensor's data)."""

    shape: tuple[int, ...]
    stored: StoredType
    offset: int
    nbytes: int
    data: DataSource | None


class GGUFWriter:
    """Collects metadata and tensors, then writes them as one file.

    Args:
        path: the file to make; an existing one is replaced when the new one is complete.
        version: 2 or 3.
        alignment: of the tensors' data in bytes, a power of two from 8 up; other values than 32 are recorded.

    Raises:
        GGUFError: from any method, when what it is given cannot be stored.
    """

    def __init__(self, path: str | os.PathLike[str], version: int = 3, alignment: int = DEFAULT_ALIGNMENT) -> None:
        self.path = Path(path)
        if version not in VERSIONS:
            raise self._refuse(f"cannot be written as GGUF version {version}, only as 2 or 3")
        if alignment < 8 or alignment & (alignment - 1):
            raise self._refuse(f"cannot be written with alignment {alignment}, only with a power of two from 8 up")
        self._version = version
        self._alignment = alignment
        self._pairs: dict[str, bytes] = {}
        self._rows: dict[str, _Row] = {}
        self._data_size = 0
        if alignment != DEFAULT_ALIGNMENT:
            self._pairs[ALIGNMENT_KEY] = _packed(alignment, "UINT32")

    def metadata(self, key: str, value: Any, kind: str | None = None) -> None:
        """Add a metadata entry.

        Args:
            key: its name; each may be given once, ``general.alignment`` only to the constructor.
            value: int, float, bool, str, numpy scalar; or a list, tuple or numpy array of those; lists may be
                nested; bytes are an array of UINT8, or with kind ``STRING`` a string as it is.
            kind: ggml's name of the kind, ``UINT32`` or ``STRING``; ``[]`` follows for each level of array, as in
                ``INT32[]``. Left out, it follows the value: the first of UINT32, INT32, UINT64 and INT64 that
                holds an int, FLOAT32 for float, INT32[] or INT64[] for lists of int, numpy values' own dtype.
        """
        if key in self._pairs:
            raise self._refuse(f"would get the metadata key {key!r} twice")
        if isinstance(value, bytes) and kind != "STRING":
            value = np.frombuffer(value, np.uint8)
        try:
            self._pairs[key] = _packed(value, (kind or _kind_of(value)).upper())
        except (ValueError, TypeError, OverflowError) as error:
            raise self._refuse(f"cannot hold metadata {key!r} ({error})") from error

    def tensor(
        self,
        name: str,
        shape: Sequence[int],
        type_name: str,
        data: DataSource | None = None,
        *,
        share: str | None = None,
        sparse: bool = False,
    ) -> None:
        """Add a tensor.

        Args:
            name: each may be given once.
            shape: in torch order.
            type_name: ggml's name of the type as which ``data`` is stored; nothing is converted.
            data: its bytes, as bytes, numpy array or torch tensor of any dtype; or a function that yields such
                pieces, called when the file is written.
            share: instead of data, the name of an earlier tensor at least as long whose data this one shares.
            sparse: instead of data, leave a hole that reads as zeros and takes no place on disk.
        """
        if name in self._rows:
            raise self._refuse(f"would get two tensors named {name!r}")
        stored = STORED_TYPES_BY_NAME.get(type_name)
        if stored is None:
            raise self._refuse(f"cannot hold tensor {name!r} of the unknown type {type_name!r}")
        shape = tuple(int(dim) for dim in shape)
        if min(shape, default=1) < 1 or (shape[-1] if shape else 1) % stored.block_size:
            raise self._refuse(
                f"cannot hold tensor {name!r} of shape {list(shape)} as {type_name}: "
                f"rows of whole blocks of {stored.block_size} are needed"
            )
        nbytes = prod(shape) // stored.block_size * stored.block_bytes
        if (data is not None) + (share is not None) + sparse != 1:
            raise self._refuse(f"needs exactly one of data, share and sparse for tensor {name!r}")
        if data is not None and not callable(data) and _bytes_of(data).nbytes != nbytes:
            raise self._refuse(f"needs {nbytes} bytes for tensor {name!r}, not {_bytes_of(data).nbytes}")
        if share is not None:
            owner = self._rows.get(share)
            if owner is None or owner.nbytes < nbytes:
                raise self._refuse(f"cannot share {share!r} with tensor {name!r}: it is unknown or too short")
            self._rows[name] = _Row(shape, stored, owner.offset, nbytes, None)
            return
        self._rows[name] = _Row(shape, stored, self._data_size, nbytes, data)
        self._data_size = self._aligned(self._data_size + nbytes)

    def write(self) -> Path:
        """Write the file beside its name and move it into place; returns its path."""
        with written_beside(self.path) as file:
            file.write(MAGIC + struct.pack("<IQQ", self._version, len(self._rows), len(self._pairs)))
            for key, pair in self._pairs.items():
                file.write(_packed_string(key))
                file.write(pair)
            for name, row in self._rows.items():
                tail = (len(row.shape), *reversed(row.shape), row.stored.type_id, row.offset)
                file.write(_packed_string(name) + struct.pack(f"<I{len(row.shape)}QIQ", *tail))
            data_start = self._aligned(file.tell())
            for name, row in self._rows.items():
                if row.data is not None:
                    file.seek(data_start + row.offset)
                    self._write_data(file, name, row.data, row.nbytes)
            file.truncate(data_start + self._data_size)
        return self.path

    def _write_data(self, file: BinaryIO, name: str, data: DataSource, nbytes: int) -> None:
        written = 0
        for piece in data() if callable(data) else (data,):
            written += file.write(_bytes_of(piece))
        if written != nbytes:
            raise self._refuse(f"needs {nbytes} bytes for tensor {name!r} but was given {written}")

    def _aligned(self, position: int) -> int:
        return -(-position // self._alignment) * self._alignment

    def _refuse(self, problem: str) -> GGUFError:
        return GGUFError(f"{self.path.name} {problem}.")


def _bytes_of(data: Data) -> memoryview:
    if isinstance(data, torch.Tensor):
        data = data.detach().cpu().reshape(-1).view(torch.uint8).numpy()
    if isinstance(data, np.ndarray):
        data = data.reshape(-1).view(np.uint8).data
    return memoryview(data).cast("B")


def _packed_string(text: str | bytes) -> bytes:
    data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(data)) + data


def _kind_of(value: Any) -> str:
    if isinstance(value, np.ndarray | np.generic):
        item = "STRING" if value.dtype.kind == "U" else _KIND_OF_DTYPE.get(value.dtype.newbyteorder("="))
        if item is None:
            raise TypeError(f"numpy's {value.dtype} has no kind")
        return item + "[]" * value.ndim
    if isinstance(value, list | tuple):
        return f"{_kind_of_items(value)}[]"
    if isinstance(value, int) and not isinstance(value, bool):
        return next((kind for kind, limits in _INTEGER_LIMITS.items() if limits.min <= value <= limits.max), "INT64")
    kind = _KIND_OF_TYPE.get(type(value))
    if kind is None:
        raise TypeError(f"values of type {type(value).__name__} have no kind")
    return kind


def _kind_of_items(items: Sequence[Any]) -> str:
    kinds = {_kind_of(item) for item in items}
    if not kinds:
        raise ValueError("an empty array needs its kind")
    if kinds <= _INTEGER_LIMITS.keys():
        limits = _INTEGER_LIMITS["INT32"]
        return "INT32" if limits.min <= min(items) and max(items) <= limits.max else "INT64"
    if kinds <= {*_INTEGER_LIMITS, "FLOAT32"}:
        return "FLOAT32"
    if len(kinds) > 1:
        raise ValueError("items of several kinds need the array's kind")
    return kinds.pop()


def _kind_id(kind: str) -> int:
    if kind not in _KIND_IDS:
        raise ValueError(f"{kind!r} is no kind of value")
    return _KIND_IDS[kind]


def _packed(value: Any, kind: str) -> bytes:
    """A value with its kind before it, as metadata entries have it."""
    if kind.endswith("[]"):
        return struct.pack("<I", ARRAY) + _packed_array(value, kind)
    return struct.pack("<I", _kind_id(kind)) + _packed_items([value], kind)


def _packed_array(items: Sequence[Any], kind: str) -> bytes:
    item = kind.removesuffix("[]")
    item_id = ARRAY if item.endswith("[]") else _kind_id(item)
    return struct.pack("<IQ", item_id, len(items)) + _packed_items(items, item)


def _packed_items(items: Sequence[Any], kind: str) -> bytes:
    if kind.endswith("[]"):
        return b"".join(_packed_array(item, kind) for item in items)
    kind_id = _kind_id(kind)
    if kind_id == STRING:
        return b"".join(map(_packed_string, items))
    given = np.asarray(items)
    with np.errstate(all="ignore"):
        stored = given.astype(SCALARS[kind_id][1])
    exact = stored.dtype.kind == "f" or np.array_equal(given, stored)
    if given.ndim != 1 or not (given.size == 0 or given.dtype.kind in "biuf") or not exact:
        raise ValueError(f"its values are not {kind}")
    return stored.tobytes()
