"""Reads importance matrices: how much each input column of a matrix matters, as llama.cpp's imatrix tool writes them.

Both of its formats: GGUF with ``<tensor>.in_sum2`` and ``<tensor>.counts``, and the older binary one (a count, then
for each entry name, calls, values).
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from .gguf import GGUFFile
from .gguf_layout import MAGIC
from .quantizer import QuantizeError

_SUMS, _COUNTS = ".in_sum2", ".counts"
_LONGEST_NAME = 1 << 16


def read_importance(path: Path) -> dict[str, np.ndarray]:
    """Importance by tensor name, float32 with one value for each column.

    Raises:
        QuantizeError, GGUFError: the file cannot be read or is no importance matrix.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise QuantizeError(f"{path} cannot be read ({error.strerror}): check the name.") from error
    found = _from_gguf(path) if data.startswith(MAGIC) else _from_binary(path, data)
    if not found:
        raise QuantizeError(f"{path.name} holds no importance matrix: give a file made by llama.cpp's imatrix tool.")
    return found


def _from_gguf(path: Path) -> dict[str, np.ndarray]:
    file = GGUFFile(path)
    found = {}
    for name in file.tensors:
        if name.endswith(_SUMS):
            tensor = name.removesuffix(_SUMS)
            sums = file.tensor(name).float().numpy().reshape(-1)
            calls = float(file.tensor(tensor + _COUNTS).float().sum()) if tensor + _COUNTS in file.tensors else 1.0
            found[tensor] = (sums / max(calls, 1.0)).astype(np.float32)
    return found


def _from_binary(path: Path, data: bytes) -> dict[str, np.ndarray]:
    found = {}
    position = 0

    def integer() -> int:
        nonlocal position
        (value,) = struct.unpack_from("<i", data, position)
        position += 4
        return value

    try:
        for _ in range(integer()):
            length = integer()
            if not 0 < length < _LONGEST_NAME:
                raise ValueError("length of a name")
            name = data[position : position + length].decode("utf-8")
            position += length
            calls, count = integer(), integer()
            values = np.frombuffer(data, "<f4", count, position)
            position += 4 * count
            found[name] = (values / max(calls, 1)).astype(np.float32)
    except (struct.error, ValueError) as error:
        raise QuantizeError(
            f"{path.name} is no importance matrix of llama.cpp or is damaged: make it again."
        ) from error
    return found
