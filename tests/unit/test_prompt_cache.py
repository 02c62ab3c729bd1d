"""Tensor files and the prompt cache: everything comes back as it was, damage is noticed, room is limited."""

import json
import os

import numpy as np
import pytest
import torch
from apple_silicon_video.memory.checkpoints import digest
from apple_silicon_video.memory.prompt_cache import PromptCache, file_fingerprint
from apple_silicon_video.memory.tensor_files import TensorFileError, load_value, read_note, save_value

VALUE = [
    [torch.randn(1, 7, 5), {"pooled_output": None, "mask": torch.ones(3, dtype=torch.bool), "strength": 0.5}],
    ("text", 3, True, {"nested": [torch.zeros(0), torch.tensor(2.0), torch.randn(4).to(torch.bfloat16)]}),
]


def same(ours, reference):
    assert type(ours) is type(reference)
    if isinstance(reference, torch.Tensor):
        assert ours.dtype == reference.dtype and ours.shape == reference.shape and torch.equal(ours, reference)
    elif isinstance(reference, (list, tuple)):
        assert len(ours) == len(reference)
        for one, other in zip(ours, reference):
            same(one, other)
    elif isinstance(reference, dict):
        assert list(ours) == list(reference)
        for key in reference:
            same(ours[key], reference[key])
    else:
        assert ours == reference


def test_value_and_note_come_back(tmp_path):
    path = tmp_path / "a" / "folder" / "value.safetensors"
    save_value(path, VALUE, {"step": 3})
    same(load_value(path), VALUE)
    assert read_note(path) == {"step": 3}
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_views_that_share_memory_come_back(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    save_value(tmp_path / "x", [base.T, base[1:], base])
    same(load_value(tmp_path / "x"), [base.T, base[1:], base])


@pytest.mark.parametrize("value", [object(), {1: 2}, [{"a": b"bytes"}], torch.dtype, [np.float64(1)]])
def test_other_values_are_refused_and_leave_nothing(tmp_path, value):
    with pytest.raises(TensorFileError, match=r"cannot be stored in a file of tensors\.$"):
        save_value(tmp_path / "x", value)
    assert list(tmp_path.iterdir()) == []


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x"
    save_value(path, [1])

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_value(path, [2])
    assert load_value(path) == [1] and list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    save_value(path, [2])
    assert load_value(path) == [2] and list(tmp_path.iterdir()) == [path]


def test_what_safetensors_cannot_write_is_an_error_of_the_system(tmp_path):
    (tmp_path / f".x.{os.getpid()}.partial").mkdir()
    with pytest.raises(OSError, match=r"^x cannot be written \(.*\)\.$"):
        save_value(tmp_path / "x", [torch.zeros(1)])


@pytest.mark.parametrize("keep", [0, 4, 60, 0.5, -1])
def test_damaged_files_are_refused(tmp_path, keep):
    path = tmp_path / "x.safetensors"
    save_value(path, VALUE)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(TensorFileError, match=r"^x\.safetensors .*: delete it\.$"):
        load_value(path)


OTHER = [{}, *({"structure": text} for text in ("[]", '["other", 1]', "{", "3", '["tensor", "7"]'))]


@pytest.mark.parametrize("metadata", OTHER, ids=str)
def test_other_safetensors_files_are_refused(tmp_path, metadata):
    from safetensors.torch import save_file

    path = tmp_path / "model.safetensors"
    save_file({"0": torch.zeros(1)}, str(path), metadata)
    with pytest.raises(TensorFileError, match="not a file of stored tensors"):
        load_value(path)
    with pytest.raises(TensorFileError, match="not a file of stored tensors"):
        read_note(path)


def test_cache_returns_what_was_put(tmp_path):
    cache = PromptCache(tmp_path / "prompts")
    path = cache.path(text="a", encoder="b")
    assert cache.get(path) is None and cache.put(path, VALUE)
    same(cache.get(path), VALUE)
    assert path == cache.path(encoder="b", text="a") != cache.path(encoder="a", text="b")
    assert "a" not in json.dumps(read_note(path))


def test_damaged_entry_is_removed(tmp_path, caplog):
    cache = PromptCache(tmp_path)
    path = cache.path(text="a")
    cache.put(path, VALUE)
    path.write_bytes(path.read_bytes()[:-1])
    assert cache.get(path) is None and not path.exists()
    assert "encoded again" in caplog.text


def test_value_that_cannot_be_stored_is_no_error(tmp_path, caplog):
    cache = PromptCache(tmp_path)
    assert not cache.put(cache.path(text="a"), [object()])
    assert list(tmp_path.iterdir()) == [] and "not kept on disk" in caplog.text
    (tmp_path / "file").touch()
    blocked = PromptCache(tmp_path / "file")
    assert not blocked.put(blocked.path(text="a"), [1])


def test_least_recently_used_entries_go(tmp_path):
    cache = PromptCache(tmp_path)
    paths = [cache.path(text=str(number)) for number in range(4)]
    for age, path in enumerate(paths):
        cache.put(path, torch.zeros(1000))
        os.utime(path, (1000 + age, 1000 + age))
    cache.get(paths[0])
    cache.limit = 3 * paths[0].stat().st_size
    newest = cache.path(text="new")
    (tmp_path / ".killed.safetensors.123.partial").touch()
    cache.put(newest, torch.zeros(1000))
    assert set(tmp_path.iterdir()) == {newest, paths[0], paths[3]}
    cache.limit = 1
    cache.put(newest, torch.zeros(1000))
    assert list(tmp_path.iterdir()) == [newest]


def test_digest_tells_values_apart():
    """Of the same bytes and numbers: shapes, types, keys, nesting and order count."""
    tensors = [torch.zeros(2, 3), torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.int32), torch.zeros(3, 2).T]
    values = [*tensors[:3], {"a": 1}, {"b": 1}, [["a", 1]], [[1], 2], [[1, 2]], [1, [2]], (1, 2), "1", 1, 1.0, True]
    found = [digest([value]) for value in values]
    assert len(set(found)) == len(values) and digest([tensors[3]]) == found[0]
    assert digest([1, 2]) != digest([2, 1])


def test_fingerprint_tells_files_apart(tmp_path):
    path = tmp_path / "encoder"
    path.write_bytes(bytes(30_000_000))
    os.utime(path, (1, 1))
    seen = {file_fingerprint(path)}
    os.utime(path, (2, 2))
    seen.add(file_fingerprint(path))
    for offset in (0, 15_000_000, 29_999_999):
        with open(path, "rb+") as file:
            file.seek(offset)
            file.write(b"\1" * (1_000_000 if offset == 15_000_000 else 1))
        os.utime(path, (2, 2))
        seen.add(file_fingerprint(path))
    assert len(seen) == 5
    copy = tmp_path / "copy"
    copy.write_bytes(path.read_bytes())
    os.utime(copy, (2, 2))
    assert file_fingerprint(copy) in seen
    (tmp_path / "empty").touch()
    assert file_fingerprint(tmp_path / "empty") not in seen
