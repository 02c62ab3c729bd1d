"""Checkpoints of sampling on disk: the latent at a step and what is needed to go on from it.

An entry's name says what is being sampled (a hash of everything that the result depends on), so that the same queue
entry finds its own checkpoint after a crash and another one never does. Each write replaces the entry whole.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .tensor_files import SUFFIX, TensorFileError, keep_newest, load_value, read_note, save_value

log = logging.getLogger(__name__)

LIMIT_ENTRIES = 8
LIMIT_BYTES = 2 << 30


@dataclass(frozen=True)
class Checkpoint:
    """Where a sampling stands.

    step: steps that are done, of ``steps``; latent: what goes into the next one, or the result when all are done;
    denoised: the model's answer to ``latent``, if it is known already, else None; sampler: its name; run: the prompt's
    id in ComfyUI's queue.
    """

    step: int
    steps: int
    latent: torch.Tensor
    denoised: torch.Tensor | None
    sampler: str
    run: str

    @property
    def finished(self) -> bool:
        """Whether ``latent`` is the result."""
        return self.step >= self.steps


class CheckpointStore:
    """A folder of checkpoints, limited in number and size; the ones written last stay."""

    def __init__(self, folder: Path, entries: int = LIMIT_ENTRIES, size: int = LIMIT_BYTES) -> None:
        """The folder is made with the first checkpoint; ``size`` in bytes."""
        self.folder = folder
        self.entries = entries
        self.size = size

    def path(self, key: str) -> Path:
        """Where the checkpoint of ``key`` lies, or would lie."""
        return self.folder / f"{key}{SUFFIX}"

    def get(self, key: str) -> Checkpoint | None:
        """The checkpoint, None if there is none; a damaged one is removed with a line in the log."""
        path = self.path(key)
        if not path.is_file():
            return None
        try:
            return Checkpoint(**load_value(path))
        except (TensorFileError, TypeError) as error:
            log.warning("Sampling starts from the beginning: %s", error)
            with suppress(OSError):
                path.unlink()
            return None

    def put(self, key: str, checkpoint: Checkpoint) -> bool:
        """Replace the checkpoint of ``key``; False, with a line in the log, where the disk refuses."""
        try:
            save_value(self.path(key), asdict(checkpoint), {"run": checkpoint.run})
        except OSError as error:
            log.warning("This step is not saved (%s); sampling goes on.", error.strerror or error)
            return False
        keep_newest(self.folder, self.path(key), self.size, self.entries)
        return True

    def remove_runs(self, finished: Callable[[str], bool]) -> None:
        """Remove the checkpoints of every run that ``finished`` says has succeeded."""
        for path in self.folder.glob(f"*{SUFFIX}"):
            with suppress(TensorFileError, OSError):
                if finished(str(read_note(path).get("run"))):
                    path.unlink()


def digest(values: Iterable[Any]) -> str:
    """SHA-256 over nested lists, dictionaries, tensors (their bytes) and scalars; anything else counts by its type."""
    hasher = hashlib.sha256()
    for value in values:
        _update(hasher, value)
    return hasher.hexdigest()


def _update(hasher: Any, value: Any) -> None:
    hasher.update(f"<{type(value).__name__}>".encode())
    if isinstance(value, torch.Tensor):
        hasher.update(f"{tuple(value.shape)} {value.dtype}".encode())
        hasher.update(value.detach().to("cpu").contiguous().flatten().view(torch.uint8).numpy().data)
    elif isinstance(value, dict):
        for key, item in value.items():
            _update(hasher, key)
            _update(hasher, item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _update(hasher, item)
    elif isinstance(value, (str, int, float, bool, type(None))):
        hasher.update(repr(value).encode())
    hasher.update(b"</>")
