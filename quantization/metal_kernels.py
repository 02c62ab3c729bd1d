"""Decodes ggml blocks on MPS with one launch of a Metal kernel per tensor (metal/*.metal); keeps and checks kernels.

A format's kernels are compiled at its first use through torch.mps.compile_shader, which torch has from 2.7 on. Each
kernel is compared with the torch decoder on the first blocks it is given; one that fails or differs is dropped for the
life of the process, and formats.py decodes with torch operations instead. ASV_METAL_KERNELS=off drops all of them.
"""

import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .block_format import BlockFormat

SWITCH = "ASV_METAL_KERNELS"
FOLDER = Path(__file__).with_name("metal")

OUTPUT_TYPES = {torch.float32: "float", torch.float16: "half", torch.bfloat16: "bfloat"}
ROW_TYPES = {torch.int32: "int", torch.int64: "long"}

# Eight simdgroups of 32 threads: a thread needs few registers and no threadgroup memory, so any multiple of 32 keeps a
# core full; larger groups would only wait longer for their slowest simdgroup before the next one starts.
GROUP = 256
CHECKED_WEIGHTS = 1 << 18

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MetalFormat:
    """Where a format's kernels are, and what their struct in metal/ declares.

    ``weights`` weights in ``block_bytes`` bytes are decoded by ``lanes`` threads; the kernels for tensors that begin
    at a multiple of ``alignment`` bytes read wider than a byte.
    """

    files: tuple[str, ...]
    weights: int
    block_bytes: int
    lanes: int
    alignment: int


METAL_FORMATS: dict[str, MetalFormat] = {
    "BF16": MetalFormat(("bf16",), 4, 8, 1, 4),
    "Q4_0": MetalFormat(("q4_0",), 32, 18, 4, 2),
    "Q4_1": MetalFormat(("q4_1",), 32, 20, 4, 4),
    "Q5_0": MetalFormat(("fifth_bits", "q5_0"), 32, 22, 4, 2),
    "Q5_1": MetalFormat(("fifth_bits", "q5_1"), 32, 24, 4, 4),
    "Q8_0": MetalFormat(("q8_0",), 32, 34, 4, 2),
    "Q2_K": MetalFormat(("q2_k",), 256, 84, 16, 4),
    "Q3_K": MetalFormat(("q3_k",), 256, 110, 8, 2),
    "Q4_K": MetalFormat(("scales_and_minimums", "q4_k"), 256, 144, 32, 4),
    "Q5_K": MetalFormat(("scales_and_minimums", "q5_k"), 256, 176, 8, 4),
    "Q6_K": MetalFormat(("q6_k",), 256, 210, 16, 2),
    "IQ4_NL": MetalFormat(("nibble_table", "iq4_values", "iq4_nl"), 32, 18, 4, 2),
    "IQ4_XS": MetalFormat(("nibble_table", "iq4_values", "iq4_xs"), 256, 136, 32, 4),
    "MXFP4": MetalFormat(("nibble_table", "mxfp4"), 32, 17, 4, 1),
}

SCALED_FILES: dict[str, tuple[str, ...]] = {
    "F8_E4M3": ("f8_e4m3",),
    "F8_E5M2": ("f8_e5m2",),
    "I8": ("i8",),
}
"""Files of the one-byte formats, which metal_scaled.py launches."""

SHARED_FILES = {"blocks": ("blocks", "dequantize"), "scaled": ("blocks", "scaled", "dequantize_scaled")}
"""Files before those of a format, by whether it is one of blocks or a one-byte one."""


@dataclass(frozen=True)
class Purpose:
    """What the log says of kernels: how the ones in use compare with the reference, and what is done without them."""

    agrees: str
    instead: str


DECODING = Purpose("equal to the reference", "torch decodes them instead, more slowly")

_lock = threading.Lock()
_libraries: dict[str, Any] = {}
_kernels: dict[tuple[str, str], Any] = {}


def forget() -> None:
    """Forget all kernels and verdicts, so that the next use compiles and checks again."""
    with _lock:
        _libraries.clear()
        _kernels.clear()


def source(name: str) -> str:
    """The Metal source of a format's kernels."""
    return read_source(name, SHARED_FILES)


def read_source(name: str, shared: dict[str, tuple[str, ...]]) -> str:
    """The Metal source of a format's struct after that of the ``shared`` files of its kind."""
    kind, files = ("scaled", SCALED_FILES[name]) if name in SCALED_FILES else ("blocks", METAL_FORMATS[name].files)
    return "\n".join((FOLDER / f"{file}.metal").read_text(encoding="utf-8") for file in (*shared[kind], *files))


def dequantize(raw: Tensor, fmt: BlockFormat, count: int, dtype: torch.dtype) -> Tensor | None:
    """Decode ``count`` weights: a dense 1-D tensor, or None where torch must decode.

    raw: contiguous uint8 on MPS at any storage offset, whole blocks. dtype: float32, float16 or bfloat16.
    """
    metal = _usable(fmt, count)
    if metal is None or count == 0:
        return None
    raw = raw.view(-1)
    name = f"dequantize_{OUTPUT_TYPES[dtype]}{_suffix(raw, metal)}"

    def launch(kernel: Any, blocks: Tensor) -> Tensor:
        n_blocks = blocks.numel() // metal.block_bytes
        out = torch.empty(n_blocks * metal.weights, dtype=dtype, device=blocks.device)
        kernel(blocks, out, threads=n_blocks * metal.lanes, group_size=GROUP)
        return out

    def same(kernel: Any) -> bool:
        n_blocks = min(count, CHECKED_WEIGHTS) // fmt.block_size
        first = raw[: n_blocks * fmt.block_bytes]
        return equal(launch(kernel, first), _reference(first.cpu(), fmt, dtype))

    kernel = checked(fmt.name, name, same)
    return None if kernel is None else launch(kernel, raw)


def dequantize_rows(
    raw: Tensor, fmt: BlockFormat, shape: tuple[int, int], rows: Tensor, dtype: torch.dtype
) -> Tensor | None:
    """Decode rows of a matrix of ``shape``: [rows.numel(), columns], or None where torch must decode.

    rows: int32 or int64 on raw's device, of any shape. A row outside the matrix becomes zeros.
    """
    n_rows, columns = shape
    metal = _usable(fmt, columns)
    if metal is None or rows.dtype not in ROW_TYPES or rows.numel() == 0 or columns == 0:
        return None
    name = f"dequantize_rows_{ROW_TYPES[rows.dtype]}_{OUTPUT_TYPES[dtype]}{_suffix(raw, metal)}"
    per_row = columns // metal.weights

    def launch(kernel: Any, wanted: Tensor) -> Tensor:
        out = torch.empty(wanted.numel(), columns, dtype=dtype, device=raw.device)
        grid = (per_row * metal.lanes, wanted.numel())
        kernel(raw, out, wanted, per_row, n_rows, threads=grid, group_size=(min(GROUP, grid[0]), 1))
        return out

    def same(kernel: Any) -> bool:
        first = wanted[: max(1, CHECKED_WEIGHTS // columns)]
        blocks = raw.view(n_rows, -1).index_select(0, first)
        return equal(launch(kernel, first), _reference(blocks.cpu(), fmt, dtype))

    wanted = rows.reshape(-1).contiguous()
    kernel = checked(fmt.name, name, same)
    return None if kernel is None else launch(kernel, wanted)


def _usable(fmt: BlockFormat, count: int) -> MetalFormat | None:
    metal = METAL_FORMATS.get(fmt.name)
    return metal if metal is not None and count % metal.weights == 0 and enabled() else None


def enabled() -> bool:
    """Whether kernels may be used: torch can compile them and the environment does not forbid it."""
    return hasattr(torch.mps, "compile_shader") and os.environ.get(SWITCH, "").lower() != "off"


def _suffix(raw: Tensor, metal: MetalFormat) -> str:
    """MPS buffers begin at page or 256-byte boundaries, so the storage offset decides what is aligned."""
    return "" if metal.alignment > 1 and raw.storage_offset() % metal.alignment == 0 else "_unaligned"


def checked(
    library: str,
    name: str,
    same: Callable[[Any], bool],
    text: Callable[[], str] | None = None,
    purpose: Purpose = DECODING,
) -> Any:
    """The kernel ``name`` of a library, or None if it was dropped; at its first use it is compiled and compared.

    library: a format's name, or what else the log should say of the weights. same: launches the kernel it is given and
    tells whether the result is right. text: the source of the library; that of the format if None.
    """
    key = (library, name)
    if key in _kernels:
        return _kernels[key]
    with _lock:
        if key not in _kernels:
            _kernels[key] = _first_use(library, name, same, text or (lambda: source(library)), purpose)
        return _kernels[key]


def _first_use(library: str, name: str, same: Callable[[Any], bool], text: Callable[[], str], purpose: Purpose) -> Any:
    if library in _libraries and _libraries[library] is None:
        return None
    try:
        if library not in _libraries:
            _libraries[library] = None
            _libraries[library] = torch.mps.compile_shader(text())
        kernel = getattr(_libraries[library], name)
        fault = None if same(kernel) else "its result differs from the reference"
    except Exception as error:  # whatever compiling or launching raises, torch can still decode
        fault = next(iter(str(error).splitlines()), type(error).__name__)
    if fault is None:
        logger.info("Metal kernel %s for %s weights: %s, in use.", name, library, purpose.agrees)
        return kernel
    logger.warning("Metal kernel %s for %s weights is not used (%s): %s.", name, library, fault, purpose.instead)
    return None


def _reference(blocks: Tensor, fmt: BlockFormat, dtype: torch.dtype) -> Tensor:
    out = torch.empty(blocks.numel() // fmt.block_bytes, fmt.block_size, dtype=dtype)
    fmt.decode_into(blocks.contiguous().view(-1, fmt.block_bytes), out)
    return out


def equal(result: Tensor, expected: Tensor) -> bool:
    """Whether all bits agree; one NaN is like another."""
    integer = torch.int32 if expected.dtype == torch.float32 else torch.int16
    result, expected = result.cpu().view(-1), expected.view(-1)
    same = result.view(integer) == expected.view(integer)
    return bool((same | (result.isnan() & expected.isnan())).all())
