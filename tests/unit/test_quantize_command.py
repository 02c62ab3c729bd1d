"""``scripts/gguf.py quantize``: every type and kind of source, read back with gguf-py, and what goes wrong."""

import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import sentencepiece
import torch
from apple_silicon_video.quantization import quantizer_files
from apple_silicon_video.quantization.gguf import GGUFFile
from apple_silicon_video.quantization.gguf_writer import GGUFWriter
from apple_silicon_video.quantization.quantizer import QuantizeError
from apple_silicon_video.quantization.quantizer_files import quantize_file
from apple_silicon_video.quantization.recipes import FILE_TYPES, RECIPES, wan_types
from apple_silicon_video.quantization.tokenizer import sentencepiece_model
from apple_silicon_video.tests.unit.gguf_py import read_by_gguf_py
from safetensors.torch import load_file, save_file
from small_models import (
    ENCODERS,
    SCALED_LAYOUTS,
    encoder_tokenizer,
    encoder_types,
    encoder_weights,
    scaled_model,
    transformers_name,
    wan_weights,
    write_encoder_reference,
    write_safetensors,
    write_scaled,
    write_wan_reference,
)

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "gguf.py"
VARIANT = "wan2.1-i2v-14b"
LARGEST_ERROR = {"Q2_K": 0.3, "Q3_K": 0.17, "Q4": 0.1, "IQ4": 0.1, "Q5": 0.06, "Q6": 0.03, "Q8": 0.01, "BF": 0.004}
Q = "blocks.0.self_attn.q"

DIFFUSERS = (
    ("head.modulation", "scale_shift_table"),
    ("head.head.", "proj_out."),
    ("time_embedding.0.", "condition_embedder.time_embedder.linear_1."),
    ("time_embedding.2.", "condition_embedder.time_embedder.linear_2."),
    ("text_embedding.0.", "condition_embedder.text_embedder.linear_1."),
    ("text_embedding.2.", "condition_embedder.text_embedder.linear_2."),
    ("time_projection.1.", "condition_embedder.time_proj."),
    ("img_emb.proj.0.", "condition_embedder.image_embedder.norm1."),
    ("img_emb.proj.1.", "condition_embedder.image_embedder.ff.net.0.proj."),
    ("img_emb.proj.3.", "condition_embedder.image_embedder.ff.net.2."),
    ("img_emb.proj.4.", "condition_embedder.image_embedder.norm2."),
    (".modulation", ".scale_shift_table"),
    (".norm_k_img.", ".norm_added_k."),
    (".k_img.", ".add_k_proj."),
    (".v_img.", ".add_v_proj."),
    (".self_attn.", ".attn1."),
    (".cross_attn.", ".attn2."),
    (".q.", ".to_q."),
    (".k.", ".to_k."),
    (".v.", ".to_v."),
    (".o.", ".to_out.0."),
    (".norm3.", ".norm2."),
    (".ffn.0.", ".ffn.net.0.proj."),
    (".ffn.2.", ".ffn.net.2."),
)


def run(*arguments):
    command = [sys.executable, str(SCRIPT), "quantize", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)


def diffusers_name(name):
    for native, theirs in DIFFUSERS:
        name = name.replace(native, theirs)
    return name


def decoded(path):
    """Every tensor as gguf-py decodes it, float32 in torch's shapes."""
    return {
        tensor.name: torch.from_numpy(
            np.array(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32).reshape(
                tuple(reversed(tensor.shape.tolist()))
            )
        )
        for tensor in read_by_gguf_py(path).tensors
    }


def types(path):
    return {name: info.type_name for name, info in GGUFFile(path).tensors.items()}


def difference(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    path = tmp_path_factory.mktemp("wan") / "wan.safetensors"
    return write_wan_reference(path, wan_weights(VARIANT, "F32"))


@pytest.fixture(scope="module")
def dense(wan):
    return load_file(wan)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_type_of_file(recipe, wan, dense, tmp_path):
    report = quantize_file(wan, tmp_path / "out.gguf", recipe, threads=2)
    found, kinds = decoded(report.path), types(report.path)
    assert found.keys() == dense.keys()
    shapes = {name: tuple(tensor.shape) for name, tensor in dense.items()}
    order = list(GGUFFile(report.path).tensors)
    kept = "F32" if recipe == "F32" else "BF16" if recipe == "BF16" else "F16"
    assert kinds == wan_types({name: shapes[name] for name in order}, recipe, kept)
    for name, expected in dense.items():
        assert found[name].shape == expected.shape, name
        limit = next((limit for kind, limit in LARGEST_ERROR.items() if kinds[name].startswith(kind)), 0.001)
        assert difference(found[name], expected) < limit, name
    reported = {tensor.name: tensor for tensor in report.tensors}
    for name in ("blocks.0.ffn.0.weight", Q + ".weight"):
        assert reported[name].error == pytest.approx(difference(found[name], dense[name]), rel=1e-3, abs=1e-9)
    fields = read_by_gguf_py(report.path).fields
    assert fields["general.architecture"].contents() == "wan"
    assert fields["general.file_type"].contents() == FILE_TYPES[recipe]
    assert fields["general.quantization_version"].contents() == 2
    assert report.size == report.path.stat().st_size


def test_five_dimensions_and_modulation_keep_shape_and_precision(wan, dense, tmp_path):
    quantize_file(wan, tmp_path / "out.gguf", "Q3_K_M")
    tensors = GGUFFile(tmp_path / "out.gguf").tensors
    for name in ("patch_embedding.weight", "blocks.1.modulation", "head.modulation"):
        assert (tensors[name].type_name, tensors[name].shape) == ("F32", tuple(dense[name].shape))


def test_command_prints_progress_and_report(wan, tmp_path):
    out = tmp_path / "out.gguf"
    result = run(wan, out, "--type", "Q4_K_M", "--threads", 2)
    assert result.returncode == 0, result.stderr
    assert "bits per weight" in result.stdout and "Q4_K" in result.stdout and "largest errors" in result.stdout
    assert "100.0 %" in result.stderr and "left" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]
    again = tmp_path / "again.gguf"
    run(wan, again, "--type", "Q4_K_M", "--threads", 1)
    assert again.read_bytes() == out.read_bytes()


def test_other_sources_give_the_same_file(wan, dense, tmp_path):
    expected = quantize_file(wan, tmp_path / "expected.gguf", "Q5_K_M").path.read_bytes()
    save_file({diffusers_name(name): tensor for name, tensor in dense.items()}, tmp_path / "diffusers.safetensors")
    save_file({f"model.diffusion_model.{name}": t for name, t in dense.items()}, tmp_path / "prefixed.safetensors")
    shards = tmp_path / "shards"
    shards.mkdir()
    names = list(dense)
    index = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: dense[name] for name in part}, shards / file)
        index.update(dict.fromkeys(part, file))
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    quantize_file(wan, tmp_path / "full.gguf", "F32")
    for source in (
        tmp_path / "diffusers.safetensors",
        tmp_path / "prefixed.safetensors",
        shards,
        shards / "model.safetensors.index.json",
        shards / "model-00002-of-00002.safetensors",
        tmp_path / "full.gguf",
    ):
        assert quantize_file(source, tmp_path / "out.gguf", "Q5_K_M").path.read_bytes() == expected, source


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_sources(dtype, dense, tmp_path):
    half = {name: tensor.to(dtype) for name, tensor in dense.items()}
    save_file(half, tmp_path / "half.safetensors")
    report = quantize_file(tmp_path / "half.safetensors", tmp_path / "out.gguf", "Q8_0")
    kept = {torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    assert types(report.path)["text_embedding.0.weight"] == kept
    found = decoded(report.path)
    assert torch.equal(found["text_embedding.0.weight"], half["text_embedding.0.weight"].float())
    assert difference(found[Q + ".weight"], half[Q + ".weight"].float()) < 0.01


@pytest.mark.parametrize("layout", SCALED_LAYOUTS)
def test_scaled_sources(layout, dense, tmp_path):
    """fp8, int8 and MXFP8 in every layout are decoded exactly, also where shards part weights and scales."""
    model = scaled_model(dense, SCALED_LAYOUTS[layout], prefix="model.diffusion_model.")
    write_scaled(tmp_path / "scaled.safetensors", model)
    found = decoded(quantize_file(tmp_path / "scaled.safetensors", tmp_path / "out.gguf", "F32").path)
    assert found.keys() == model.decoded.keys() == dense.keys()
    for name, tensor in model.decoded.items():
        assert torch.equal(found[name], tensor), name
    weights = {name for name in model.tensors if name.endswith(".weight")}
    index = {name: f"{'a' if name in weights else 'b'}.safetensors" for name in model.tensors}
    for file in ("a.safetensors", "b.safetensors"):
        part = {name: model.tensors[name] for name in index if index[name] == file}
        write_safetensors(tmp_path / file, part, model.metadata if file == "b.safetensors" else None)
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    whole = (tmp_path / "out.gguf").read_bytes()
    assert quantize_file(tmp_path / "m.safetensors.index.json", tmp_path / "o.gguf", "F32").path.read_bytes() == whole


def test_pieces_of_scaled_tensors_begin_anywhere(tmp_path, monkeypatch):
    monkeypatch.setattr("apple_silicon_video.quantization.quantizer.PIECE", 3 * 256)
    dense = {f"{Q}.weight": torch.randn(300, 320), "blocks.0.self_attn.k.bias": torch.randn(999)}
    dense["head.modulation"] = torch.ones(1, 2, 256)
    model = scaled_model(dense, SCALED_LAYOUTS["weight-scale-row"])
    write_scaled(tmp_path / "scaled.safetensors", model)
    found = decoded(quantize_file(tmp_path / "scaled.safetensors", tmp_path / "out.gguf", "F32").path)
    assert all(torch.equal(found[name], tensor) for name, tensor in model.decoded.items())


@pytest.mark.parametrize(
    ("about", "scale", "problem"),
    [
        ({"format": "mxfp8"}, torch.ones(4), "scales of shape"),
        ({"format": "nvfp4"}, torch.tensor(1.0), "quantised to nvfp4"),
        ({"format": "int8_tensorwise", "convrot": True}, torch.tensor(1.0), "rotation"),
        ({"format": "float8_e4m3fn"}, torch.ones(3, 7), "do not fit"),
        (["float8_e4m3fn"], torch.tensor(1.0), "cannot be read"),
    ],
)
def test_scaled_sources_that_are_refused(about, scale, problem, dense, tmp_path):
    tensors = {
        f"{Q}.weight": dense[f"{Q}.weight"].to(torch.float8_e4m3fn),
        f"{Q}.weight_scale": scale,
        f"{Q}.comfy_quant": torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8),
    }
    save_file({**dense, **tensors}, tmp_path / "quant.safetensors")
    with pytest.raises(QuantizeError, match=problem) as caught:
        quantize_file(tmp_path / "quant.safetensors", tmp_path / "out.gguf", "F32")
    assert str(caught.value).startswith("quant.safetensors") and "\n" not in str(caught.value)


def test_umt5_with_its_vocabulary(tmp_path):
    shape = ENCODERS["umt5-2-layers"]
    source = write_encoder_reference(tmp_path / "umt5.safetensors", shape, encoder_weights(shape, "F16"), torch.float16)
    dense = load_file(source)
    report = quantize_file(source, tmp_path / "umt5.gguf", "Q5_K_M")
    file, found = GGUFFile(report.path), decoded(report.path)
    assert file.architecture == "t5encoder"
    assert types(report.path) == encoder_types({name: tuple(t.shape) for name, t in found.items()}, "Q5_K_M")
    for name, tensor in found.items():
        assert difference(tensor, dense[transformers_name(name)].float()) < 0.06, name
    rebuilt = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model(file.metadata))
    original = sentencepiece.SentencePieceProcessor(model_proto=encoder_tokenizer(shape))
    for text in ("A cat walks in the rain, 4K", "ein Hund läuft über die Straße", "猫 在 下雪 的 城市", "\t\U0001f600"):
        assert rebuilt.encode(text) == original.encode(text)
    assert report.tensors[0].weights == shape.rows * shape.width
    second = quantize_file(report.path, tmp_path / "again.gguf", "Q3_K_M").path
    assert list(GGUFFile(second).metadata["tokenizer.ggml.tokens"]) == list(file.metadata["tokenizer.ggml.tokens"])
    assert types(second)["enc.blk.0.attn_q.weight"] == "Q3_K"


def binary_imatrix(path, entries):
    data = struct.pack("<i", len(entries))
    for name, values in entries.items():
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", 2, len(values))
        data += (2 * values).astype("<f4").tobytes()
    path.write_bytes(data)
    return path


def gguf_imatrix(path, entries):
    writer = GGUFWriter(path)
    writer.metadata("general.type", "imatrix")
    for name, values in entries.items():
        writer.tensor(f"{name}.in_sum2", (1, len(values)), "F32", (5 * values).astype(np.float32))
        writer.tensor(f"{name}.counts", (1, 1), "F32", np.array([5], np.float32))
    return writer.write()


@pytest.mark.parametrize("make", [binary_imatrix, gguf_imatrix])
def test_importance_matrix(make, wan, dense, tmp_path):
    values = np.exp(np.random.default_rng(0).standard_normal(256)).astype(np.float32)
    imatrix = make(tmp_path / "imatrix", {f"{Q}.weight": values})
    plain = decoded(quantize_file(wan, tmp_path / "plain.gguf", "Q3_K_S").path)
    weighted = decoded(quantize_file(wan, tmp_path / "weighted.gguf", "Q3_K_S", imatrix=imatrix).path)
    root = torch.from_numpy(values).sqrt()
    exact = dense[f"{Q}.weight"]
    assert difference(weighted[f"{Q}.weight"] * root, exact * root) < difference(
        plain[f"{Q}.weight"] * root, exact * root
    )
    assert torch.equal(weighted["blocks.0.self_attn.k.weight"], plain["blocks.0.self_attn.k.weight"])


@pytest.mark.parametrize(
    ("module", "down", "up"),
    [
        (f"diffusion_model.{Q}", "lora_A.weight", "lora_B.weight"),
        ("transformer.blocks.0.attn1.to_q", "lora_A.weight", "lora_B.weight"),
        ("lora_unet_blocks_0_self_attn_q", "lora_down.weight", "lora_up.weight"),
    ],
)
def test_lora_is_merged(module, down, up, wan, dense, tmp_path):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 256, generator=generator) * 0.1, torch.randn(256, 4, generator=generator) * 0.1
    save_file(
        {f"{module}.{down}": a, f"{module}.{up}": b, f"{module}.alpha": torch.tensor(2.0)}, tmp_path / "l.safetensors"
    )
    result = run(wan, tmp_path / "out.gguf", "--type", "F32", "--lora", f"{tmp_path / 'l.safetensors'}:0.5")
    assert result.returncode == 0, result.stderr
    found = decoded(tmp_path / "out.gguf")
    torch.testing.assert_close(found[f"{Q}.weight"], dense[f"{Q}.weight"] + 0.5 * 2 / 4 * b @ a)
    assert all(torch.equal(found[name], dense[name]) for name in dense if name != f"{Q}.weight")


def test_lora_of_differences_is_merged(wan, dense, tmp_path):
    changes = {"diff": torch.randn(256, 256), "diff_b": torch.randn(256)}
    save_file({f"diffusion_model.{Q}.{part}": t for part, t in changes.items()}, tmp_path / "l.safetensors")
    report = quantize_file(wan, tmp_path / "out.gguf", "F32", loras=[(tmp_path / "l.safetensors", 2.0)])
    found = decoded(report.path)
    assert torch.equal(found[f"{Q}.weight"], dense[f"{Q}.weight"] + 2 * changes["diff"])
    assert torch.equal(found[f"{Q}.bias"], dense[f"{Q}.bias"] + 2 * changes["diff_b"])


def test_interrupted_run_leaves_nothing(tmp_path):
    tensors = {f"{Q}.weight": torch.randn(20_000, 2048, dtype=torch.bfloat16), "head.modulation": torch.ones(1, 2, 256)}
    save_file(tensors, tmp_path / "large.safetensors")
    command = [sys.executable, str(SCRIPT), "quantize", tmp_path / "large.safetensors", tmp_path / "out.gguf"]
    process = subprocess.Popen([*command, "--type", "IQ4_XS"], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".out.gguf.*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, messages = process.communicate()
    assert process.returncode == 1
    assert messages.splitlines()[-1] == "Interrupted: nothing was written."
    assert [path.name for path in tmp_path.iterdir()] == ["large.safetensors"]


def test_stop_from_progress_keeps_the_older_file(wan, tmp_path):
    (tmp_path / "out.gguf").write_bytes(b"older")

    def stop(done, total, name):
        if done > total / 2:
            raise RuntimeError(name)

    with pytest.raises(RuntimeError):
        quantize_file(wan, tmp_path / "out.gguf", "Q4_0", progress=stop)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"out.gguf": b"older"}


def test_progress_counts_up_to_all_weights(wan, dense, tmp_path):
    calls = []
    quantize_file(wan, tmp_path / "out.gguf", "Q4_0", progress=lambda *call: calls.append(call))
    total = sum(tensor.numel() for tensor in dense.values())
    assert [done for done, _, _ in calls] == sorted(done for done, _, _ in calls)
    assert calls[-1][:2] == (total, total)


def bad_weight(path, dense):
    tensor = dense["blocks.1.ffn.2.weight"].clone()
    tensor[3, 4] = float("nan")
    save_file(dense | {"blocks.1.ffn.2.weight": tensor}, path)


REFUSALS = {
    "nan": (bad_weight, r"'blocks\.1\.ffn\.2\.weight' holds infinite or undefined"),
    "other model": (lambda path, dense: save_file({"a.weight": torch.ones(2, 2)}, path), "is no Wan model"),
    "cut": (lambda path, dense: (save_file(dense, path), os.truncate(path, 1_000_000)), "the file is incomplete"),
    "text": (lambda path, dense: path.write_text("<html>nothing here</html>"), "does not begin as a safetensors"),
    "missing": (lambda path, dense: None, "is missing"),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_refusals_are_one_sentence_and_leave_nothing(kind, dense, tmp_path):
    make, message = REFUSALS[kind]
    make(tmp_path / "source.safetensors", dense)
    with pytest.raises(QuantizeError, match=message) as caught:
        quantize_file(tmp_path / "source.safetensors", tmp_path / "out.gguf", "Q4_K_M")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*out.gguf*"))


def test_encoder_without_vocabulary_and_wrong_lora_are_refused(wan, tmp_path):
    shape = ENCODERS["umt5"]
    tensors = load_file(write_encoder_reference(tmp_path / "umt5.safetensors", shape, encoder_weights(shape, "F16")))
    del tensors["spiece_model"]
    (tmp_path / "bare").mkdir()
    save_file(tensors, tmp_path / "bare" / "umt5.safetensors")
    with pytest.raises(QuantizeError, match=r"spiece\.model"):
        quantize_file(tmp_path / "bare" / "umt5.safetensors", tmp_path / "out.gguf", "Q8_0")
    (tmp_path / "bare" / "spiece.model").write_bytes(encoder_tokenizer(shape))
    assert quantize_file(tmp_path / "bare" / "umt5.safetensors", tmp_path / "out.gguf", "Q8_0").size
    save_file({f"{Q}.lora_A.weight": torch.ones(4, 99), f"{Q}.lora_B.weight": torch.ones(256, 4)}, tmp_path / "l")
    with pytest.raises(QuantizeError, match="another shape"):
        quantize_file(wan, tmp_path / "wan.gguf", "Q8_0", loras=[(tmp_path / "l", 1.0)])
    save_file({f"{Q}.lora_A.weight": torch.ones(4, 256), f"{Q}.dora_scale": torch.ones(256)}, tmp_path / "l")
    with pytest.raises(QuantizeError, match="dora_scale"):
        quantize_file(wan, tmp_path / "wan.gguf", "Q8_0", loras=[(tmp_path / "l", 1.0)])
    save_file({f"{part}.diff_b": torch.ones(256) for part in (Q, "elsewhere")}, tmp_path / "l")
    report = quantize_file(wan, tmp_path / "wan.gguf", "Q8_0", loras=[(tmp_path / "l", 1.0)])
    assert "1 of 2 parts are for another model" in report.text()
    save_file({"elsewhere.lora_A.weight": torch.ones(4, 99)}, tmp_path / "l")
    with pytest.raises(QuantizeError, match="changes no tensor"):
        quantize_file(wan, tmp_path / "wan.gguf", "Q8_0", loras=[(tmp_path / "l", 1.0)])


def test_the_source_is_not_overwritten(wan, tmp_path):
    path = quantize_file(wan, tmp_path / "out.gguf", "Q8_0").path
    with pytest.raises(QuantizeError, match="would replace"):
        quantize_file(path, path, "Q4_0")


def test_memory_stays_small(tmp_path, monkeypatch):
    """Pieces in flight are bounded by the threads, whatever the tensor's size."""
    monkeypatch.setattr("apple_silicon_video.quantization.quantizer.PIECE", 1 << 16)
    tensors = {f"{Q}.weight": torch.randn(4096, 512), "head.modulation": torch.ones(1, 2, 256)}
    save_file(tensors, tmp_path / "large.safetensors")
    read, written = [0], []

    class Counting:
        shape, type_name = (4096, 512), "F32"

        def read(self, start, stop):
            read[0] += stop - start
            assert read[0] - (written[-1] if written else 0) <= (2 * 2 + 1) * (1 << 16)
            return torch.ones(stop - start)

    real = quantizer_files.open_source

    def counted(path):
        source = real(path)
        source.tensors[f"{Q}.weight"] = Counting()
        return source

    monkeypatch.setattr(quantizer_files, "open_source", counted)
    quantize_file(
        tmp_path / "large.safetensors", tmp_path / "o.gguf", "Q8_0", 2, progress=lambda done, *_: written.append(done)
    )
    assert read[0] == 4096 * 512
