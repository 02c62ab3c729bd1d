"""scripts/gguf.py as people run it: tables, JSON, .npy files, exit status and messages."""

import json
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from apple_silicon_video.quantization.formats import FORMATS, random_blocks
from apple_silicon_video.quantization.gguf_writer import GGUFWriter
from apple_silicon_video.tests.unit.commands import inside as inside
from apple_silicon_video.tests.unit.commands import run as run

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "gguf.py"
PATCH = torch.linspace(-70_000, 70_000, 256).reshape(16, 4, 1, 2, 2)
BLOCKS = random_blocks(FORMATS["Q5_K"], 12, seed=3)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    writer = GGUFWriter(tmp_path_factory.mktemp("model") / "wan.gguf")
    writer.metadata("general.architecture", "wan")
    writer.metadata("general.name", "two\nlines \x1b[31m " + "long " * 40)
    writer.metadata("tokens", [f"token {i}" for i in range(1000)])
    writer.metadata("not.finite", [1.5, float("nan"), float("inf")])
    writer.metadata("nested", [[1, 2], [3]])
    writer.metadata("bytes", b"caf\xe9", "STRING")
    writer.metadata("comfy.gguf.orig_shape.flat.weight", (3, 16, 64))
    writer.tensor("blocks.0.weight", (6, 512), "Q5_K", BLOCKS)
    writer.tensor("flat.weight", (12, 256), "Q5_K", share="blocks.0.weight")
    writer.tensor("patch_embedding.weight", PATCH.shape, "F32", PATCH)
    writer.tensor("half", (3,), "BF16", torch.tensor([1.0, -2.5, 3e38], dtype=torch.bfloat16))
    return writer.write()


def test_inspect_prints_tables(model, run):
    result = run("inspect", model)
    assert (result.returncode, result.stderr) == (0, "")
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[0][1:] == ["GGUF", "version", "3,", str(model.stat().st_size), "bytes"]
    assert lines[1] == ["architecture:", "wan"]
    assert ["tokens", "STRING[1000]", "..."] in lines
    assert ["blocks.0.weight", "Q5_K", "6", "x", "512", "2112"] in lines
    assert ["flat.weight", "Q5_K", "3", "x", "16", "x", "64", "2112"] in lines
    assert ["patch_embedding.weight", "F32", "16", "x", "4", "x", "1", "x", "2", "x", "2", "1024"] in lines
    assert ["Q5_K", "2", "6144", "4224", "5.5"] in lines
    assert ["all", "4", "6403", "5254", "6.564"] in lines
    assert "token 1" not in result.stdout
    assert "\x1b" not in result.stdout and r"two\nlines \x1b[31m long" in result.stdout
    assert max(map(len, result.stdout.splitlines())) < 180


def test_inspect_json(model, inside):
    status, out, err = inside("inspect", model, "--json")
    assert (status, err) == (0, "")
    report = json.loads(out, parse_constant=pytest.fail)
    assert (report["version"], report["alignment"], report["architecture"]) == (3, 32, "wan")
    assert (report["file"], report["bytes"]) == (str(model), model.stat().st_size)
    assert report["metadata"]["tokens"] == {"kind": "STRING[]", "length": 1000}
    assert report["metadata"]["nested"]["value"] == [[1, 2], [3]]
    assert report["metadata"]["not.finite"]["value"] == [1.5, "nan", "inf"]
    assert report["metadata"]["bytes"] == {"kind": "STRING", "value": "caf\udce9"}
    assert [tensor["name"] for tensor in report["tensors"]] == [
        "blocks.0.weight",
        "flat.weight",
        "patch_embedding.weight",
        "half",
    ]
    shared = report["tensors"][1]
    assert (shared["type"], shared["shape"], shared["bytes"]) == ("Q5_K", [3, 16, 64], 2112)
    assert shared["offset"] == report["tensors"][0]["offset"]
    assert report["types"][0] == {
        "type": "Q5_K",
        "tensors": 2,
        "weights": 6144,
        "bytes": 4224,
        "bits_per_weight": 5.5,
    }
    assert report["total"]["weights"] == 6403


@pytest.mark.parametrize(
    ("tensor", "dtype"),
    [
        ("blocks.0.weight", None),
        ("flat.weight", "float16"),
        ("patch_embedding.weight", "float16"),
        ("half", "float32"),
    ],
)
def test_dequantize(model, tmp_path, inside, tensor, dtype):
    out = tmp_path / "out.npy"
    out.write_bytes(b"old")
    status, _, err = inside("dequantize", model, tensor, out, *(["--dtype", dtype] if dtype else []))
    assert (status, err) == (0, "")
    decoded = gguf.dequantize(BLOCKS.numpy(), gguf.GGMLQuantizationType.Q5_K)
    expected = {
        "blocks.0.weight": decoded.reshape(6, 512),
        "flat.weight": decoded.reshape(3, 16, 64),
        "patch_embedding.weight": PATCH.numpy(),
        "half": torch.tensor([1.0, -2.5, 3e38], dtype=torch.bfloat16).float().numpy(),
    }[tensor]
    with np.errstate(over="ignore"):
        expected = expected.astype(dtype or "float32")
    written = np.load(out)
    assert written.dtype == expected.dtype and np.array_equal(written, expected)
    assert list(tmp_path.iterdir()) == [out]


def test_failures_are_one_sentence(model, tmp_path, inside):
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"<html><body>Not found</body></html>")
    folder = tmp_path / "folder.npy"
    folder.mkdir()
    for arguments, sentence in (
        (("inspect", tmp_path / "gone.gguf"), "gone.gguf does not exist; check its name and folder.\n"),
        (("inspect", bad, "--json"), "bad.gguf is not a GGUF file but looks like a web page; "),
        (("dequantize", model, "absent", tmp_path / "a.npy"), "wan.gguf has no tensor named 'absent'.\n"),
        (("dequantize", model, "half", tmp_path / "no" / "a.npy"), "a.npy cannot be written (No such file or"),
        (("dequantize", model, "half", folder), "folder.npy cannot be written (Is a directory); "),
    ):
        status, out, err = inside(*arguments)
        assert (status, out) == (1, "")
        assert sentence in err and err.count("\n") == 1
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["bad.gguf", "folder.npy"]
    assert list(folder.iterdir()) == []


def test_wrong_usage(model, inside):
    for arguments in ((), ("dequantize", model, "half", "out.npy", "--dtype", "int4")):
        status, _, err = inside(*arguments)
        assert status == 2 and err.startswith("usage: gguf.py")


def test_status_and_message_of_the_process(tmp_path, run):
    result = run("dequantize", tmp_path / "gone.gguf", "half", tmp_path / "a.npy")
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert "gone.gguf does not exist" in result.stderr


def test_a_closed_pipe_is_no_error(model):
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), "inspect", str(model)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    process.wait()
