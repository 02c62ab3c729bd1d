"""Time and memory to open GGUF files, with gguf-py's GGUFReader and with the pack's GGUFFile.

Makes a file with a vocabulary of UMT5's size and one with a Wan 14B's tensors (sparse files, a few hundred
kilobytes to megabytes on disk), then opens each in fresh processes. Part of ``python benchmarks/run.py``.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from measure import Row, in_own_process, main

TOKENS_KEY = "tokenizer.ggml.tokens"


def write_vocabulary(path: Path, small: bool) -> None:
    """A UMT5-XXL with its vocabulary of 256,384 tokens; small: a UMT5 of one block with some 2,000."""
    import small_models
    from small_models.vocabulary import synthetic_vocabulary

    if not small:
        small_models.write_full_size_encoder(path, "Q5_K_M")
        return
    shape = small_models.ENCODERS["umt5"]
    weights, tokens = small_models.encoder_weights(shape, "Q5_K_M"), synthetic_vocabulary(shape.pieces, shape.rows)
    small_models.write_encoder_gguf(path, shape, weights, "Q5_K_M", tokens)


def write_wan(path: Path, small: bool) -> None:
    """The 1,095 tensors of Wan 2.1 T2V 14B; small: the 55 or so of a Wan of two blocks."""
    import small_models

    if not small:
        small_models.write_full_size_wan(path, "wan2.1-t2v-14b", "Q3_K_M")
        return
    weights = small_models.wan_weights("wan2.1-t2v-14b", "Q3_K_M")
    small_models.write_wan_gguf(path, weights, "Q3_K_M")


FILES: dict[str, Callable[[Path, bool], None]] = {"UMT5-XXL": write_vocabulary, "Wan 14B": write_wan}


def gguf_py() -> tuple[Callable[[Path], Any], Callable[[Any], Any]]:
    """How gguf-py opens a file, and how it reads the tokens of an open one."""
    from gguf.gguf_reader import GGUFReader

    return GGUFReader, lambda file: file.fields[TOKENS_KEY].contents() if TOKENS_KEY in file.fields else None


def the_pack() -> tuple[Callable[[Path], Any], Callable[[Any], Any]]:
    """The same for the pack."""
    from _pack import load_pack

    load_pack()
    from apple_silicon_video.quantization.gguf import GGUFFile

    return GGUFFile, lambda file: file.metadata.get(TOKENS_KEY)


READERS = {"gguf-py": gguf_py, "the pack": the_pack}


def measure(reader: str, path: str) -> Row:
    """Seconds to open the file and to read its tokens, and bytes by which the resident memory grew at each step."""
    open_file, read_tokens = READERS[reader]()
    process = psutil.Process()
    memory = [process.memory_info().rss]
    clock = [time.perf_counter()]
    file = open_file(Path(path))
    clock.append(time.perf_counter())
    memory.append(process.memory_info().rss)
    tokens = read_tokens(file)
    clock.append(time.perf_counter())
    memory.append(process.memory_info().rss)
    assert len(file.tensors) > 0 and (tokens is None or len(tokens) > 0)
    return {
        "open_seconds": clock[1] - clock[0],
        "open_bytes": memory[1] - memory[0],
        "tokens_seconds": clock[2] - clock[1],
        "tokens_bytes": memory[2] - memory[1],
    }


def run(small: bool = False) -> list[Row]:
    """A row per file and reader: the fastest of three runs (small: one), ``ratio`` of gguf-py's opening time to it."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, write in FILES.items():
            path = Path(folder) / f"{name}.gguf"
            write(path, small)
            results = {reader: in_own_process(__file__, reader, path, runs=1 if small else 3) for reader in READERS}
            baseline = results["gguf-py"]["open_seconds"]
            for reader, result in results.items():
                rows.append({"file": name, "reader": reader, **result, "ratio": baseline / result["open_seconds"]})
            path.unlink()
    return rows


if __name__ == "__main__":
    main(measure, run)
