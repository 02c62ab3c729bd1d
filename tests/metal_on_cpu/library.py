"""torch.mps.compile_shader's library and kernel objects, running on the CPU.

The calling convention is torch 2.7's to 2.15's: tensors are passed with their storage offset applied, ints as int64,
floats as float32, lists as arrays of those, unless ``arg_casts`` says otherwise.
"""

import ctypes
import threading
from collections.abc import Sequence
from typing import Any

import torch

from .build import build

CASTS = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
}
MAX_THREADS = 1024
"""Most threads in a threadgroup."""

FAULTS = {
    1: "accessed memory at an address that its type's alignment forbids",
    2: "accessed memory outside its buffers and arrays",
    3: "did not bring all threads of a threadgroup to the same barrier",
    4: "did not bring all threads of a simdgroup to the same simdgroup function",
    5: "accessed threadgroup memory from two threads without a barrier between a write and the other access",
    6: "needs more than 32 KB of threadgroup memory",
}
"""What a kernel did, by threads.h's number of the fault."""

_running = threading.Lock()


class MetalFault(RuntimeError):
    """A kernel did what is undefined on a GPU."""


class Kernel:
    """One kernel; ``launches`` counts its calls."""

    max_threads_per_threadgroup = MAX_THREADS
    thread_execution_width = 32

    def __init__(self, library: ctypes.CDLL, name: str) -> None:
        self.name = name
        self.launches = 0
        self._launch = getattr(library, f"launch_{name}")

    def __call__(
        self,
        *args: Any,
        threads: int | Sequence[int] | None = None,
        group_size: int | Sequence[int] | None = None,
        arg_casts: str | dict[int, str] | None = None,
    ) -> None:
        if threads is None:
            threads = next(arg.numel() for arg in args if isinstance(arg, torch.Tensor))
        grid = _sizes(threads)
        size = _sizes(min(MAX_THREADS, grid[0]) if group_size is None else group_size)
        if 0 in (*grid, *size) or size[0] * size[1] * size[2] > MAX_THREADS:
            raise RuntimeError(f"{self.name}: a grid of {grid} threads in groups of {size} cannot be launched")
        held = [_buffer(arg, _cast(arg_casts, index)) for index, arg in enumerate(args)]
        addresses = (ctypes.c_void_p * len(held))(*[tensor.data_ptr() for tensor in held])
        sizes = (ctypes.c_uint64 * len(held))(*map(_bytes, held))
        with _running:
            fault = self._launch(
                addresses, sizes, len(held), (ctypes.c_uint64 * 3)(*grid), (ctypes.c_uint64 * 3)(*size)
            )
        self.launches += 1
        if fault:
            raise MetalFault(f"{self.name} {FAULTS[fault]}")


class Library:
    """The kernels of one source as attributes, made at first use and kept."""

    def __init__(self, source: str) -> None:
        path, found = build(source)
        self._library = ctypes.CDLL(str(path))
        self._names = [kernel.name for kernel in found]
        self._kernels: dict[str, Kernel] = {}

    def __dir__(self) -> list[str]:
        return self._names

    def __getattr__(self, name: str) -> Kernel:
        if name.startswith("_") or name not in self._names:
            raise AttributeError(f"The Metal library has no kernel {name}.")
        return self._kernels.setdefault(name, Kernel(self._library, name))


def compile_shader(source: str) -> Library:
    """Compile Metal source. Raises MetalCompileError, a SyntaxError as torch raises it."""
    return Library(source)


def _sizes(value: int | Sequence[int]) -> tuple[int, int, int]:
    given = (value,) if isinstance(value, int) else tuple(value)
    x, y, z = (*given, 1, 1)[:3]
    return x, y, z


def _cast(casts: str | dict[int, str] | None, index: int) -> str | None:
    return casts if casts is None or isinstance(casts, str) else casts.get(index)


def _buffer(arg: Any, cast: str | None) -> torch.Tensor:
    if isinstance(arg, torch.Tensor):
        return arg
    values = list(arg) if isinstance(arg, (list, tuple)) else [arg]
    default = torch.float32 if isinstance(values[0], float) else torch.int64
    return torch.tensor(values, dtype=CASTS[cast] if cast else default, device="cpu")


def _bytes(tensor: torch.Tensor) -> int:
    """Bytes from the tensor's first element to the end of its last."""
    if tensor.numel() == 0:
        return 0
    return (1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride()))) * tensor.element_size()
