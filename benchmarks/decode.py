"""Speed of decoding quantised weights, per type and path, beside plain decoding and a copy of as many bytes.

Decodes 13 million weights to float16: with torch on the CPU, on two threads, and on a Mac also with torch on MPS and
with the Metal kernels. The three that are compared take turns, and of each the fastest round counts, so that whatever
else the machine does hits them alike. Part of ``python benchmarks/run.py``; alone, ``python benchmarks/decode.py
[--rounds N] [--threads N] [--json]``.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import plain_decode
import torch
from measure import Row
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

TYPES = ("Q8_0", "Q4_0", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
WEIGHTS = 5120 * 2560
SMALL_WEIGHTS = 1 << 16
THREADS = 2
ROUNDS = 15
DTYPE = torch.float16


class Traffic(TorchDispatchMode):
    """Counts launches and moved bytes of the operations that run while it is active.

    A launch is an operation that neither makes a view nor merely allocates. It moves every tensor that it is given,
    except one that it only overwrites (``out=``, the target of ``copy_``), and every tensor that it returns or
    changes; each counts with its own elements, so that what is broadcast counts once. What an operation does inside,
    such as casting an operand, is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.bytes = 0

    @property
    def launches(self) -> int:
        """Number of launches."""
        return len(self.names)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        schema = func._schema
        is_view = any(ret.alias_info is not None and not ret.alias_info.is_write for ret in schema.returns)
        if is_view or schema.name.startswith(("aten::empty", "aten::_unsafe_view")):
            return result
        self.names.append(schema.name)
        given = [
            *zip(schema.arguments, args),
            *((arg, kwargs[arg.name]) for arg in schema.arguments if arg.name in kwargs),
        ]
        for argument, value in given:
            overwritten = argument.is_out or (argument.name == "self" and schema.name == "aten::copy_")
            self.bytes += 0 if overwritten else _size(value)
        self.bytes += _size(result)
        return result


def _size(value: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def traffic(function: Callable[[], object]) -> Traffic:
    """Launches and bytes of the second call of ``function``: the first one may fill caches of constants."""
    function()
    with Traffic() as counted:
        function()
    return counted


def ideal_bytes(raw: Tensor, weights: int, dtype: torch.dtype) -> int:
    """Bytes that must be moved: the quantised ones read once, the weights written once."""
    return raw.numel() + weights * dtype.itemsize


def fastest(functions: Sequence[Callable[[], object]], rounds: int, device: torch.device) -> list[float]:
    """The least seconds of each function, which take turns."""
    wait = torch.mps.synchronize if device.type == "mps" else lambda: None
    best = [float("inf")] * len(functions)
    for turn in range(rounds + 1):
        for index, function in enumerate(functions):
            wait()
            begin = time.perf_counter()
            function()
            wait()
            if turn > 0:  # the first turn warms up
                best[index] = min(best[index], time.perf_counter() - begin)
    return best


def measure(name: str, path: str, device: torch.device, weights: int, rounds: int) -> Row:
    """One row: see ``run``."""
    from apple_silicon_video.quantization.formats import FORMATS, dequantize, random_blocks

    fmt = FORMATS[name]
    some = random_blocks(fmt, min(weights, 1 << 18) // fmt.block_size, seed=0)
    raw = some.repeat(weights // fmt.block_size // some.shape[0], 1).to(device)
    weights = raw.shape[0] * fmt.block_size
    ideal = ideal_bytes(raw, weights, DTYPE)
    source, target = (torch.zeros(ideal // 2, dtype=torch.uint8, device=device) for _ in range(2))

    def ours() -> Tensor:
        return dequantize(raw, fmt, (weights,), DTYPE)

    def chunk() -> Tensor:
        return dequantize(raw[: some.shape[0]], fmt, (some.shape[0] * fmt.block_size,), DTYPE)

    seconds, plain_seconds, copy_seconds = fastest(
        (ours, lambda: plain_decode.decode(name, raw, DTYPE), lambda: target.copy_(source)), rounds, device
    )
    kernel = path == "Metal"
    return {
        "type": name,
        "path": path,
        "weights_per_second": weights / seconds,
        "baseline_weights_per_second": weights / plain_seconds,
        "ratio": plain_seconds / seconds,
        "launches": 1 if kernel else traffic(chunk).launches,
        "bytes_over_ideal": 1.0 if kernel else traffic(ours).bytes / ideal,
        "share_of_copy_bandwidth": copy_seconds / seconds,
    }


def _paths() -> list[tuple[str, torch.device, str]]:
    """Name, device and whether Metal kernels are on or off."""
    paths = [("torch", torch.device("cpu"), "off")]
    if torch.backends.mps.is_available():
        paths.append(("torch on MPS", torch.device("mps"), "off"))
        if hasattr(torch.mps, "compile_shader"):
            paths.append(("Metal", torch.device("mps"), "on"))
    return paths


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run(small: bool = False, rounds: int | None = None, threads: int = THREADS) -> list[Row]:
    """Decode random blocks of every type on every path of this machine.

    small: a few weights, once. threads: of torch on the CPU. Each row has the ``type`` and ``path``, the weights per
    second of the pack and of plain_decode.py on the same device, the ``ratio`` of the two, the pack's ``launches`` per
    chunk and ``bytes_over_ideal`` (see ``Traffic``; a Metal kernel is one launch and moves each byte once), and its
    ``share_of_copy_bandwidth``: the time of copying as many bytes as must be moved over the time of decoding.
    """
    from _pack import load_pack

    load_pack()
    from apple_silicon_video.quantization import metal_kernels

    rounds = rounds or (1 if small else ROUNDS)
    rows = []
    with _threads(threads):
        for path, device, metal in _paths():
            with mock.patch.dict(os.environ, {metal_kernels.SWITCH: metal}):
                rows += [measure(name, path, device, SMALL_WEIGHTS if small else WEIGHTS, rounds) for name in TYPES]
    return rows


def means(rows: Sequence[Row]) -> dict[str, float]:
    """The geometric mean of the ratios, by path."""
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(row["path"], []).append(row["ratio"])
    return {path: torch.tensor(ratios).log().mean().exp().item() for path, ratios in found.items()}


def main() -> None:
    """Run it and print a table or JSON."""
    parser = argparse.ArgumentParser(description="Measure how fast quantised weights are decoded.")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="rounds, of which the fastest counts")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--threads", type=int, default=THREADS, help="threads of torch on the CPU")
    options = parser.parse_args()
    rows = run(rounds=options.rounds, threads=options.threads)
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    print(f"{'type':<8}{'path':<14}{'M weights/s':>12}{'plain':>8}{'ratio':>8}{'launches':>10}{'bytes':>8}{'copy':>7}")
    for row in rows:
        speed, plain = (row[key] / 1e6 for key in ("weights_per_second", "baseline_weights_per_second"))
        print(
            f"{row['type']:<8}{row['path']:<14}{speed:>12.0f}{plain:>8.0f}{row['ratio']:>7.2f}x{row['launches']:>10}"
            f"{row['bytes_over_ideal']:>7.2f}x{100 * row['share_of_copy_bandwidth']:>6.0f}%"
        )
    for path, mean in means(rows).items():
        print(f"{path}: {mean:.2f} times plain decoding as the geometric mean")


if __name__ == "__main__":
    main()
