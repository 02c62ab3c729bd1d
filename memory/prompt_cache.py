"""Encoded prompts on disk, so that a prompt that was encoded once never loads its text encoder again.

An entry's name is the SHA-256 of everything that the result depends on; the encoder file counts with its size, its
time of change and samples spread over its content, so that 11 GB are told apart by reading 4 MB.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from .tensor_files import SUFFIX, TensorFileError, keep_newest, load_value, save_value

log = logging.getLogger(__name__)

SAMPLES = 64
SAMPLE_BYTES = 64 << 10
LIMIT_BYTES = 1 << 30  # about 120 prompts of UMT5-XXL: 512 tokens x 4096 float32, 8 MiB each


def file_fingerprint(path: Path) -> str:
    """SHA-256 over a file's size, time of change, and SAMPLES evenly spaced pieces of SAMPLE_BYTES, ends included."""
    status = path.stat()
    digest = hashlib.sha256(f"{status.st_size} {status.st_mtime_ns}".encode())
    last = max(0, status.st_size - SAMPLE_BYTES)
    with open(path, "rb") as file:
        for offset in sorted({last * number // (SAMPLES - 1) for number in range(SAMPLES)}):
            file.seek(offset)
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


class PromptCache:
    """A folder of encoded prompts, the least recently used of which go when ``limit`` bytes are exceeded."""

    def __init__(self, folder: Path, limit: int = LIMIT_BYTES) -> None:
        """The folder is made with the first entry."""
        self.folder = folder
        self.limit = limit

    def path(self, **facts: Any) -> Path:
        """Where the entry of these facts (JSON values) lies, or would lie."""
        return self.folder / (hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest() + SUFFIX)

    def get(self, path: Path) -> Any:
        """The entry, None if there is none; a damaged one is removed with a line in the log."""
        if not path.is_file():
            return None
        try:
            value = load_value(path)
        except TensorFileError as error:
            log.warning("The stored prompt is encoded again: %s", error)
            with suppress(OSError):
                path.unlink()
            return None
        with suppress(OSError):
            os.utime(path)
        return value

    def put(self, path: Path, value: Any) -> bool:
        """Store an entry and make room; False, with a line in the log, where that is not possible."""
        try:
            save_value(path, value)
        except (TensorFileError, OSError) as error:
            log.warning("The encoded prompt is not kept on disk: %s", error)
            return False
        keep_newest(self.folder, path, self.limit)
        return True
