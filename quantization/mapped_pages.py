"""Gives the pages of a mapped model file back to the system once the device holds a copy of them.

A file's pages stay counted as resident after they were read, so that a model on the device would cost its size twice
until memory runs short. ``madvise`` drops them; they are read again from the file if anyone asks.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import weakref
from bisect import bisect_right, insort
from threading import RLock

import torch

_MADV_DONTNEED = 4  # on Linux and macOS
_lock = RLock()
_mappings: list[tuple[int, int]] = []  # first and last address + 1 of every registered mapping that lives


def register(mapping: mmap.mmap) -> None:
    """Allow pages of ``mapping`` to be dropped: a private mapping of a file that nobody writes to."""
    start = torch.frombuffer(mapping, dtype=torch.uint8).data_ptr()
    extent = (start, start + len(mapping))
    with _lock:
        insort(_mappings, extent)
    weakref.finalize(mapping, _forget, extent)


def _forget(extent: tuple[int, int]) -> None:
    with _lock:
        _mappings.remove(extent)


def release(tensor: torch.Tensor) -> int:
    """Drop the whole pages under a CPU tensor if they are part of a registered mapping; return their bytes."""
    start = tensor.data_ptr()
    stop = start + tensor.nbytes
    page = mmap.PAGESIZE
    first, last = -(-start // page) * page, stop // page * page
    if last <= first or sys.platform not in ("linux", "darwin"):
        return 0
    with _lock:
        index = bisect_right(_mappings, (start, sys.maxsize)) - 1
        if index < 0 or stop > _mappings[index][1]:
            return 0
        failed = _madvise(first, last - first)
    return 0 if failed else last - first


def release_all() -> int:
    """Drop the pages of every registered mapping, used or not; return how many mappings that were."""
    if sys.platform not in ("linux", "darwin"):
        return 0
    with _lock:
        return sum(_madvise(start, stop - start) == 0 for start, stop in _mappings)


def _madvise(address: int, length: int) -> int:
    call = ctypes.CDLL(None, use_errno=True).madvise
    call.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return int(call(address, length, _MADV_DONTNEED))
