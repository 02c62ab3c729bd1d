"""Time and memory to open GGUF files, with gguf-py's GGUFReader and with the pack's GGUFFile.

Makes a file with a vocabulary of UMT5's size and one with a Wan 14B's tensors (a sparse file, a few hundred
kilobytes on disk), then opens each in fresh processes: ``python benchmarks/gguf_open.py [--runs N] [--json]``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil

ROOT = Path(__file__).resolve().parents[1]
N_TOKENS = 256_384
TOKENS_KEY = "tokenizer.ggml.tokens"
MEGABYTE = 1e6
WIDTH, FFN_WIDTH, TEXT_WIDTH, TIME_WIDTH, N_LAYERS = 5120, 13824, 4096, 256, 40


def load_pack() -> None:
    """Make the pack importable; by location, since ``scripts`` on the path would hide the PyPI package gguf."""
    spec = importlib.util.spec_from_file_location("_pack", ROOT / "scripts" / "_pack.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.load_pack()


def write_vocabulary(path: Path) -> None:
    """UMT5-XXL's vocabulary arrays (seeded random pieces) and its embedding table as a hole."""
    from apple_silicon_video.quantization.gguf_writer import GGUFWriter

    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 12, N_TOKENS)
    letters = generator.integers(ord("a"), ord("z") + 1, int(lengths.sum()), dtype=np.uint8).tobytes().decode()
    ends = np.cumsum(lengths).tolist()
    writer = GGUFWriter(path)
    writer.metadata("general.architecture", "t5encoder")
    writer.metadata(TOKENS_KEY, [f"▁{letters[end - length : end]}" for end, length in zip(ends, lengths.tolist())])
    writer.metadata("tokenizer.ggml.scores", -np.arange(N_TOKENS, dtype=np.float32))
    writer.metadata("tokenizer.ggml.token_type", np.ones(N_TOKENS, dtype=np.int32))
    writer.tensor("token_embd.weight", (N_TOKENS, TEXT_WIDTH), "Q5_K", sparse=True)
    writer.write()


def write_14b(path: Path) -> None:
    """The 1,095 tensors of Wan 2.1 T2V 14B at Q3_K, all of them holes."""
    from apple_silicon_video.quantization.gguf_writer import GGUFWriter

    writer = GGUFWriter(path)
    writer.metadata("general.architecture", "wan")

    def linear(name: str, n_out: int, n_in: int) -> None:
        writer.tensor(f"{name}.weight", (n_out, n_in), "Q3_K", sparse=True)
        writer.tensor(f"{name}.bias", (n_out,), "F32", sparse=True)

    for layer in range(N_LAYERS):
        block = f"blocks.{layer}"
        for attention in ("self_attn", "cross_attn"):
            for part in "qkvo":
                linear(f"{block}.{attention}.{part}", WIDTH, WIDTH)
            for part in "qk":
                writer.tensor(f"{block}.{attention}.norm_{part}.weight", (WIDTH,), "F32", sparse=True)
        for part in ("weight", "bias"):
            writer.tensor(f"{block}.norm3.{part}", (WIDTH,), "F32", sparse=True)
        linear(f"{block}.ffn.0", FFN_WIDTH, WIDTH)
        linear(f"{block}.ffn.2", WIDTH, FFN_WIDTH)
        writer.tensor(f"{block}.modulation", (1, 6, WIDTH), "F32", sparse=True)
    writer.tensor("patch_embedding.weight", (WIDTH, 16, 1, 2, 2), "F16", sparse=True)
    writer.tensor("patch_embedding.bias", (WIDTH,), "F32", sparse=True)
    linear("text_embedding.0", WIDTH, TEXT_WIDTH)
    linear("text_embedding.2", WIDTH, WIDTH)
    linear("time_embedding.0", WIDTH, TIME_WIDTH)
    linear("time_embedding.2", WIDTH, WIDTH)
    linear("time_projection.1", 6 * WIDTH, WIDTH)
    linear("head.head", 64, WIDTH)
    writer.tensor("head.modulation", (1, 2, WIDTH), "F32", sparse=True)
    writer.write()


FILES: dict[str, Callable[[Path], None]] = {"UMT5 vocabulary": write_vocabulary, "Wan 14B": write_14b}


def gguf_py() -> tuple[Callable[[Path], Any], Callable[[Any], Any]]:
    """How gguf-py opens a file, and how it reads the tokens of an open one."""
    import gguf

    return gguf.GGUFReader, lambda file: file.fields[TOKENS_KEY].contents() if TOKENS_KEY in file.fields else None


def the_pack() -> tuple[Callable[[Path], Any], Callable[[Any], Any]]:
    """The same for the pack."""
    load_pack()
    from apple_silicon_video.quantization.gguf import GGUFFile

    return GGUFFile, lambda file: file.metadata.get(TOKENS_KEY)


READERS = {"gguf-py": gguf_py, "the pack": the_pack}


def measure(reader: str, path: Path) -> dict[str, float]:
    """Seconds to open the file and to read its tokens, and bytes by which the resident memory grew at each step."""
    open_file, read_tokens = READERS[reader]()
    process = psutil.Process()
    memory = [process.memory_info().rss]
    clock = [time.perf_counter()]
    file = open_file(path)
    clock.append(time.perf_counter())
    memory.append(process.memory_info().rss)
    tokens = read_tokens(file)
    clock.append(time.perf_counter())
    memory.append(process.memory_info().rss)
    assert len(file.tensors) > 0 and (tokens is None or len(tokens) == N_TOKENS)
    return {
        "open_seconds": clock[1] - clock[0],
        "open_bytes": memory[1] - memory[0],
        "tokens_seconds": clock[2] - clock[1],
        "tokens_bytes": memory[2] - memory[1],
    }


def measure_in_process(reader: str, path: Path, runs: int) -> dict[str, float]:
    """The fastest of several runs, each in a fresh process, with the largest memory of any."""
    command = [sys.executable, __file__, "--measure", reader, str(path)]
    results = [
        json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(runs)
    ]
    return {key: (min if key.endswith("seconds") else max)(result[key] for result in results) for key in results[0]}


def benchmark(runs: int) -> dict[str, dict[str, dict[str, float]]]:
    """Measurements by file and reader."""
    load_pack()
    results: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, write in FILES.items():
            path = Path(folder) / f"{name}.gguf"
            write(path)
            results[name] = {reader: measure_in_process(reader, path, runs) for reader in READERS}
            path.unlink()
    return results


def print_table(results: dict[str, dict[str, dict[str, float]]]) -> None:
    """One line per file and reader, with the ratio of the opening times."""
    print(f"{'file':<18}{'reader':<10}{'open':>11}{'memory':>11}{'tokens':>11}{'memory':>11}{'ratio':>8}")
    for name, readers in results.items():
        slowest = readers["gguf-py"]["open_seconds"]
        for reader, result in readers.items():
            times = [f"{1000 * result[key]:.1f} ms" for key in ("open_seconds", "tokens_seconds")]
            sizes = [f"{result[key] / MEGABYTE:.1f} MB" for key in ("open_bytes", "tokens_bytes")]
            ratio = f"{slowest / result['open_seconds']:.0f} x"
            print(f"{name:<18}{reader:<10}{times[0]:>11}{sizes[0]:>11}{times[1]:>11}{sizes[1]:>11}{ratio:>8}")


def main() -> None:
    """Run the benchmark, or with --measure one measurement for it."""
    parser = argparse.ArgumentParser(description="Measure how GGUF files open, with gguf-py and with the pack.")
    parser.add_argument("--runs", type=int, default=3, help="processes per file and reader (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--measure", nargs=2, metavar=("READER", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure[0], Path(options.measure[1]))))
        return
    results = benchmark(options.runs)
    if options.json:
        print(json.dumps(results, indent=2))
    else:
        print_table(results)


if __name__ == "__main__":
    main()
