"""Damaged headers: whatever bytes change, GGUFFile refuses with its own error or loads what can be read to the end."""

import random
import struct
import tracemalloc

import numpy as np
import pytest
import torch
from apple_silicon_video.quantization.gguf import GGUFError, GGUFFile
from apple_silicon_video.quantization.gguf_writer import GGUFWriter

MUTATIONS_PER_FILE = 2000
PEAK_BYTES = 50 << 20
EXTREMES = [
    struct.pack(layout, value)
    for layout, values in (
        ("<Q", (0, 1, 2**31, 2**32, 2**60, 2**63, 2**64 - 1)),
        ("<I", (0, 9, 2**16, 2**31, 2**32 - 1)),
    )
    for value in values
]


def version_2(writer: GGUFWriter) -> None:
    writer.metadata("general.architecture", "wan")
    writer.metadata("count", 3)
    writer.tensor("a.weight", (2, 256), "Q3_K", bytes(range(220)))
    writer.tensor("a.bias", (7,), "F32", np.arange(7, dtype=np.float32))


def version_3(writer: GGUFWriter) -> None:
    writer.metadata("general.architecture", "wan")
    for kind, value in (("FLOAT64", 0.5), ("BOOL", True), ("INT8", -3), ("UINT64", 2**60)):
        writer.metadata(f"scalar.{kind}", value, kind)
    writer.tensor("b", (3, 512), "Q5_K", bytes(3 * 352))
    writer.tensor("c", (4,), "BF16", bytes(8))
    writer.tensor("d", (4, 2), "BF16", share="b")


def vocabulary(writer: GGUFWriter) -> None:
    writer.metadata("general.architecture", "t5")
    writer.metadata("tokenizer.ggml.tokens", ["<pad>", "▁the", "", "▁影"])
    writer.metadata("tokenizer.ggml.scores", [0.0, -1.5, -2.5, -3.5])
    writer.metadata("tokenizer.ggml.token_type", [3, 1, 1, 1])
    writer.metadata("nested", [[["x", "y"]], [["z"]]], "STRING[][][]")
    writer.metadata("ragged", [[True], [False, True]])
    writer.tensor("token_embd.weight", (4, 256), "Q6_K", bytes(4 * 210))


def five_dimensions(writer: GGUFWriter) -> None:
    writer.metadata("comfy.gguf.orig_shape.flat", (2, 2, 1, 2, 2))
    writer.metadata("comfy.gguf.orig_shape.blocks", (2, 2, 8, 16))
    writer.tensor("flat", (16,), "F16", np.arange(16, dtype=np.float16))
    writer.tensor("patch_embedding.weight", (2, 2, 1, 2, 2), "F32", np.arange(16, dtype=np.float32))
    writer.tensor("blocks", (2, 256), "Q4_K", bytes(288))


FILES = {version_2: (2, 32), version_3: (3, 8), vocabulary: (3, 32), five_dimensions: (3, 64)}


def sound_file(tmp_path, fill) -> tuple[bytes, int]:
    """A file's bytes and the length of its header."""
    writer = GGUFWriter(tmp_path / "sound.gguf", *FILES[fill])
    fill(writer)
    file = GGUFFile(writer.write())
    return file.path.read_bytes(), min(info.offset for info in file.tensors.values())


def mutated(content: bytes, header: int, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(header)
        change = rng.randrange(4)
        if change == 0:
            changed[at] ^= 1 << rng.randrange(8)
        elif change == 1:
            changed[at] = rng.randrange(256)
        elif change == 2:
            extreme = rng.choice(EXTREMES)
            changed[at : at + len(extreme)] = extreme
        else:
            source = rng.randrange(header)
            changed[at : at + 8] = changed[source : source + 8]
    return bytes(changed)


def read_to_the_end(file: GGUFFile, size: int) -> None:
    for key in file.metadata:
        value = file.metadata[key]
        assert isinstance(value, bool | int | float | str | np.ndarray | list)
        assert file.metadata.length(key) == (len(value) if isinstance(value, np.ndarray | list) else None)
    for name, info in file.tensors.items():
        raw = file.raw(name)
        assert info.offset + info.nbytes <= size
        assert raw.shape == (info.nbytes,) and raw.dtype == torch.uint8
        assert raw.sum() >= 0
        if not info.type_name.startswith("Q"):
            try:
                assert file.tensor(name).shape == info.shape
            except GGUFError as error:
                assert "must be dequantised first" in str(error)


@pytest.mark.parametrize("fill", FILES, ids=lambda fill: fill.__name__)
def test_mutated_headers(tmp_path, fill):
    content, header = sound_file(tmp_path, fill)
    path = tmp_path / "mutated.gguf"
    rng = random.Random(f"{fill.__name__} 1")
    refused = 0
    tracemalloc.start()
    try:
        for _ in range(MUTATIONS_PER_FILE):
            changed = mutated(content, header, rng)
            path.write_bytes(changed)
            try:
                read_to_the_end(GGUFFile(path), len(changed))
            except GGUFError as error:
                assert str(error).startswith("mutated.gguf ") and "\n" not in str(error)
                refused += 1
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 0.1 * MUTATIONS_PER_FILE < refused < 0.95 * MUTATIONS_PER_FILE
    assert peak < PEAK_BYTES


@pytest.mark.parametrize("fill", FILES, ids=lambda fill: fill.__name__)
def test_truncation_at_every_byte(tmp_path, fill):
    content, header = sound_file(tmp_path, fill)
    path = tmp_path / "truncated.gguf"
    whole = GGUFFile(tmp_path / "sound.gguf").tensors
    needed = max(info.offset + info.nbytes for info in whole.values())
    for length in range(needed):
        path.write_bytes(content[:length])
        with pytest.raises(GGUFError, match=r"^[^\n]*truncated\.gguf [^\n]*\.$") as caught:
            GGUFFile(path)
        if length >= header:
            assert f"has {length} bytes but its tensor" in str(caught.value)
    path.write_bytes(content[:needed])
    assert GGUFFile(path).tensors == whole
