"""Where decoded frames wait until every tile has painted its part: in memory for an IMAGE, on the disk for a file.

Tiles add to a canvas what they contribute, so it begins at zero. On the disk a colour is one of 65,536 levels, six
bytes a pixel; the file has no name, goes through the system's file cache, and is gone when it is closed.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Protocol

import torch
from torch import Tensor

from .vae_tiles import GIB, Span

LEVELS = 65535
SPARE_BYTES = GIB


class ScratchError(OSError):
    """The disk has no room for the frames; one sentence."""


class Canvas(Protocol):
    """Frames [T, H, W, C] of colours in 0..1 to which tiles are added."""

    def add(self, first: int, row: Span, column: Span, tile: Tensor) -> None:
        """Add a tile [t, rows, columns, C] to frames first..first + t - 1; row and column: in pixels."""

    def frames(self, first: int, count: int) -> Tensor:
        """Frames [count, H, W, C] as they stand."""


class TensorCanvas:
    """A canvas in a tensor of zeros."""

    def __init__(self, frames: Tensor) -> None:
        self._frames = frames

    def add(self, first: int, row: Span, column: Span, tile: Tensor) -> None:
        """See Canvas."""
        last = first + tile.shape[0]
        self._frames[first:last, row.first : row.last, column.first : column.last] += tile.to(self._frames.dtype)

    def frames(self, first: int, count: int) -> Tensor:
        """See Canvas: a view."""
        return self._frames[first : first + count]


class FileCanvas:
    """A canvas in a file without a name in `folder`: a context manager. Raises ScratchError without room for it."""

    def __init__(self, shape: tuple[int, int, int, int], folder: Path) -> None:
        self._shape = shape
        self._frame_bytes = shape[1] * shape[2] * shape[3] * 2
        folder.mkdir(parents=True, exist_ok=True)
        needed, free = shape[0] * self._frame_bytes, shutil.disk_usage(folder).free
        if free < needed + SPARE_BYTES:
            raise ScratchError(
                f"Decoding in tiles needs {needed / GIB:.1f} GiB in {folder} and {free / GIB:.1f} are free: "
                "make room there, raise the budget or decode fewer frames."
            )
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        os.truncate(self._file.fileno(), needed)

    def __enter__(self) -> FileCanvas:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, first: int, row: Span, column: Span, tile: Tensor) -> None:
        """See Canvas."""
        for index, part in enumerate(tile, first):
            band = self._read(index, row)
            region = band[:, column.first : column.last]
            region += part.float().mul(LEVELS).round_().to(torch.int32)
            self._write(index, row, band)

    def frames(self, first: int, count: int) -> Tensor:
        """See Canvas: float32."""
        whole = Span(0, self._shape[1])
        bands = [self._read(index, whole) for index in range(first, first + count)]
        return torch.stack(bands).to(torch.float32).div_(LEVELS)

    def _read(self, index: int, rows: Span) -> Tensor:
        """Rows of a frame, int32 [rows, W, C]."""
        height, width, channels = self._shape[1:]
        self._file.seek(index * self._frame_bytes + rows.first * self._frame_bytes // height)
        data = bytearray(self._file.read(rows.size * self._frame_bytes // height))
        return torch.frombuffer(data, dtype=torch.uint16).to(torch.int32).reshape(rows.size, width, channels)

    def _write(self, index: int, rows: Span, band: Tensor) -> None:
        self._file.seek(index * self._frame_bytes + rows.first * self._frame_bytes // self._shape[1])
        self._file.write(band.clamp_(0, LEVELS).to(torch.uint16).numpy().tobytes())
