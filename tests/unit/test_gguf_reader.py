"""What GGUFFile reads: metadata of every kind, tensors of every layout, lazily and without copies."""

import gc
import json
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from apple_silicon_video.quantization import gguf as reader
from apple_silicon_video.quantization.gguf import GGUFError, GGUFFile
from apple_silicon_video.quantization.gguf_writer import GGUFWriter

PACK_LOADER = Path(__file__).resolve().parents[2] / "scripts" / "_pack.py"
N_TOKENS = 256_384  # UMT5's vocabulary

SCALARS = {
    "UINT8": 200,
    "INT8": -100,
    "UINT16": 60_000,
    "INT16": -30_000,
    "UINT32": 4_000_000_000,
    "INT32": -2_000_000_000,
    "FLOAT32": 0.15625,
    "BOOL": True,
    "STRING": "naïve 影片 \U0001f600",
    "UINT64": 2**64 - 1,
    "INT64": -(2**63),
    "FLOAT64": 0.1,
}


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [8, 32, 4096])
def test_scalars_of_every_kind(tmp_path, version, alignment):
    writer = GGUFWriter(tmp_path / "a.gguf", version, alignment)
    for kind, value in SCALARS.items():
        writer.metadata(f"key.{kind}", value, kind)
    writer.tensor("t", (3,), "F32", np.arange(3, dtype=np.float32))
    file = GGUFFile(writer.write())
    assert (file.version, file.alignment) == (version, alignment)
    for kind, value in SCALARS.items():
        read = file.metadata[f"key.{kind}"]
        assert (type(read), read) == (type(value), value)
        assert file.metadata.kind(f"key.{kind}") == kind
        assert file.metadata.length(f"key.{kind}") is None
    assert file.tensors["t"].offset % alignment == 0
    assert file.tensor("t").tolist() == [0, 1, 2]


@pytest.mark.parametrize("kind", sorted(set(SCALARS) - {"STRING"}))
def test_arrays_of_numbers_become_numpy(tmp_path, kind):
    writer = GGUFWriter(tmp_path / "a.gguf")
    writer.metadata("numbers", [SCALARS[kind]] * 3, f"{kind}[]")
    writer.metadata("none", [], f"{kind}[]")
    metadata = GGUFFile(writer.write()).metadata
    assert metadata["numbers"].dtype == np.dtype(kind.lower())
    assert metadata["numbers"].tolist() == [SCALARS[kind]] * 3
    assert metadata["numbers"].flags.writeable
    assert metadata["none"].shape == (0,)
    assert (metadata.kind("numbers"), metadata.length("numbers")) == (f"{kind}[]", 3)


def test_arrays_of_strings_and_of_arrays(tmp_path):
    writer = GGUFWriter(tmp_path / "a.gguf")
    writer.metadata("tokens", ["<pad>", "", "▁影"])
    writer.metadata("ragged", [[1, 2, 3], [], [4]], "INT32[][]")
    writer.metadata("deep", [[["a"], []], []], "STRING[][][]")
    writer.metadata("after", 7)
    metadata = GGUFFile(writer.write()).metadata
    assert metadata["tokens"] == ["<pad>", "", "▁影"]
    assert [part.tolist() for part in metadata["ragged"]] == [[1, 2, 3], [], [4]]
    assert metadata["deep"] == [[["a"], []], []]
    assert metadata["after"] == 7
    assert list(metadata) == ["tokens", "ragged", "deep", "after"]
    assert len(metadata) == 4 and "tokens" in metadata and "absent" not in metadata
    assert metadata.get("absent", 3) == 3
    with pytest.raises(KeyError):
        metadata["absent"]


def test_invalid_utf8_in_values_survives(tmp_path):
    writer = GGUFWriter(tmp_path / "a.gguf")
    writer.metadata("name", b"caf\xe9", "STRING")
    writer.metadata("tokens", [b"\xff\xfe", b"ok"], "STRING[]")
    metadata = GGUFFile(writer.write()).metadata
    assert metadata["name"].encode("utf-8", "surrogateescape") == b"caf\xe9"
    assert metadata["tokens"][0].encode("utf-8", "surrogateescape") == b"\xff\xfe"
    assert metadata["tokens"][1] == "ok"


def test_architecture(tmp_path):
    writer = GGUFWriter(tmp_path / "a.gguf")
    assert GGUFFile(writer.write()).architecture is None
    writer.metadata("general.architecture", "wan")
    assert GGUFFile(writer.write()).architecture == "wan"


def test_shapes_are_in_torch_order(tmp_path):
    patch = torch.arange(2 * 3 * 1 * 2 * 2, dtype=torch.float16).reshape(2, 3, 1, 2, 2)
    writer = GGUFWriter(tmp_path / "a.gguf")
    writer.tensor("patch_embedding.weight", patch.shape, "F16", patch)
    writer.tensor("scalar", (), "F32", np.float32(2.5).tobytes())
    writer.tensor("blocks", (2, 3, 256), "Q3_K", bytes(6 * 110))
    file = GGUFFile(writer.write())
    assert file.tensors["patch_embedding.weight"].shape == (2, 3, 1, 2, 2)
    assert torch.equal(file.tensor("patch_embedding.weight"), patch)
    assert file.tensor("scalar").shape == () and file.tensor("scalar").item() == 2.5
    info = file.tensors["blocks"]
    assert (info.type_name, info.shape, info.nbytes) == ("Q3_K", (2, 3, 256), 660)
    assert info.original_shape == info.shape


@pytest.mark.parametrize("kind", ["INT32[]", "UINT32[]", "INT64[]"])
def test_original_shape_of_flattened_tensors(tmp_path, kind):
    data = torch.arange(768, dtype=torch.float32)
    writer = GGUFWriter(tmp_path / "a.gguf")
    for name, shape in {"plain": (4, 16, 1, 2, 6), "rows": (1, 1, 3, 1, 256), "parts": (4, 3, 8, 8)}.items():
        writer.metadata(f"comfy.gguf.orig_shape.{name}", shape, kind)
    writer.tensor("plain", (768,), "F32", data)
    writer.tensor("rows", (3, 256), "Q5_K", bytes(3 * 176))
    writer.tensor("parts", (3, 256), "Q5_K", bytes(3 * 176))
    file = GGUFFile(writer.write())
    assert torch.equal(file.tensor("plain"), data.reshape(4, 16, 1, 2, 6))
    assert file.tensors["plain"].original_shape == (4, 16, 1, 2, 6)
    assert file.tensors["rows"].shape == file.tensors["rows"].original_shape == (1, 1, 3, 1, 256)
    assert file.tensors["parts"].shape == (3, 256)
    assert file.tensors["parts"].original_shape == (4, 3, 8, 8)


PLAIN = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}


@pytest.mark.parametrize("type_name", PLAIN)
def test_plain_tensors_are_typed_views(tmp_path, type_name):
    data = torch.arange(-6, 6).to(PLAIN[type_name]).reshape(3, 4)
    writer = GGUFWriter(tmp_path / "a.gguf")
    writer.tensor("first", (5,), "I8", bytes(5))
    writer.tensor("t", (3, 4), type_name, data)
    file = GGUFFile(writer.write())
    assert file.tensor("t").dtype == PLAIN[type_name]
    assert torch.equal(file.tensor("t"), data)
    assert file.tensor("t").data_ptr() == file.raw("t").data_ptr()


def test_data_off_its_alignment(tmp_path):
    """gguf-py reads tensors at any offset within the file; so do we."""
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + struct.pack("<Q", 1) + b"t" + struct.pack("<IQIQ", 1, 3, 0, 3)
    values = np.array([1.5, -2, 3], dtype=np.float32)
    path = tmp_path / "a.gguf"
    path.write_bytes(head.ljust(64, b"\0") + b"pad" + values.tobytes())
    file = GGUFFile(path)
    assert file.tensors["t"].offset == 67
    assert file.tensor("t").data_ptr() % 4 == 0
    assert file.tensor("t").tolist() == values.tolist()
    assert bytes(file.raw("t").tolist()) == values.tobytes()


def test_refused_requests(tmp_path):
    writer = GGUFWriter(tmp_path / "a.gguf")
    writer.tensor("w", (1, 256), "Q6_K", bytes(210))
    file = GGUFFile(writer.write())
    with pytest.raises(GGUFError, match=r"^a\.gguf stores tensor 'w' as Q6_K, which must be dequantised first\.$"):
        file.tensor("w")
    for request in (file.raw, file.tensor):
        with pytest.raises(GGUFError, match=r"^a\.gguf has no tensor named 'v'\.$"):
            request("v")


def test_tensors_are_views_that_cannot_harm_the_file(tmp_path):
    data = bytes(range(210))
    writer = GGUFWriter(tmp_path / "a.gguf")
    writer.tensor("a", (256,), "Q6_K", data)
    writer.tensor("b", (256,), "Q6_K", data)
    path = writer.write()
    before = path.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        file = GGUFFile(path)
        a, b = file.raw("a"), file.raw("b")
    assert (a.dtype, a.shape, bytes(a.tolist())) == (torch.uint8, (210,), data)
    assert b.data_ptr() - a.data_ptr() == file.tensors["b"].offset - file.tensors["a"].offset
    a.zero_()
    assert file.raw("a").sum() == 0
    assert path.read_bytes() == before
    assert bytes(GGUFFile(path).raw("a").tolist()) == data


def test_tensors_keep_the_mapping_alive(tmp_path):
    data = np.arange(100_000, dtype=np.int32)
    writer = GGUFWriter(tmp_path / "a.gguf")
    writer.tensor("t", data.shape, "I32", data)
    path = writer.write()
    file = GGUFFile(path)
    tensor, raw = file.tensor("t"), file.raw("t")
    del file
    path.unlink()
    gc.collect()
    assert tensor.sum() == data.sum(dtype=np.int64)
    assert bytes(raw[:4000].tolist()) == data[:1000].tobytes()


def test_file_larger_than_memory(tmp_path):
    terabyte = 1 << 40
    writer = GGUFWriter(tmp_path / "a.gguf")
    writer.tensor("hole", (terabyte // 1024, 256), "F32", sparse=True)
    writer.tensor("end", (2,), "F32", np.array([1, 2], dtype=np.float32))
    file = GGUFFile(writer.write())
    assert file.raw("hole").shape == (terabyte,)
    assert file.tensor("hole")[-1].sum() == 0
    assert file.tensor("end").tolist() == [1, 2]


def test_opening_decodes_no_array(tmp_path, monkeypatch):
    decoded = []
    decode = reader._decode_array

    def counting(buffer, item, count, position):
        decoded.append(count)
        return decode(buffer, item, count, position)

    monkeypatch.setattr(reader, "_decode_array", counting)
    writer = GGUFWriter(tmp_path / "a.gguf")
    writer.metadata("general.architecture", "t5")
    writer.metadata("tokens", [f"token {i}" for i in range(1000)])
    writer.metadata("scores", np.zeros(1000, dtype=np.float32))
    writer.tensor("t", (2,), "F32", bytes(8))
    file = GGUFFile(writer.write())
    assert file.metadata.length("tokens") == 1000
    assert decoded == []
    assert file.metadata["tokens"][999] == "token 999"
    assert decoded == [1000]


MEASURE = """
import importlib.util, json, sys
import psutil
spec = importlib.util.spec_from_file_location("_pack", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.load_pack()
from apple_silicon_video.quantization.gguf import GGUFFile
process = psutil.Process()
before = process.memory_info().rss
file = GGUFFile(sys.argv[2])
opened = process.memory_info().rss - before
tokens, scores = file.metadata["tokenizer.ggml.tokens"], file.metadata["tokenizer.ggml.scores"]
read = process.memory_info().rss - before
print(json.dumps([opened, read, len(tokens), tokens[-1], float(scores[-1]), len(file.tensors)]))
"""


def test_memory_of_a_vocabulary_file(tmp_path):
    writer = GGUFWriter(tmp_path / "umt5.gguf")
    writer.metadata("tokenizer.ggml.tokens", [f"▁token{i}" for i in range(N_TOKENS)])
    writer.metadata("tokenizer.ggml.scores", -np.arange(N_TOKENS, dtype=np.float32))
    writer.metadata("tokenizer.ggml.token_type", np.ones(N_TOKENS, dtype=np.int32))
    writer.tensor("token_embd.weight", (N_TOKENS, 4096), "Q5_K", sparse=True)
    run = [sys.executable, "-c", MEASURE, str(PACK_LOADER), str(writer.write())]
    measured = subprocess.run(run, capture_output=True, text=True, check=True)
    opened, read, *content = json.loads(measured.stdout)
    assert content == [N_TOKENS, f"▁token{N_TOKENS - 1}", 1.0 - N_TOKENS, 1]
    assert opened < 80e6 and read < 80e6


def test_many_tensors_with_shared_data(tmp_path):
    writer = GGUFWriter(tmp_path / "14b.gguf")
    writer.tensor("blocks.0", (5120, 5120), "Q3_K", sparse=True)
    for index in range(1, 1095):
        writer.tensor(f"blocks.{index}", (5120, 5120), "Q3_K", share="blocks.0")
    file = GGUFFile(writer.write())
    assert list(file.tensors) == [f"blocks.{index}" for index in range(1095)]
    assert {info.offset for info in file.tensors.values()} == {file.tensors["blocks.0"].offset}
    assert file.raw("blocks.1094").shape == (5120 * 5120 // 256 * 110,)
