"""Zero-copy reading of safetensors: against the safetensors package, on huge sparse files, and on broken ones."""

import json
import random

import psutil
import pytest
import torch
from apple_silicon_video.quantization.safetensors_file import DTYPES, SafetensorsError, SafetensorsFile
from safetensors.torch import load_file, save_file

MIB = 1 << 20


def write(path, header, data=b""):
    """A file of any header (an object for JSON, or bytes) and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype="F32", shape=(2, 3), offsets=(0, 24)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def every_dtype():
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, dtype in DTYPES.items():
        if name != "F8_E8M0":
            raw = torch.randint(0, 256, (5, 3, 8), dtype=torch.uint8, generator=generator)
            tensors[name] = (raw > 127) if dtype == torch.bool else raw.view(dtype)
    return tensors


def same(found, expected):
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    return torch.equal(found.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))


def test_equals_the_safetensors_package(tmp_path):
    path = tmp_path / "model.safetensors"
    tensors = {**every_dtype(), "scalar": torch.tensor(0.5), "empty": torch.empty(0, 4)}
    save_file(tensors, path, metadata={"format": "pt", "note": "ü"})
    file, expected = SafetensorsFile(path), load_file(path)
    assert file.metadata == {"format": "pt", "note": "ü"}
    assert set(file.tensors) == set(expected)
    for name, tensor in expected.items():
        assert same(file.tensor(name), tensor)
        assert file.raw(name).numel() == tensor.nbytes == file.tensors[name].nbytes
    assert list(file.tensors) == sorted(file.tensors, key=lambda name: file.tensors[name].offset)


def test_e8m0_comes_as_codes(tmp_path):
    path = write(tmp_path / "m.safetensors", {"codes": entry("F8_E8M0", (2, 2), (0, 4))}, bytes([1, 127, 128, 255]))
    assert torch.equal(SafetensorsFile(path).tensor("codes"), torch.tensor([[1, 127], [128, 255]], dtype=torch.uint8))


def test_tensors_off_their_alignment_are_copied(tmp_path):
    value = torch.tensor([1.5, -2.5])
    data = b"\0" + value.view(torch.uint8).numpy().tobytes()
    for padding in range(8):
        header = {"a": entry("U8", (1,), (0, 1)), "b": entry("F32", (2,), (1, 9)), "__metadata__": {"p": " " * padding}}
        tensor = SafetensorsFile(write(tmp_path / "m.safetensors", header, data)).tensor("b")
        assert torch.equal(tensor, value)
        assert tensor.data_ptr() % 4 == 0


def test_tensors_are_views_that_outlive_the_file_object(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(1024.0), "b": torch.arange(1024.0)}, path)
    before = path.read_bytes()
    file = SafetensorsFile(path)
    first, second = file.tensor("a"), file.tensor("a")
    other = file.tensor("b")
    assert first.data_ptr() == second.data_ptr()
    assert abs(other.data_ptr() - first.data_ptr()) == 4096
    del file
    first += 1
    assert torch.equal(second, torch.arange(1024.0) + 1)
    assert path.read_bytes() == before
    path.unlink()
    assert torch.equal(other, torch.arange(1024.0))


def test_a_file_of_many_gigabytes_costs_no_memory(tmp_path):
    count, size = 60, 1 << 30
    header = {f"t{i}": entry("F8_E4M3", (1 << 15, 1 << 15), (i * size, (i + 1) * size)) for i in range(count)}
    path = write(tmp_path / "huge.safetensors", header)
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size + count * size)
    process = psutil.Process()
    before = process.memory_info().rss
    reader = SafetensorsFile(path)
    tensors = [reader.tensor(name) for name in reader.tensors]
    assert sum(tensor.nbytes for tensor in tensors) == count * size
    assert tensors[-1].view(torch.uint8)[-1, -1] == 0
    assert process.memory_info().rss - before < 32 * MIB


BROKEN = {
    "not JSON": (b"{" + b"x" * 30, "not JSON"),
    "no object": (b'["a"]', "does not begin"),
    "deep": (b'{"a":' + b"[" * 100_000, "not JSON"),
    "not text": (b'{"a\xff": 1}', "not JSON"),
    "entry": ({"a": 3}, "describes tensor 'a' wrongly"),
    "no dtype": ({"a": {"shape": [1], "data_offsets": [0, 4]}}, "describes"),
    "dtype no name": ({"a": entry(7)}, "describes"),
    "negative shape": ({"a": entry(shape=(-2, -3))}, "describes"),
    "fractional shape": ({"a": entry(shape=(2.0, 3))}, "describes"),
    "truth as shape": ({"a": entry(shape=(True, 6))}, "describes"),
    "one offset": ({"a": entry(offsets=(0,))}, "describes"),
    "negative offset": ({"a": entry(offsets=(-24, 0))}, "describes"),
    "unknown dtype": ({"a": entry("F4", (6,), (0, 3))}, "stores tensor 'a' as 'F4'"),
    "backwards": ({"a": entry(offsets=(24, 0))}, "a shape that its data does not have"),
    "too short": ({"a": entry(offsets=(0, 20))}, "a shape that its data does not have"),
    "overflow": ({"a": entry(shape=(1 << 62, 4), offsets=(0, 24))}, "a shape that its data does not have"),
    "dimensions": ({"a": entry(shape=(1,) * 40 + (6,))}, "a shape that its data does not have"),
    "beyond the end": ({"a": entry(shape=(7,), offsets=(0, 28))}, "the file is incomplete"),
    "far beyond": ({"a": entry(shape=(1 << 60,), offsets=(0, 1 << 62))}, "the file is incomplete"),
    "metadata": ({"__metadata__": {"a": 1}}, "metadata that is not text"),
    "metadata list": ({"__metadata__": ["a"]}, "metadata that is not text"),
    "long name": ({"n" * 5000: 3}, "describes"),
}


def refusal(path):
    with pytest.raises(SafetensorsError) as caught:
        SafetensorsFile(path)
    message = str(caught.value)
    assert message.startswith(path.name) and message.endswith(".") and "\n" not in message and len(message) < 300
    return message


@pytest.mark.parametrize("case", BROKEN)
def test_broken_headers(case, tmp_path):
    header, problem = BROKEN[case]
    assert problem in refusal(write(tmp_path / "broken.safetensors", header, b"\0" * 24))


def test_files_that_are_no_safetensors(tmp_path):
    path = tmp_path / "x.safetensors"
    assert "missing" in refusal(path)
    path.symlink_to(tmp_path / "gone")
    assert "missing" in refusal(path)
    path.unlink()
    path.mkdir()
    assert "folder" in refusal(path)
    path.rmdir()
    for data, problem in (
        (b"", "empty"),
        (b"abc", "does not begin"),
        (b"GGUF" * 10, "does not begin"),
        ((10**9).to_bytes(8, "little") + b"{}", "does not begin"),
        ((50).to_bytes(8, "little") + b"{}", "incomplete"),
    ):
        path.write_bytes(data)
        assert problem in refusal(path)


def test_every_truncation_and_any_flipped_byte_is_refused_or_read(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.arange(5, dtype=torch.int8)}, path, metadata={"x": "y"})
    good = path.read_bytes()
    for length in range(1, len(good)):
        path.write_bytes(good[:length])
        refusal(path)
    generator = random.Random(0)
    for _ in range(2000):
        bad = bytearray(good)
        for _ in range(generator.randint(1, 3)):
            bad[generator.randrange(len(bad) - 29)] = generator.randrange(256)
        path.write_bytes(bad)
        try:
            file = SafetensorsFile(path)
        except SafetensorsError:
            continue
        for name in file.tensors:
            assert file.tensor(name).nbytes == file.tensors[name].nbytes
