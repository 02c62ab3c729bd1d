"""Nested values with tensors in one safetensors file: conditioning, latents, sampling state.

Lists, tuples, dictionaries with string keys, plain scalars and tensors of any depth come back as they were, tensors
bit for bit. A file appears complete or not at all, and is read without running anything in it (no pickle).
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

SUFFIX = ".safetensors"
SCALARS = (str, int, float, bool, type(None))
STRUCTURE = "structure"
NOTE = "note"


class TensorFileError(ValueError):
    """A value cannot be stored, or a file is not one of these; the message is one sentence."""


def save_value(path: Path, value: Any, note: dict[str, Any] | None = None) -> None:
    """Write ``value`` to ``path`` beside its name, sync it and move it into place.

    note: JSON values that `read_note` returns without reading the tensors.
    Raises TensorFileError for values of another kind, OSError if the folder or the disk refuses.
    """
    tensors: dict[str, torch.Tensor] = {}
    structure = _describe(value, tensors)
    metadata = {STRUCTURE: json.dumps(structure), NOTE: json.dumps(note or {})}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        save_file(tensors, str(partial), metadata)
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except SafetensorError as error:
        raise OSError(f"{path.name} cannot be written ({error}).") from None
    finally:
        with suppress(OSError):
            partial.unlink()


def load_value(path: Path) -> Any:
    """The value in a file, tensors on the CPU. Raises TensorFileError, one sentence, if the file is not whole."""
    with _opened(path) as file:
        try:
            structure = json.loads(file.metadata()[STRUCTURE])
            return _restore(structure, file)
        except (KeyError, TypeError, ValueError, SafetensorError):
            raise TensorFileError(f"{path.name} is not a file of stored tensors: delete it.") from None


def read_note(path: Path) -> dict[str, Any]:
    """The note that was stored with the value. Raises TensorFileError as `load_value` does."""
    with _opened(path) as file:
        try:
            return json.loads(file.metadata()[NOTE])
        except (KeyError, TypeError, ValueError):
            raise TensorFileError(f"{path.name} is not a file of stored tensors: delete it.") from None


def keep_newest(folder: Path, keep: Path, size: int, entries: int | None = None) -> None:
    """Remove what was written first until ``entries`` files of ``size`` bytes together are left; ``keep`` always stays.

    What processes that were killed left half-written goes too.
    """
    found = []
    for path in folder.glob(f"*{SUFFIX}"):
        with suppress(OSError):
            status = path.stat()
            found.append((path != keep, -status.st_mtime_ns, status.st_size, path))
    total = 0
    for number, (is_other, _, bytes_here, path) in enumerate(sorted(found), 1):
        total += bytes_here
        if is_other and (total > size or (entries is not None and number > entries)):
            with suppress(OSError):
                path.unlink()
    for partial in folder.glob(f".*{SUFFIX}.*.partial"):
        with suppress(OSError):
            partial.unlink()


def _opened(path: Path) -> Any:
    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        raise TensorFileError(f"{path.name} cannot be read ({error}): delete it.") from None


def _describe(value: Any, tensors: dict[str, torch.Tensor]) -> list[Any]:
    """[kind, content], tensors being replaced by their number in ``tensors``."""
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return ["tensor", name]
    if isinstance(value, (list, tuple)):
        return [type(value).__name__, [_describe(item, tensors) for item in value]]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return ["dict", {key: _describe(item, tensors) for key, item in value.items()}]
    if type(value) in SCALARS:
        return ["scalar", value]
    raise TensorFileError(f"A {type(value).__name__} cannot be stored in a file of tensors.")


def _restore(structure: list[Any], file: Any) -> Any:
    kind, content = structure
    return RESTORERS[kind](content, file)


RESTORERS = {
    "tensor": lambda content, file: file.get_tensor(content),
    "list": lambda content, file: [_restore(item, file) for item in content],
    "tuple": lambda content, file: tuple(_restore(item, file) for item in content),
    "dict": lambda content, file: {key: _restore(item, file) for key, item in content.items()},
    "scalar": lambda content, file: content,
}
