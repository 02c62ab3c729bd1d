"""Reads safetensors files over one memory mapping: the header at once, tensors as views of the mapping.

The layout is the safetensors format's: eight bytes of header length, a JSON object of tensors and metadata, then the
data. The mapping is private (copy-on-write), so that no write to a tensor reaches the file.
"""

from __future__ import annotations

import json
import mmap
import os
import stat
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeGuard

import torch

from . import mapped_pages

METADATA_KEY = "__metadata__"
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_DIMS = 16
LENGTH_BYTES = 8

# By the header's names. E8M0 is kept as bytes: torch 2.6 has no such dtype, and only its codes are needed.
DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.uint8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}

_LINUX_MAP_NORESERVE = 0x4000  # without it Linux refuses a private writable mapping larger than its memory
_DAMAGED = "the file is damaged, download it again"


class SafetensorsError(ValueError):
    """A file is no usable safetensors file; the message is one sentence for the user."""


class UnsupportedFormatError(SafetensorsError):
    """The file is sound, but stores weights in a way that this pack does not decode; core may."""


@dataclass(frozen=True)
class TensorInfo:
    """One entry of the header: ``type_name`` as in DTYPES, ``offset`` in bytes from the start of the file."""

    name: str
    type_name: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class SafetensorsFile:
    """A safetensors file, opened for reading.

    ``tensors`` maps names to TensorInfo in the file's order of data, ``metadata`` is the header's (string to string).
    The mapping lives as long as any tensor made from it. Raises SafetensorsError.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._map = self._map_file()
        mapped_pages.register(self._map)
        header, data = self._read_header()
        self.metadata = self._read_metadata(header.pop(METADATA_KEY, None))
        infos = [self._read_entry(name, entry, data) for name, entry in header.items()]
        self.tensors = {info.name: info for info in sorted(infos, key=lambda info: info.offset)}

    def raw(self, name: str) -> torch.Tensor:
        """The tensor's bytes: uint8 [nbytes], a view of the mapping."""
        info = self.tensors[name]
        if info.nbytes == 0:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(self._map, dtype=torch.uint8, count=info.nbytes, offset=info.offset)

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor in its dtype and shape, a view of the mapping; copied only if it lies off its alignment."""
        info = self.tensors[name]
        dtype = DTYPES[info.type_name]
        raw = self.raw(name)
        if info.offset % dtype.itemsize:
            raw = raw.clone()
        return raw.view(dtype).reshape(info.shape)

    def __repr__(self) -> str:
        return f"SafetensorsFile({str(self.path)!r}, {len(self.tensors)} tensors)"

    def _refuse(self, problem: str) -> SafetensorsError:
        return SafetensorsError(f"{self.path.name} {problem}.")

    def _map_file(self) -> mmap.mmap:
        try:
            with open(self.path, "rb", opener=_open_without_waiting) as file:
                state = os.fstat(file.fileno())
                if not stat.S_ISREG(state.st_mode):
                    raise self._refuse("is not an ordinary file: choose a .safetensors file")
                if state.st_size == 0:
                    raise self._refuse("is empty (0 bytes): download it again")
                if sys.platform == "linux":
                    flags = mmap.MAP_PRIVATE | _LINUX_MAP_NORESERVE
                    return mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except FileNotFoundError:
            raise self._refuse("is missing or a broken link: put the file back or choose another") from None
        except OSError as error:
            if self.path.is_dir():
                raise self._refuse("is a folder, not a model file: choose the file in it") from None
            raise self._refuse(f"cannot be opened ({error.strerror}): check its permissions and disk") from None

    def _read_header(self) -> tuple[dict[str, Any], int]:
        """The header's JSON object, and the offset at which the data begins."""
        size = len(self._map)
        length = int.from_bytes(self._map[:LENGTH_BYTES], "little")
        if size < LENGTH_BYTES or length > MAX_HEADER_BYTES or self._map[LENGTH_BYTES : LENGTH_BYTES + 1] != b"{":
            raise self._refuse("cannot be read (its header does not begin as a safetensors file's): download it again")
        if LENGTH_BYTES + length > size:
            raise self._refuse(
                f"cannot be read (it ends in its header, after {size} bytes): the file is incomplete, download it again"
            )
        try:
            header = json.loads(self._map[LENGTH_BYTES : LENGTH_BYTES + length])
        except (ValueError, RecursionError):
            raise self._refuse(f"has a header that is not JSON: {_DAMAGED}") from None
        if not isinstance(header, dict):
            raise self._refuse(f"has a header that lists no tensors: {_DAMAGED}")
        return header, LENGTH_BYTES + length

    def _read_metadata(self, metadata: Any) -> dict[str, str]:
        if metadata is None:
            return {}
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise self._refuse(f"has metadata that is not text: {_DAMAGED}")
        return metadata

    def _read_entry(self, name: str, entry: Any, data: int) -> TensorInfo:
        fields = entry if isinstance(entry, dict) else {}
        type_name, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
        if not isinstance(type_name, str) or not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
            raise self._refuse(f"describes tensor {_shown(name)} wrongly: {_DAMAGED}")
        if type_name not in DTYPES:
            raise UnsupportedFormatError(
                f"{self.path.name} stores tensor {_shown(name)} as {_shown(type_name)}, which cannot be read: "
                "choose another file."
            )
        begin, end = offsets
        if data + end > len(self._map):
            raise self._refuse(
                f"cannot be read (it ends after {len(self._map)} of {data + end} bytes): the file is incomplete, "
                "download it again"
            )
        nbytes = prod(shape) * DTYPES[type_name].itemsize
        if end - begin != nbytes or len(shape) > MAX_DIMS:
            raise self._refuse(f"gives tensor {_shown(name)} a shape that its data does not have: {_DAMAGED}")
        return TensorInfo(name, type_name, tuple(shape), data + begin, nbytes)


class SafetensorsShards:
    """Safetensors files that hold one model together (or a single one), read like a SafetensorsFile.

    ``path`` is the model's name in messages. A tensor that two files hold is the later file's. Raises
    SafetensorsError.
    """

    def __init__(self, path: str | os.PathLike[str], files: Iterable[str | os.PathLike[str]]) -> None:
        self.path = Path(path)
        opened = [SafetensorsFile(file) for file in files]
        self._files = {name: file for file in opened for name in file.tensors}
        self.tensors = {name: file.tensors[name] for name, file in self._files.items()}
        self.metadata = {key: value for file in opened for key, value in file.metadata.items()}

    def file_of(self, name: str) -> Path:
        """The file in which a tensor lies."""
        return self._files[name].path

    def raw(self, name: str) -> torch.Tensor:
        """As SafetensorsFile.raw."""
        return self._files[name].raw(name)

    def tensor(self, name: str) -> torch.Tensor:
        """As SafetensorsFile.tensor."""
        return self._files[name].tensor(name)


def _counts(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _shown(name: str) -> str:
    """A name from a file, fit for a one-line message."""
    return repr(name if len(name) <= 80 else f"{name[:77]}...")
