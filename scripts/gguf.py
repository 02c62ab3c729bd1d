"""Looks into GGUF files from the command line, and makes them from other models.

``python scripts/gguf.py inspect FILE [--json]``; ``dequantize FILE TENSOR OUT.npy``; ``quantize SRC DST --type
Q5_K_M``. Messages go to stderr, one sentence each; the exit status is 0, 1 when a file cannot be read or written or
the work is interrupted, 2 for wrong usage.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any

from _command_line import add_command, positive, printable, run, shortened, stop_on_signals
from _pack import load_pack

try:
    import numpy as np
    import torch
except ModuleNotFoundError as error:
    sys.exit(f"{error.name} is not installed for {sys.executable}: run this with the Python that ComfyUI runs with.")

load_pack()

from apple_silicon_video.quantization.formats import FORMATS, dequantize  # noqa: E402
from apple_silicon_video.quantization.gguf import GGUFError, GGUFFile, TensorInfo  # noqa: E402
from apple_silicon_video.quantization.gguf_writer import written_beside  # noqa: E402
from apple_silicon_video.quantization.quantizer import QuantizeError  # noqa: E402
from apple_silicon_video.quantization.quantizer_files import default_threads, quantize_file  # noqa: E402
from apple_silicon_video.quantization.recipes import RECIPES  # noqa: E402

SHOWN_ITEMS = 8
CHUNK_WEIGHTS = 4 << 20
SECONDS_BEFORE_ESTIMATE, PART_BEFORE_ESTIMATE = 5.0, 0.001  # before that the first pieces' time misleads
DTYPES = {"float32": torch.float32, "float16": torch.float16}


def main(arguments: list[str] | None = None) -> int:
    """Run one subcommand; returns the exit status."""
    return run(_parser(), arguments, GGUFError, QuantizeError)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gguf.py", description="Look into GGUF files and make them.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    command = add_command(commands, "inspect", inspect, "show metadata, tensors and totals per type")
    command.add_argument("file", type=Path, metavar="FILE")
    command.add_argument("--json", action="store_true", help="print one JSON object instead of tables")

    command = add_command(commands, "dequantize", dequantize_to_npy, "write one tensor as a NumPy file")
    command.add_argument("file", type=Path, metavar="FILE")
    command.add_argument("tensor", metavar="TENSOR")
    command.add_argument("out", type=Path, metavar="OUT.npy")
    command.add_argument("--dtype", choices=DTYPES, default="float32", help="of the result (default: %(default)s)")

    command = add_command(commands, "quantize", quantize, "make a GGUF file from safetensors or another GGUF file")
    command.add_argument(
        "source", type=Path, metavar="SRC", help=".safetensors, .safetensors.index.json, .gguf, folder"
    )
    command.add_argument("out", type=Path, metavar="DST.gguf")
    command.add_argument("--type", choices=RECIPES, required=True, help="kind of file to make")
    command.add_argument("--threads", type=positive, default=default_threads(), help="(default: %(default)s)")
    command.add_argument("--imatrix", type=Path, metavar="FILE", help="importance matrix made by llama.cpp's imatrix")
    command.add_argument(
        "--lora", type=_lora, action="append", default=[], metavar="FILE[:STRENGTH]", help="merge in (may be repeated)"
    )
    return parser


def _lora(text: str) -> tuple[Path, float]:
    name, colon, strength = text.rpartition(":")
    try:
        return (Path(name), float(strength)) if colon else (Path(text), 1.0)
    except ValueError:
        return Path(text), 1.0


def inspect(options: argparse.Namespace) -> None:
    """Print what a file holds, without decoding long arrays or tensors."""
    file = GGUFFile(options.file)
    if options.json:
        print(json.dumps(_report(file), indent=2))
        return
    size = file.path.stat().st_size
    print(f"{printable(str(file.path))}: GGUF version {file.version}, {size} bytes")
    print(f"architecture: {printable(file.architecture) if file.architecture else 'not given'}\n")
    rows = [(key, _kind(file, key), _shown_value(file, key)) for key in file.metadata]
    _print_table(("metadata", "kind", "value"), rows, "lll")
    tensors = file.tensors.values()
    _print_table(
        ("tensor", "type", "shape", "bytes"),
        [(info.name, info.type_name, _shape(info.original_shape), str(info.nbytes)) for info in tensors],
        "lllr",
    )
    totals = [*_totals(file), _total("all", list(tensors))]
    _print_table(("type", "tensors", "weights", "bytes", "bits per weight"), [_total_row(t) for t in totals], "lrrrr")


def dequantize_to_npy(options: argparse.Namespace) -> None:
    """Decode one tensor, a chunk at a time, into a .npy file written beside its name and moved into place."""
    file = GGUFFile(options.file)
    raw = file.raw(options.tensor)
    info = file.tensors[options.tensor]
    descr = np.dtype(options.dtype).newbyteorder("<").str
    header = {"descr": descr, "fortran_order": False, "shape": info.original_shape}
    try:
        with written_beside(options.out) as out:
            np.lib.format.write_array_header_1_0(out, header)
            for piece in _decoded(file, info, raw, DTYPES[options.dtype]):
                out.write(piece.numpy().data)
    except OSError as error:
        raise GGUFError(f"{options.out} cannot be written ({error.strerror}); choose another place.") from error
    print(f"{printable(str(options.out))}: {_shape(info.original_shape)} {options.dtype}")


def quantize(options: argparse.Namespace) -> None:
    """Quantise a model file and print what came of it; a signal to stop leaves nothing at the file's name."""
    torch.set_num_threads(1)
    stop_on_signals()
    report = quantize_file(
        options.source, options.out, options.type, options.threads, options.imatrix, options.lora, _Progress()
    )
    print("\n".join(map(printable, report.text().split("\n"))))


class _Progress:
    """Shows on stderr how much is done and how long the rest takes: on a terminal always, elsewhere every tenth."""

    def __init__(self) -> None:
        self._begin = time.monotonic()
        self._shown = -1.0

    def __call__(self, done: int, total: int, name: str) -> None:
        terminal = sys.stderr.isatty()
        part = done / total if total else 1.0
        if part < 1 and part - self._shown < (0.001 if terminal else 0.1):
            return
        self._shown = part
        spent = time.monotonic() - self._begin
        left = spent * (1 - part) / part if part else 0.0
        known = part == 1 or (spent > SECONDS_BEFORE_ESTIMATE and part > PART_BEFORE_ESTIMATE)
        estimate = f"{left // 60:3.0f} min {left % 60:02.0f} s left" if known else " " * len("  0 min 00 s left")
        line = f"{100 * part:5.1f} %  {estimate}  {printable(name)}"
        print(
            f"\r{line:<79}" if terminal else line,
            end="" if terminal and part < 1 else "\n",
            file=sys.stderr,
            flush=True,
        )


def _decoded(file: GGUFFile, info: TensorInfo, raw: torch.Tensor, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """The tensor's weights as flat pieces of ``dtype``."""
    if info.type_name not in FORMATS:
        for piece in file.tensor(info.name).reshape(-1).split(CHUNK_WEIGHTS):
            yield piece.to(dtype)
        return
    block_format = FORMATS[info.type_name]
    for piece in raw.split(CHUNK_WEIGHTS // block_format.block_size * block_format.block_bytes):
        n_weights = piece.numel() // block_format.block_bytes * block_format.block_size
        yield dequantize(piece, block_format, (n_weights,), dtype)


def _report(file: GGUFFile) -> dict[str, Any]:
    return {
        "file": str(file.path),
        "bytes": file.path.stat().st_size,
        "version": file.version,
        "alignment": file.alignment,
        "architecture": file.architecture,
        "metadata": {key: _json_metadata(file, key) for key in file.metadata},
        "tensors": [
            {
                "name": info.name,
                "type": info.type_name,
                "shape": list(info.original_shape),
                "offset": info.offset,
                "bytes": info.nbytes,
            }
            for info in file.tensors.values()
        ],
        "types": _totals(file),
        "total": _total("all", list(file.tensors.values())),
    }


def _json_metadata(file: GGUFFile, key: str) -> dict[str, Any]:
    entry: dict[str, Any] = {"kind": file.metadata.kind(key)}
    length = file.metadata.length(key)
    if length is not None:
        entry["length"] = length
    if length is None or length <= SHOWN_ITEMS:
        entry["value"] = _json_value(file.metadata[key])
    return entry


def _json_value(value: Any) -> Any:
    """A metadata value as strict JSON has it: lists for arrays, strings for numbers that are not finite."""
    if isinstance(value, np.ndarray | list):
        return [_json_value(item) for item in (value.tolist() if isinstance(value, np.ndarray) else value)]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _kind(file: GGUFFile, key: str) -> str:
    length = file.metadata.length(key)
    kind = file.metadata.kind(key)
    return kind if length is None else f"{kind.removesuffix('[]')}[{length}]"


def _shown_value(file: GGUFFile, key: str) -> str:
    if (file.metadata.length(key) or 0) > SHOWN_ITEMS:
        return "..."
    return shortened(str(_json_value(file.metadata[key])))


def _totals(file: GGUFFile) -> list[dict[str, Any]]:
    by_type: dict[str, list[TensorInfo]] = {}
    for info in file.tensors.values():
        by_type.setdefault(info.type_name, []).append(info)
    totals = [_total(type_name, infos) for type_name, infos in by_type.items()]
    return sorted(totals, key=lambda total: -total["bytes"])


def _total(type_name: str, infos: list[TensorInfo]) -> dict[str, Any]:
    weights = sum(prod(info.shape) for info in infos)
    nbytes = sum(info.nbytes for info in infos)
    bits = round(8 * nbytes / weights, 4) if weights else 0.0
    return {"type": type_name, "tensors": len(infos), "weights": weights, "bytes": nbytes, "bits_per_weight": bits}


def _total_row(total: dict[str, Any]) -> tuple[str, ...]:
    *counts, bits = total.values()
    return (*map(str, counts), f"{bits:.4g}")


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def _print_table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]], alignment: str) -> None:
    cells = [heads, *(tuple(map(printable, row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for row in cells:
        padded = (
            cell.ljust(width) if side == "l" else cell.rjust(width) for cell, width, side in zip(row, widths, alignment)
        )
        print("  ".join(padded).rstrip())
    print()


if __name__ == "__main__":
    sys.exit(main())
