"""The maker of small models: files against gguf-py and safetensors, types against published mixes, repeatable bytes."""

import json
import os
import subprocess
import sys
from math import prod
from pathlib import Path

import gguf
import make_small_models
import numpy as np
import pytest
import sentencepiece
import torch
from apple_silicon_video.quantization.formats import FORMATS
from apple_silicon_video.quantization.gguf import GGUFFile
from apple_silicon_video.quantization.tokenizer import sentencepiece_model
from apple_silicon_video.tests.unit.gguf_py import read_by_gguf_py
from gguf import GGMLQuantizationType
from safetensors.torch import load_file
from small_models import (
    ADAPTERS,
    ENCODERS,
    LAYOUTS,
    SIZES,
    UMT5_XXL,
    VARIANTS,
    encoder_tensors,
    encoder_tokenizer,
    encoder_types,
    encoder_weights,
    make_set,
    sets,
    transformers_name,
    vae_tensors,
    wan_lora,
    wan_shape,
    wan_tensors,
    wan_types,
    wan_weights,
    write_encoder_gguf,
    write_encoder_reference,
    write_full_size_encoder,
    write_full_size_wan,
    write_vae,
    write_wan_gguf,
    write_wan_reference,
)
from small_models.vocabulary import T5, UMT5, train, vocabulary

T2V = "wan2.1-t2v-1.3b"
SCRIPT = Path(make_small_models.__file__)
TEXTS = (
    "A red fox walks across the snow.",
    "  two   spaces\tand a tab\nand a line ",
    "一只猫在森林里跳舞，高清镜头。",
    "ｆｕｌｌ ｗｉｄｔｈ ﬁ Ⅳ ①",
    "🦊 emoji, and é as e\u0301",
    "бежит собака — ночь",
    "",
)


def file_bytes(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def decoded_by_gguf_py(tensor):
    data = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    return torch.from_numpy(np.array(data).reshape([int(dim) for dim in reversed(tensor.shape)]))


# The script and its sets


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, str(SCRIPT), "--output", str(folder), "--set", "demo"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder


def test_two_runs_give_identical_bytes(demo, tmp_path, capsys):
    """The first one was a process of its own."""
    assert make_small_models.main(["--output", str(tmp_path), "--set", "demo", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    first, second = file_bytes(demo), file_bytes(tmp_path)
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


def test_demo_set_is_small_and_complete(demo):
    manifest = json.loads((demo / "manifest.json").read_text())
    paths = set(manifest["files"].values())
    assert paths == {path for path in file_bytes(demo) if path != "manifest.json"}
    assert sum((demo / path).stat().st_size for path in paths) < 60e6
    assert {path.split("/")[0] for path in paths} == {"diffusion_models", "loras", "text_encoders", "vae"}
    names = {path.split("/")[1] for path in paths}
    assert set(manifest["substitutions"].values()) == names
    assert len(manifest["substitutions"]) == len(names) == 11


def stamps(folder):
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def test_second_call_does_nothing(demo):
    before = stamps(demo)
    assert make_set("demo", demo)["set"] == "demo"
    assert stamps(demo) == before


@pytest.fixture
def one_file_set(monkeypatch):
    """A set of one small file that counts how often it is written."""
    written = []

    def write(path):
        written.append(path.name)
        path.write_bytes(b"weights")

    files = [sets.ModelFile("role", "vae", "name", write)]
    monkeypatch.setitem(sets.SETS, "demo", lambda: iter(files))
    return written


@pytest.mark.parametrize("change", ["sources", "missing file", "other size", "broken manifest", "other set"])
def test_set_is_made_again_when_anything_changed(tmp_path, monkeypatch, one_file_set, change):
    make_set("demo", tmp_path)
    make_set("demo", tmp_path)
    assert len(one_file_set) == 1
    if change == "sources":
        monkeypatch.setattr(sets, "sources_hash", lambda: "changed")
    elif change == "missing file":
        (tmp_path / "vae" / "name").unlink()
    elif change == "other size":
        (tmp_path / "vae" / "name").write_bytes(b"w")
    elif change == "broken manifest":
        (tmp_path / "manifest.json").write_text("{")
    else:
        manifest = json.loads((tmp_path / "manifest.json").read_text())
        (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"set": "test"}))
    make_set("demo", tmp_path)
    assert len(one_file_set) == 2
    assert (tmp_path / "vae" / "name").read_bytes() == b"weights"


def test_interrupted_set_leaves_no_manifest(tmp_path, monkeypatch, one_file_set):
    make_set("demo", tmp_path)
    failing = sets.ModelFile("role", "vae", "name", lambda path: 1 / 0)
    monkeypatch.setitem(sets.SETS, "demo", lambda: iter([failing]))
    monkeypatch.setattr(sets, "sources_hash", lambda: "changed")
    with pytest.raises(ZeroDivisionError):
        make_set("demo", tmp_path)
    assert not (tmp_path / "manifest.json").exists()


def test_sources_hash_covers_what_decides_the_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(sets, "ROOT", tmp_path)
    hashes = [sets.sources_hash()]
    sources = ("scripts/small_models/vae.py", "quantization/k_quants.py", "quantization/gguf_writer.py")
    for source in sources:
        assert (SCRIPT.parents[1] / source).is_file()
        target = tmp_path / source
        target.parent.mkdir(parents=True, exist_ok=True)
        for text in ("first", "second"):
            target.write_text(text)
            hashes.append(sets.sources_hash())
    assert len(set(hashes)) == 1 + 2 * len(sources)
    (tmp_path / "quantization" / "comfy_ops.py").write_text("unrelated")
    assert sets.sources_hash() == hashes[-1]


def test_output_that_cannot_be_a_folder_is_refused_in_one_sentence(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert make_small_models.main(["--output", str(tmp_path / "file" / "models")]) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "file/models" in message


def test_roles_and_names_are_unique():
    for name, files in sets.SETS.items():
        made = list(files())
        assert len({file.role for file in made}) == len({(file.folder, file.name) for file in made}) == len(made), name


# Wan


@pytest.mark.parametrize("variant", VARIANTS)
def test_wan_file_holds_the_variants_tensors(tmp_path, variant):
    weights = wan_weights(variant, "Q5_K_M")
    reader = read_by_gguf_py(write_wan_gguf(tmp_path / "wan.gguf", weights, "Q5_K_M"))
    assert reader.get_field("general.architecture").contents() == "wan"
    assert reader.get_field("general.file_type").contents() == gguf.LlamaFileType.MOSTLY_Q5_K_M
    shapes = {tensor.name: tuple(int(dim) for dim in reversed(tensor.shape)) for tensor in reader.tensors}
    assert shapes == wan_tensors(wan_shape(variant))
    assert all(shape[-1] % 256 == 0 for name, shape in shapes.items() if len(shape) == 2)


def test_variants_differ_in_their_weights():
    assert len({variant.seed for variant in VARIANTS.values()}) == len(VARIANTS)
    high, low = (wan_weights(f"wan2.2-i2v-a14b-{noise}", "Q3_K") for noise in ("high", "low"))
    assert not any(torch.equal(one.data, other.data) for one, other in zip(high, low))


@pytest.mark.parametrize("recipe", ["Q3_K_M", "Q5_K_M"])
def test_reference_equals_what_gguf_py_decodes(tmp_path, recipe):
    weights = wan_weights(T2V, recipe)
    reader = read_by_gguf_py(write_wan_gguf(tmp_path / "wan.gguf", weights, recipe))
    reference = load_file(write_wan_reference(tmp_path / "wan.safetensors", weights))
    assert reference.keys() == {tensor.name for tensor in reader.tensors}
    for tensor in reader.tensors:
        assert torch.equal(reference[tensor.name], decoded_by_gguf_py(tensor)), tensor.name
    half = load_file(write_wan_reference(tmp_path / "half.safetensors", weights, torch.bfloat16))
    assert all(torch.equal(half[name], reference[name].to(torch.bfloat16)) for name in reference)


@pytest.mark.parametrize("type_name", [*FORMATS, "F16", "F32"])
def test_any_type_gives_weights_of_the_usual_size(type_name):
    matrices = [weight for weight in wan_weights(T2V, type_name) if weight.name.startswith("blocks.1.self_attn.q")]
    for weight in matrices:
        if len(weight.shape) == 2:
            assert weight.type_name == type_name
            decoded = weight.decoded()
            assert 0.8 < decoded.std() * weight.shape[1] ** 0.5 < 1.25
            assert decoded.mean().abs() * weight.shape[1] ** 0.5 < 0.1


def test_unknown_recipe_is_refused():
    with pytest.raises(ValueError, match="Q9_K"):
        wan_weights(T2V, "Q9_K")


@pytest.mark.parametrize(
    ("recipe", "base", "values", "down"),
    [
        ("Q3_K_M", "Q3_K", ["Q5_K"] * 2 + ["Q4_K"] * 78, "Q4_K"),
        ("Q5_K_M", "Q5_K", ["Q6_K"] * 80, "Q6_K"),
        ("Q3_K", "Q3_K", ["Q3_K"] * 80, "Q3_K"),
    ],
)
def test_wan_mixes_are_the_published_ones(recipe, base, values, down):
    shapes = wan_tensors(wan_shape("wan2.1-t2v-14b", full_size=True))
    types = wan_types(shapes, recipe)
    assert [types[name] for name in shapes if name.endswith(".v.weight")] == values
    assert {types[name] for name in shapes if name.endswith(".ffn.2.weight")} == {down}
    others = ("q", "k", "o", "ffn.0")
    assert {
        types[name]
        for name in shapes
        if name.startswith("blocks.") and name.endswith(tuple(f".{o}.weight" for o in others))
    } == {base}
    kept = {name for name, kind in types.items() if kind == "F16"}
    assert kept == {
        "text_embedding.0.weight",
        "text_embedding.2.weight",
        "time_embedding.0.weight",
        "time_embedding.2.weight",
        "time_projection.1.weight",
        "head.head.weight",
    }
    assert types["patch_embedding.weight"] == types["head.modulation"] == types["blocks.7.modulation"] == "F32"
    assert {types[name] for name, shape in shapes.items() if len(shape) == 1} == {"F32"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path, layout):
    chosen = LAYOUTS[layout]
    weights = wan_weights(T2V, "Q8_0", chosen.tool)
    path = write_wan_gguf(tmp_path / "wan.gguf", weights, "Q8_0", chosen)
    assert path.read_bytes()[4] == (2 if layout == "plain-v2" else 3)
    reader = read_by_gguf_py(path)
    assert (reader.get_field("general.architecture") is None) == layout.startswith("sd-cpp")
    stored = {tensor.name: tensor for tensor in reader.tensors}
    prefix = "model.diffusion_model." if layout.startswith("sd-cpp") else ""
    assert list(stored) == [prefix + weight.name for weight in weights]
    patch = tuple(int(dim) for dim in reversed(stored[f"{prefix}patch_embedding.weight"].shape))
    original = reader.get_field("comfy.gguf.orig_shape.patch_embedding.weight")
    assert (original is not None) == (layout == "orig-shape")
    if original is not None:
        assert original.contents() == [256, 16, 1, 2, 2] and original.types[1] == gguf.GGUFValueType.INT32
    assert patch == {"orig-shape": (64, 256), "sd-cpp-merged": (4096, 1, 2, 2)}.get(layout, (256, 16, 1, 2, 2))
    for weight in weights:
        assert torch.equal(decoded_by_gguf_py(stored[prefix + weight.name]).reshape(weight.shape), weight.decoded())


def test_sd_cpp_quantises_modulation_and_norms():
    types = {weight.name: weight.type_name for weight in wan_weights(T2V, "Q3_K", "stable-diffusion.cpp")}
    quantised = ("head.modulation", "blocks.0.modulation", "blocks.0.self_attn.norm_q.weight", "head.head.weight")
    assert {types[name] for name in quantised} == {"Q3_K"}
    assert {types[name] for name in ("patch_embedding.weight", "text_embedding.0.weight", "head.head.bias")} == {"F16"}


def test_override_of_a_five_dimensional_weight(tmp_path):
    weights = wan_weights(T2V, "Q5_K", overrides={"patch_embedding.weight": "Q8_0"})
    path = write_wan_gguf(tmp_path / "wan.gguf", weights, "Q5_K", LAYOUTS["orig-shape"])
    info = GGUFFile(path).tensors["patch_embedding.weight"]
    assert (info.type_name, info.original_shape) == ("Q8_0", (256, 16, 1, 2, 2))
    stored = next(tensor for tensor in read_by_gguf_py(path).tensors if tensor.name == "patch_embedding.weight")
    assert torch.equal(weights[0].decoded(), decoded_by_gguf_py(stored).reshape(256, 16, 1, 2, 2))


# Text encoders


@pytest.mark.parametrize("name", ENCODERS)
def test_encoder_names_are_llama_cpps(name):
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, ENCODERS[name].layers)
    for ours in encoder_tensors(ENCODERS[name]):
        assert table.get_name(transformers_name(ours), try_suffixes=(".weight",)) == ours


def test_relative_bias_is_in_every_block_of_umt5_only():
    biases = {
        name: [tensor for tensor in encoder_tensors(shape) if "rel_b" in tensor] for name, shape in ENCODERS.items()
    }
    assert len(biases["umt5-2-layers"]) == 2 and len(biases["t5"]) == 1


@pytest.mark.parametrize("name", ["umt5", "t5"])
def test_encoder_file_against_gguf_py_and_reference(tmp_path, name):
    shape = ENCODERS[name]
    weights = encoder_weights(shape, "Q5_K_M")
    path = write_encoder_gguf(tmp_path / "encoder.gguf", shape, weights, "Q5_K_M")
    reader = read_by_gguf_py(path)
    expected = {
        "general.architecture": "t5encoder",
        "general.file_type": gguf.LlamaFileType.MOSTLY_Q5_K_M,
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        "t5encoder.embedding_length": 4096,
        "t5encoder.block_count": shape.layers,
        "t5encoder.feed_forward_length": 512,
        "t5encoder.attention.head_count": 4,
        "t5encoder.attention.key_length": 64,
        "t5encoder.attention.relative_buckets_count": 32,
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 3 if name == "umt5" else 2,
        "tokenizer.ggml.add_space_prefix": True,
        "tokenizer.ggml.remove_extra_whitespaces": True,
        "tokenizer.ggml.add_eos_token": True,
    }
    assert {key: reader.get_field(key).contents() for key in expected} == expected
    assert (reader.get_field("tokenizer.ggml.bos_token_id") is None) == (name == "t5")
    reference = load_file(write_encoder_reference(tmp_path / "encoder.safetensors", shape, weights))
    for tensor in reader.tensors:
        assert torch.equal(reference[transformers_name(tensor.name)], decoded_by_gguf_py(tensor))
    assert reference["spiece_model"].numpy().tobytes() == encoder_tokenizer(shape)


MORE_BITS = [0, 1, 2, 5, 8, 11, 14, 17, 20, 21, 22, 23]


@pytest.mark.parametrize(
    ("recipe", "base", "values", "downs"),
    [
        ("Q3_K_M", "Q3_K", ["Q5_K"] * 2 + ["Q4_K"] * 22, ["Q5_K"] + ["Q4_K"] * 23),
        ("Q5_K_M", "Q5_K", *[["Q6_K" if layer in MORE_BITS else "Q5_K" for layer in range(24)]] * 2),
    ],
)
def test_encoder_mixes_are_llama_cpps(recipe, base, values, downs):
    types = encoder_types(encoder_tensors(UMT5_XXL), recipe)

    def of(part):
        return [types[f"enc.blk.{layer}.{part}.weight"] for layer in range(24)]

    assert of("attn_v") == values and of("ffn_down") == downs
    assert all(of(part) == [base] * 24 for part in ("attn_q", "attn_k", "attn_o", "ffn_gate", "ffn_up"))
    assert types["token_embd.weight"] == "Q6_K"
    assert of("attn_rel_b") == ["F16"] * 24 and of("attn_norm") == ["F32"] * 24


@pytest.mark.parametrize("kind", [UMT5, T5], ids=["umt5", "t5"])
def test_vocabulary_gives_the_same_tokens_as_the_original_model(tmp_path, kind):
    shape = ENCODERS["umt5" if kind is UMT5 else "t5"]
    path = write_encoder_gguf(tmp_path / "encoder.gguf", shape, encoder_weights(shape, "Q3_K"), "Q3_K")
    rebuilt = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model(GGUFFile(path).metadata))
    original = sentencepiece.SentencePieceProcessor(model_proto=encoder_tokenizer(shape))
    assert (original.pad_id(), original.eos_id(), original.bos_id(), original.unk_id()) == (
        kind.pad,
        kind.eos,
        kind.bos,
        kind.unknown,
    )
    assert original.get_piece_size() == shape.pieces < rebuilt.get_piece_size() == shape.rows
    for text in TEXTS:
        assert rebuilt.encode(text, add_eos=True) == original.encode(text, add_eos=True), text
    assert (original.unk_id() in original.encode("🦊")) == (kind is T5)
    assert "▁fox" in original.encode("a fox", out_type=str)


def test_vocabulary_is_padded_with_unused_tokens():
    made = vocabulary(train(2944), 3072)
    assert len(made.tokens) == len(made.scores) == len(made.types) == 3072
    assert made.tokens[:5] == ["<pad>", "</s>", "<s>", "<unk>", "<0x00>"] and made.types[:5] == [3, 3, 3, 2, 6]
    assert made.tokens[-1] == "[PAD3071]" and set(made.types[2944:]) == {5} and set(made.scores[2944:]) == {-10000.0}
    assert len(made.charsmap) > 100_000


# VAE, LoRAs


def test_vae_has_cores_width_and_is_repeatable(tmp_path):
    path = write_vae(tmp_path / "vae.safetensors")
    tensors = load_file(path)
    assert tensors["decoder.head.0.gamma"].shape == (8, 1, 1, 1)
    assert sum(prod(shape) for shape in vae_tensors(96).values()) == 126_892_531
    assert write_vae(tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    assert write_vae(tmp_path / "other.safetensors", seed=1).read_bytes() != path.read_bytes()


def test_lora_keys_are_as_published():
    names = set(wan_lora(T2V, "lora"))
    assert "diffusion_model.blocks.0.self_attn.q.lora_down.weight" in names and len(names) == 60
    assert "lora_unet__blocks_0_cross_attn_k.lora_down.weight" in wan_lora(T2V, "lora", key_style="videox-fun")
    for adapter in ADAPTERS:
        first, again = wan_lora(T2V, adapter), wan_lora(T2V, adapter)
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert all(tensor.isfinite().all() for tensor in first.values())


# Full size


@pytest.mark.parametrize(
    ("variant", "recipe", "tensors", "gigabytes"),
    [
        ("wan2.1-t2v-14b", "Q3_K_M", 1095, 7.18),
        ("wan2.2-i2v-a14b-high", "Q5_K_M", 1095, 10.8),
        ("wan2.1-t2v-1.3b", "Q5_K_M", 825, 1.09),
        ("wan2.2-ti2v-5b", "Q5_K_M", 825, 3.82),
    ],
)
def test_sparse_wan_has_the_published_size(tmp_path, variant, recipe, tensors, gigabytes):
    path = write_full_size_wan(tmp_path / "wan.gguf", variant, recipe)
    assert path.stat().st_size == pytest.approx(gigabytes * 1e9, rel=0.01)
    assert path.stat().st_blocks * 512 < 4e6
    file = GGUFFile(path)
    assert len(file.tensors) == tensors
    assert {name: info.shape for name, info in file.tensors.items()} == wan_tensors(wan_shape(variant, full_size=True))
    last = max(file.tensors.values(), key=lambda info: info.offset)
    assert last.offset + last.nbytes <= path.stat().st_size < last.offset + last.nbytes + 32
    assert not file.raw("head.head.weight").any()


def test_plain_q3_k_of_14b_is_6_gigabytes(tmp_path):
    path = write_full_size_wan(tmp_path / "wan.gguf", "wan2.1-t2v-14b", "Q3_K")
    assert path.stat().st_size > 6e9


def test_shared_wan_has_every_tensor_in_a_short_file(tmp_path):
    path = write_full_size_wan(tmp_path / "wan.gguf", "wan2.1-t2v-14b", "Q3_K_M", "shared")
    assert path.stat().st_size < 500e6 and path.stat().st_blocks * 512 < 4e6
    file = GGUFFile(path)
    assert len(file.tensors) == 1095
    assert len({info.offset for info in file.tensors.values()}) == len({i.type_name for i in file.tensors.values()})
    for info in file.tensors.values():
        assert info.offset + info.nbytes <= path.stat().st_size


@pytest.mark.parametrize("kind", ["sparse", "shared"])
def test_full_size_encoder(tmp_path, kind):
    path = write_full_size_encoder(tmp_path / "umt5.gguf", "Q5_K_M", kind)
    if kind == "sparse":
        assert path.stat().st_size == pytest.approx(4.15e9, rel=0.01)
    assert path.stat().st_blocks * 512 < 16e6
    file = GGUFFile(path)
    assert file.tensors["token_embd.weight"].shape == (256_384, 4096)
    assert len(file.tensors) == 24 * 10 + 2
    tokens = file.metadata["tokenizer.ggml.tokens"]
    assert len(tokens) == len(set(tokens)) == 256_384
    assert tokens[3] == "<unk>" and tokens[4] == "<0x00>" and tokens[-1] == "[PAD256383]"


def test_unknown_kind_of_full_size_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="sparse or shared"):
        write_full_size_wan(tmp_path / "wan.gguf", T2V, "Q3_K_M", "dense")
    assert os.listdir(tmp_path) == []


def test_sizes_are_the_published_ones():
    assert {name: (size.dim, size.ffn_dim, size.heads, size.layers) for name, size in SIZES.items()} == {
        "1.3b": (1536, 8960, 12, 30),
        "5b": (3072, 14336, 24, 30),
        "14b": (5120, 13824, 40, 40),
    }
    assert GGMLQuantizationType["Q5_K"] == FORMATS["Q5_K"].type_id
