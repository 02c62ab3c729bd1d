"""What GGUFWriter writes, and that gguf-py and the pack read each other's files alike."""

import os
import struct
import subprocess
import sys
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from apple_silicon_video.quantization.gguf import GGUFError, GGUFFile
from apple_silicon_video.quantization.gguf_writer import GGUFWriter, written_beside

SCALAR_METADATA: dict[str, Any] = {
    "UINT8": 255,
    "INT8": -128,
    "UINT16": 65535,
    "INT16": -32768,
    "UINT32": 2**32 - 1,
    "INT32": -(2**31),
    "FLOAT32": 0.1,
    "BOOL": True,
    "STRING": "▁影片\n",
    "UINT64": 2**64 - 1,
    "INT64": -(2**63),
    "FLOAT64": 0.1,
}
STORED: dict[str, np.ndarray] = {
    "F32": np.linspace(-1, 1, 96, dtype=np.float32).reshape(2, 3, 16),
    "F16": np.linspace(-1, 1, 96, dtype=np.float16).reshape(1, 2, 3, 4, 4),
    "F64": np.linspace(-1, 1, 7),
    "I8": np.arange(-3, 4, dtype=np.int8),
    "I16": np.arange(-3, 4, dtype=np.int16).reshape(7, 1),
    "I32": np.arange(8, dtype=np.int32).reshape(2, 2, 2),
    "I64": np.arange(3, dtype=np.int64),
}
BLOCK_TYPES = [
    gguf.GGMLQuantizationType[name]
    for name in ("BF16", "Q4_0", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "TQ2_0", "MXFP4")
]


def random_rows(block_type: gguf.GGMLQuantizationType, n_rows: int) -> np.ndarray:
    """Rows of 512 weights of any quantised type, as the bytes they are stored in."""
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[block_type]
    generator = np.random.default_rng(int(block_type))
    return generator.integers(0, 256, (n_rows, 512 // block_size * block_bytes), dtype=np.uint8)


def written_by_gguf_py(path, alignment=None, endianness=gguf.GGUFEndian.LITTLE):
    writer = gguf.GGUFWriter(path, "wan", endianess=endianness)
    if alignment:
        writer.add_custom_alignment(alignment)
    for kind, value in SCALAR_METADATA.items():
        writer.add_key_value(f"scalar.{kind}", value, gguf.GGUFValueType[kind])
        item = gguf.GGUFValueType[kind]
        writer.add_key_value(f"array.{kind}", [value] * 3, gguf.GGUFValueType.ARRAY, sub_type=item)
    writer.add_array("nested", [[1, 2], [3]])
    for name, data in STORED.items():
        writer.add_tensor(name, data)
    for block_type in BLOCK_TYPES:
        writer.add_tensor(block_type.name, random_rows(block_type, 3), raw_dtype=block_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def written_by_us(path, version=3, alignment=32):
    writer = GGUFWriter(path, version, alignment)
    for kind, value in SCALAR_METADATA.items():
        writer.metadata(f"scalar.{kind}", value, kind)
        writer.metadata(f"array.{kind}", [value] * 3, f"{kind}[]")
    for name, data in STORED.items():
        writer.tensor(name, data.shape, name, data)
    for block_type in BLOCK_TYPES:
        writer.tensor(block_type.name, (3, 512), block_type.name, random_rows(block_type, 3))
    return writer.write()


def test_gguf_is_the_pypi_package():
    assert hasattr(gguf, "GGUFReader")


@pytest.mark.parametrize("alignment", [None, 8, 256])
def test_we_read_what_gguf_py_writes(tmp_path, alignment):
    path = written_by_gguf_py(tmp_path / "a.gguf", alignment)
    theirs, ours = gguf.GGUFReader(path), GGUFFile(path)
    assert ours.architecture == "wan"
    assert ours.alignment == theirs.alignment
    keys = [key for key in theirs.fields if not key.startswith("GGUF.")]
    assert list(ours.metadata) == keys
    for key in keys:
        value = ours.metadata[key]
        expected = theirs.fields[key].contents()
        if key == "nested":
            assert [part.tolist() for part in value] == [[1, 2], [3]]
        else:
            assert (value.tolist() if isinstance(value, np.ndarray) else value) == expected, key
    assert_same_tensors(ours, theirs)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [32, 128])
def test_gguf_py_reads_what_we_write(tmp_path, version, alignment):
    path = written_by_us(tmp_path / "a.gguf", version, alignment)
    theirs, ours = gguf.GGUFReader(path), GGUFFile(path)
    assert theirs.fields["GGUF.version"].contents() == version
    assert theirs.alignment == alignment
    for kind, value in SCALAR_METADATA.items():
        expected = float(np.float32(value)) if kind == "FLOAT32" else value
        field = theirs.fields[f"scalar.{kind}"]
        assert (field.types, field.contents()) == ([gguf.GGUFValueType[kind]], expected)
        field = theirs.fields[f"array.{kind}"]
        assert field.types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType[kind]]
        assert field.contents() == [expected] * 3
    assert_same_tensors(ours, theirs)


def assert_same_tensors(ours: GGUFFile, theirs: gguf.GGUFReader) -> None:
    assert [tensor.name for tensor in theirs.tensors] == list(ours.tensors) == [*STORED, *(t.name for t in BLOCK_TYPES)]
    for tensor in theirs.tensors:
        info = ours.tensors[tensor.name]
        assert info.type_name == tensor.tensor_type.name
        assert info.shape == tuple(int(dim) for dim in reversed(tensor.shape))
        assert (info.offset, info.nbytes) == (tensor.data_offset, tensor.n_bytes)
        assert ours.raw(tensor.name).numpy().tobytes() == tensor.data.tobytes()
        if tensor.name in STORED:
            assert np.array_equal(ours.tensor(tensor.name).numpy(), STORED[tensor.name])
            assert np.array_equal(tensor.data, STORED[tensor.name])
        else:
            assert np.array_equal(tensor.data, random_rows(tensor.tensor_type, 3))


def test_big_endian_files_of_gguf_py_are_refused(tmp_path):
    path = written_by_gguf_py(tmp_path / "big.gguf", endianness=gguf.GGUFEndian.BIG)
    with pytest.raises(GGUFError, match=r"^big\.gguf is a big-endian GGUF file; .*little endian\.$"):
        GGUFFile(path)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (7, "UINT32"),
        (-7, "INT32"),
        (2**40, "UINT64"),
        (-(2**40), "INT64"),
        (False, "BOOL"),
        (1.5, "FLOAT32"),
        ("text", "STRING"),
        ([1, -2], "INT32[]"),
        ((2**31,), "INT64[]"),
        ([1, 2.5], "FLOAT32[]"),
        ([True, False], "BOOL[]"),
        (["a", "b"], "STRING[]"),
        ([[1], [2, 3]], "ARRAY[]"),
        (b"\0\xff", "UINT8[]"),
        (np.float64(0.1), "FLOAT64"),
        (np.int8(-1), "INT8"),
        (np.arange(3, dtype=np.uint16), "UINT16[]"),
        (np.array(["a", "b"]), "STRING[]"),
    ],
)
def test_kind_follows_the_value(tmp_path, value, kind):
    writer = GGUFWriter(tmp_path / "a.gguf")
    writer.metadata("key", value)
    metadata = GGUFFile(writer.write()).metadata
    read = metadata["key"]
    assert metadata.kind("key") == kind
    if kind == "ARRAY[]":
        assert [part.tolist() for part in read] == value
    elif isinstance(read, np.ndarray):
        assert read.tolist() == list(value)
    else:
        assert read == (list(value) if kind == "STRING[]" else value)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (300, "UINT8"),
        (-1, "UINT32"),
        (2**64, None),
        (1.5, "INT32"),
        ([], None),
        ([1, "a"], None),
        (["1"], "INT32[]"),
        (1, "INT128"),
        (None, None),
        (np.zeros((2, 2)), "FLOAT64[]"),
        (np.zeros(2, dtype=np.float16), None),
    ],
)
def test_metadata_that_does_not_fit_is_refused(tmp_path, value, kind):
    writer = GGUFWriter(tmp_path / "a.gguf")
    with pytest.raises(GGUFError, match=r"^a\.gguf cannot hold metadata 'key' \(.+\)\.$"):
        writer.metadata("key", value, kind)
    assert len(GGUFFile(writer.write()).metadata) == 0


def test_what_cannot_be_written_is_refused(tmp_path):
    path = tmp_path / "a.gguf"
    with pytest.raises(GGUFError, match="version 1"):
        GGUFWriter(path, version=1)
    with pytest.raises(GGUFError, match="alignment 48"):
        GGUFWriter(path, alignment=48)
    writer = GGUFWriter(path, alignment=64)
    writer.tensor("a", (2, 256), "Q4_K", bytes(288))
    for arguments, options, problem in (
        (("a", (1,), "I8", b"1"), {}, "two tensors named 'a'"),
        (("b", (1,), "Q9_K", b"1"), {}, "unknown type 'Q9_K'"),
        (("b", (2, 128), "Q4_K", bytes(144)), {}, "whole blocks of 256"),
        (("b", (0, 256), "Q4_K", b""), {}, "shape"),
        (("b", (256,), "Q4_K", bytes(143)), {}, "144 bytes for tensor 'b', not 143"),
        (("b", (256,), "Q4_K"), {}, "exactly one of data, share and sparse"),
        (("b", (256,), "Q4_K", bytes(144)), {"sparse": True}, "exactly one of data, share and sparse"),
        (("b", (3, 256), "Q4_K"), {"share": "a"}, "cannot share 'a'"),
        (("b", (1, 256), "Q4_K"), {"share": "c"}, "cannot share 'c'"),
    ):
        with pytest.raises(GGUFError, match=problem):
            writer.tensor(*arguments, **options)
    writer.metadata("key", 1)
    for key in ("key", "general.alignment"):
        with pytest.raises(GGUFError, match=f"'{key}' twice"):
            writer.metadata(key, 64)
    assert list(GGUFFile(writer.write()).tensors) == ["a"]


@pytest.mark.parametrize("give", [bytes, bytearray, memoryview, np.frombuffer, torch.tensor, "pieces"])
def test_data_in_any_container(tmp_path, give):
    data = bytes(range(176))
    given = {
        np.frombuffer: lambda: np.frombuffer(data, np.uint8).reshape(2, 88),
        torch.tensor: lambda: torch.tensor(list(data), dtype=torch.uint8),
        "pieces": lambda: lambda: iter([data[:7], torch.tensor(list(data[7:100]), dtype=torch.uint8), data[100:]]),
    }.get(give, lambda: give(data))()
    writer = GGUFWriter(tmp_path / "a.gguf")
    writer.tensor("t", (256,), "Q5_K", given)
    file = GGUFFile(writer.write())
    assert bytes(file.raw("t").tolist()) == data


def test_torch_tensors_of_any_layout(tmp_path):
    tensor = torch.arange(12, dtype=torch.bfloat16).reshape(3, 4).T
    writer = GGUFWriter(tmp_path / "a.gguf")
    writer.tensor("t", tensor.shape, "BF16", torch.nn.Parameter(tensor))
    writer.tensor("scalar", (), "F32", torch.tensor(2.5))
    file = GGUFFile(writer.write())
    assert torch.equal(file.tensor("t"), tensor)
    assert file.tensor("scalar").item() == 2.5


def test_shared_and_sparse_tensors(tmp_path):
    data = np.arange(64, dtype=np.int8)
    writer = GGUFWriter(tmp_path / "a.gguf")
    writer.tensor("owner", (64,), "I8", data)
    writer.tensor("same", (8, 8), "I8", share="owner")
    writer.tensor("part", (2,), "F32", share="same")
    writer.tensor("hole", (1 << 20, 256), "Q8_0", sparse=True)
    writer.tensor("after", (64,), "I8", data)
    path = writer.write()
    file = GGUFFile(path)
    assert file.tensors["same"].offset == file.tensors["part"].offset == file.tensors["owner"].offset
    assert file.tensor("same").flatten().tolist() == data.tolist()
    assert bytes(file.raw("part").tolist()) == data[:8].tobytes()
    assert file.raw("hole").numel() == (1 << 23) * 34
    assert file.raw("hole")[:4096].sum() == 0
    assert file.tensor("after").tolist() == data.tolist()
    assert path.stat().st_blocks * 512 < 1 << 20 < path.stat().st_size


def test_a_failure_leaves_nothing_behind(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(b"precious")

    def failing():
        yield bytes(100)
        raise RuntimeError("no more")

    writer = GGUFWriter(path)
    writer.tensor("t", (256,), "Q5_K", failing)
    with pytest.raises(RuntimeError, match="no more"):
        writer.write()
    for pieces, given in (([bytes(100)], 100), ([bytes(100), bytes(100)], 200)):
        writer = GGUFWriter(path)
        writer.tensor("t", (256,), "Q5_K", lambda pieces=pieces: pieces)
        with pytest.raises(GGUFError, match=f"needs 176 bytes for tensor 't' but was given {given}"):
            writer.write()
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.gguf"]
    assert path.read_bytes() == b"precious"


def test_written_beside_replaces_when_complete(tmp_path):
    path = tmp_path / "out"
    path.write_bytes(b"old")
    with written_beside(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
        assert len(list(tmp_path.iterdir())) == 2
    assert path.read_bytes() == b"new"
    with pytest.raises(KeyboardInterrupt), written_beside(path) as file:
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == [path]


def test_header_layout(tmp_path):
    """The bytes themselves, as docs/gguf.md gives them."""
    writer = GGUFWriter(tmp_path / "a.gguf", version=2)
    writer.metadata("k", [[5]], "UINT8[][]")
    writer.tensor("t", (2, 3), "I8", bytes(range(6)))
    expected = b"GGUF" + struct.pack("<IQQ", 2, 1, 1)
    expected += struct.pack("<Q", 1) + b"k" + struct.pack("<IIQIQB", 9, 9, 1, 0, 1, 5)
    expected += struct.pack("<Q", 1) + b"t" + struct.pack("<IQQIQ", 2, 3, 2, 24, 0)
    expected += bytes(-len(expected) % 32) + bytes(range(6)).ljust(32, b"\0")
    assert writer.write().read_bytes() == expected


def test_fragments_of_killed_writers_are_removed(tmp_path):
    """The next write to the same name removes them; those of living writers, new ones and other files' stay."""
    path = tmp_path / "m[1].gguf"
    names = [f".m[1].gguf.{number:08x}.part" for number in range(3)]
    others = [".n.gguf.00000000.part", ".m[1].gguf.0.part", "m[1].gguf.00000000.part", ".m1.gguf.00000000.part"]
    for name in names + others:
        (tmp_path / name).write_bytes(b"left behind")
        if name != names[1]:
            os.utime(tmp_path / name, (0, 0))
    script = "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    command = [sys.executable, "-c", script, str(tmp_path / names[2])]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as living:
        living.stdout.readline()
        with written_beside(path) as file:
            file.write(b"whole")
            (fragment,) = {entry.name for entry in tmp_path.iterdir()} - {*names, *others}
            os.utime(tmp_path / fragment, (0, 0))
            with written_beside(path) as second:
                second.write(b"second")
            assert (tmp_path / fragment).exists()
        living.communicate("\n")
    assert path.read_bytes() == b"whole"
    assert {entry.name for entry in tmp_path.iterdir()} == {path.name, names[1], names[2], *others}
