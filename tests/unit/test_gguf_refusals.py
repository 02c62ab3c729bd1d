"""Files that GGUFFile refuses: each with one sentence that names the file, without large allocations."""

import os
import re
import struct
import tracemalloc

import pytest
from apple_silicon_video.quantization import gguf as reader
from apple_silicon_video.quantization.gguf import GGUFError, GGUFFile

STRING, ARRAY, UINT32, INT32 = 8, 9, 4, 5
F32, Q3_K = 0, 11


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def pair(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def array(kind: int, count: int, items: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + items


def tensor(name: str | bytes, dims: tuple[int, ...], type_id: int = F32, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, type_id, offset)


def gguf(
    *, pairs: tuple[bytes, ...] = (), tensors: tuple[bytes, ...] = (), data: int = 4096, version: int = 3
) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(pairs)) + b"".join(pairs) + b"".join(tensors)
    return head + bytes(-len(head) % 32 + data)


def counts(n_tensors: int, n_pairs: int) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_pairs) + bytes(100)


ONE = tensor("t", (8,))
HUGE = 1 << 60

REFUSED = {
    "another format": (b"\x7fELF" + bytes(range(200)), "is not a GGUF file; "),
    "safetensors": (struct.pack("<Q", 40) + b'{"a":{"dtype":"F32"' + bytes(60), "looks like a safetensors file"),
    "zip": (b"PK\x03\x04" + bytes(100), "looks like a zip archive"),
    "pickle": (b"\x80\x02}q\x00" + bytes(100), "looks like a pickled PyTorch checkpoint"),
    "gzip": (b"\x1f\x8b\x08" + bytes(100), "looks like a gzip archive"),
    "git-lfs pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 7\n",
        "looks like a Git LFS pointer; download the file it points to",
    ),
    "web page": (b"\n<!DOCTYPE html>\n<html><head>" + bytes(99), "looks like a web page"),
    "error message": (b"Invalid username or password.", "looks like a text file"),
    "zeros": (bytes(4096), "looks like an unfinished download"),
    "old GGML": (b"tjgg" + bytes(100), "looks like a GGML file from before GGUF"),
    "half the magic": (b"GG", "ends inside its header, after 2 bytes"),
    "version 1": (gguf(version=1), "is a GGUF file of version 1; "),
    "version 4": (gguf(version=4), "says it is GGUF version 4 "),
    "version 0": (gguf(version=0), "says it is GGUF version 0 "),
    "big endian": (gguf(version=3 << 24), "is a big-endian GGUF file; "),
    "4 billion tensors": (counts(1 << 32, 0), "announces 4294967296 tensors"),
    "4 billion pairs": (counts(0, 1 << 32), "announces 4294967296 metadata entries"),
    "2^63 tensors": (counts(1 << 63, 0), f"announces {1 << 63} tensors"),
    "more tensors than bytes": (counts(50, 0), "announces 50 tensors"),
    "key of 2^60 bytes": (
        counts(0, 1)[:24] + struct.pack("<Q", HUGE) + bytes(64),
        f"has a metadata key of {HUGE} bytes",
    ),
    "key past the end": (counts(0, 1)[:24] + struct.pack("<Q", 500) + bytes(64), "ends inside its header"),
    "string of 2^60 bytes": (
        gguf(pairs=(pair("k", STRING, struct.pack("<Q", HUGE)),)),
        f"has a string of {HUGE} bytes in its metadata 'k'",
    ),
    "string of 2^64 - 1 bytes": (
        gguf(pairs=(pair("k", STRING, struct.pack("<Q", 2**64 - 1)),)),
        "has a string of 18446744073709551615 bytes",
    ),
    "string past the end": (gguf(pairs=(pair("k", STRING, struct.pack("<Q", 9999)),)), "ends inside its header"),
    "array of 2^60 strings": (gguf(pairs=(pair("k", ARRAY, array(STRING, HUGE)),)), f"announces {HUGE} items"),
    "array of 2^60 numbers": (gguf(pairs=(pair("k", ARRAY, array(UINT32, HUGE)),)), "ends inside its header"),
    "array of 2^60 arrays": (gguf(pairs=(pair("k", ARRAY, array(ARRAY, HUGE)),)), f"announces {HUGE} items"),
    "arrays nested too deep": (
        gguf(pairs=(pair("k", ARRAY, array(ARRAY, 1) * 5 + array(UINT32, 0)),)),
        "has arrays nested more than 4 deep in 'k'",
    ),
    "unknown kind": (gguf(pairs=(pair("k", 13, bytes(8)),)), "has metadata 'k' of the unknown kind 13"),
    "unknown kind in array": (gguf(pairs=(pair("k", ARRAY, array(99, 1)),)), "of the unknown kind 99"),
    "key twice": (gguf(pairs=(pair("k", UINT32, bytes(4)),) * 2), "has the metadata key 'k' twice"),
    "key not UTF-8": (gguf(pairs=(pair(b"\xff", UINT32, bytes(4)),)), "has a metadata key that is not UTF-8"),
    "alignment 0": (gguf(pairs=(pair("general.alignment", UINT32, bytes(4)),)), "has a general.alignment"),
    "alignment 24": (
        gguf(pairs=(pair("general.alignment", UINT32, struct.pack("<I", 24)),)),
        "has a general.alignment that is no power of two from 8 up",
    ),
    "alignment 4": (
        gguf(pairs=(pair("general.alignment", UINT32, struct.pack("<I", 4)),)),
        "has a general.alignment",
    ),
    "alignment 2^31": (
        gguf(pairs=(pair("general.alignment", UINT32, struct.pack("<I", 1 << 31)),)),
        "has a general.alignment",
    ),
    "alignment a string": (gguf(pairs=(pair("general.alignment", STRING, text("32")),)), "has a general.alignment"),
    "architecture a number": (
        gguf(pairs=(pair("general.architecture", UINT32, bytes(4)),)),
        "has a general.architecture that is no name",
    ),
    "tensor twice": (gguf(tensors=(ONE, ONE)), "has two tensors named 't'"),
    "tensor name not UTF-8": (gguf(tensors=(tensor(b"\xc3", (8,)),)), "has a tensor name that is not UTF-8"),
    "nine dimensions": (gguf(tensors=(tensor("t", (1,) * 9),)), "has tensor 't' with 9 dimensions"),
    "4 billion dimensions": (
        counts(1, 0)[:24] + text("t") + struct.pack("<I", 2**32 - 1) + bytes(64),
        "has tensor 't' with 4294967295 dimensions",
    ),
    "dimension of zero": (gguf(tensors=(tensor("t", (8, 0)),)), "has tensor 't' with a dimension of zero"),
    "overflowing dimensions": (gguf(tensors=(tensor("t", (1 << 32,) * 4),)), f"ends at byte {(1 << 130) + 96}"),
    "broken rows": (
        gguf(tensors=(tensor("t", (128, 2), Q3_K),)),
        "has tensor 't' whose rows are not whole blocks of 256 weights, as Q3_K needs",
    ),
    "quantised scalar": (gguf(tensors=(tensor("t", (), Q3_K),)), "whose rows are not whole blocks"),
    "Q8_1": (
        gguf(tensors=(tensor("t", (32,), 9),)),
        "stores tensor 't' as Q8_1 (ggml type 9), which cannot be decoded",
    ),
    "Q8_K": (gguf(tensors=(tensor("t", (256,), 15),)), "stores tensor 't' as Q8_K (ggml type 15)"),
    "removed type": (gguf(tensors=(tensor("t", (32,), 31),)), "stores tensor 't' as Q4_0_4_4 (ggml type 31)"),
    "unknown type": (gguf(tensors=(tensor("t", (32,), 250),)), "stores tensor 't' as ggml type 250, which is unknown"),
    "tensor past the end": (
        gguf(tensors=(tensor("t", (1025,)),)),
        "has 4160 bytes but its tensor 't' ends at byte 4164",
    ),
    "offset past the end": (
        gguf(tensors=(tensor("t", (8,), F32, 2**64 - 1),)),
        f"its tensor 't' ends at byte {2**64 - 1 + 64 + 32}",
    ),
    "original shape of another size": (
        gguf(
            pairs=(pair("comfy.gguf.orig_shape.t", ARRAY, array(INT32, 2, struct.pack("<ii", 3, 3))),),
            tensors=(ONE,),
        ),
        "gives tensor 't' the original shape [3, 3], which does not fit the stored shape [8]",
    ),
    "negative original shape": (
        gguf(
            pairs=(pair("comfy.gguf.orig_shape.t", ARRAY, array(INT32, 2, struct.pack("<ii", -1, -8))),),
            tensors=(ONE,),
        ),
        "gives tensor 't' the original shape [-1, -8]",
    ),
    "original shape of nine dimensions": (
        gguf(pairs=(pair("comfy.gguf.orig_shape.t", ARRAY, array(INT32, 9, bytes(36))),), tensors=(ONE,)),
        "has a 'comfy.gguf.orig_shape.t' that is not a shape",
    ),
    "original shape a number": (
        gguf(pairs=(pair("comfy.gguf.orig_shape.t", UINT32, bytes(4)),), tensors=(ONE,)),
        "has a 'comfy.gguf.orig_shape.t' that is not a shape",
    ),
    "line break in a name": (gguf(tensors=(tensor("a\nb", (8, 0)),)), r"has tensor 'a\nb' with a dimension of zero"),
}


def refusal(path) -> str:
    with pytest.raises(GGUFError) as caught:
        GGUFFile(path)
    message = str(caught.value)
    assert "bad.gguf" in message
    assert re.fullmatch(r"[^\n]{20,400}[^.]\.", message), message
    return message


@pytest.mark.parametrize("case", REFUSED)
def test_content_is_refused(tmp_path, case):
    content, expected = REFUSED[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        message = refusal(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert message.startswith("bad.gguf ") and expected in message, message
    assert peak < 4 << 20


def test_the_cases_differ_from_good_files_only_in_their_fault(tmp_path):
    """The builders above make files that open, so each refusal is for the reason it is there for."""
    good = gguf(
        pairs=(
            pair("general.alignment", UINT32, struct.pack("<I", 8)),
            pair("general.architecture", STRING, text("wan")),
            pair("k", ARRAY, array(ARRAY, 1) * 3 + array(UINT32, 0)),
            pair("comfy.gguf.orig_shape.t", ARRAY, array(INT32, 2, struct.pack("<ii", 4, 2))),
        ),
        tensors=(ONE, tensor("rows", (256, 2), Q3_K, 32), tensor("dims", (1,) * 8)),
    )
    path = tmp_path / "good.gguf"
    path.write_bytes(good)
    file = GGUFFile(path)
    assert {name: info.shape for name, info in file.tensors.items()} == {
        "t": (4, 2),
        "rows": (2, 256),
        "dims": (1,) * 8,
    }


def test_a_huge_hole_does_not_take_long_to_refuse(tmp_path):
    """Zeros read as empty strings: a sparse file may claim billions of them, all within its bounds."""
    path = tmp_path / "bad.gguf"
    with open(path, "wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + pair("k", ARRAY, array(STRING, 1 << 33)))
        file.truncate(1 << 37)
    assert f"announces {1 << 33} items in its metadata 'k'" in refusal(path)
    for n_tensors, n_pairs, what in ((70_000, 0, "tensors"), (0, 70_000, "metadata entries")):
        with open(path, "r+b") as file:
            file.write(b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_pairs))
        assert f"announces 70000 {what}" in refusal(path)


def test_the_limit_on_strings_is_for_the_whole_file(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "MAX_WALKED_ITEMS", 5000)
    path = tmp_path / "bad.gguf"
    arrays = [pair(key, ARRAY, array(STRING, 2500, bytes(20_000))) for key in "abc"]
    path.write_bytes(gguf(pairs=tuple(arrays[:2])))
    assert GGUFFile(path).metadata["b"] == [""] * 2500
    path.write_bytes(gguf(pairs=tuple(arrays)))
    assert "announces 2500 items in its metadata 'c'" in refusal(path)


def test_a_huge_array_is_not_decoded_for_what_it_is_not(tmp_path):
    path = tmp_path / "bad.gguf"
    for key, n_bytes in (("general.alignment", 1 << 36), ("general.architecture", 1 << 36)):
        with open(path, "wb") as file:
            file.write(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + pair(key, ARRAY, array(0, n_bytes)))
            file.truncate(1 << 37)
        assert f"has a {key} that is no" in refusal(path)


def test_places_without_a_file(tmp_path):
    path = tmp_path / "bad.gguf"
    assert refusal(path).endswith("bad.gguf does not exist; check its name and folder.")
    path.symlink_to(tmp_path / "gone.gguf")
    assert re.search(r"is a link to .*gone\.gguf, which does not exist; ", refusal(path))
    path.unlink()
    path.mkdir()
    assert "is a folder; " in refusal(path)
    assert "cannot be opened (Not a directory)" in refusal_inside_a_file(tmp_path)


def refusal_inside_a_file(tmp_path) -> str:
    (tmp_path / "file").write_bytes(b"x")
    return refusal(tmp_path / "file" / "bad.gguf")


def test_an_empty_file_and_a_pipe(tmp_path):
    path = tmp_path / "bad.gguf"
    path.touch()
    assert refusal(path).endswith("bad.gguf is empty (0 bytes); download it again.")
    path.unlink()
    os.mkfifo(path)
    assert "is not an ordinary file; " in refusal(path)


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    def denied(path, flags, *rest):
        raise PermissionError(13, "Permission denied", path)

    path = tmp_path / "bad.gguf"
    path.write_bytes(gguf(tensors=(ONE,)))
    monkeypatch.setattr(os, "open", denied)
    assert "may not be read (Permission denied); change its permissions" in refusal(path)
