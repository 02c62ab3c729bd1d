"""scripts/plan_memory.py on full-size files that are holes."""

import json

import plan_memory
import pytest
import torch
from safetensors.torch import save_file
from small_models import write_full_size_encoder, write_full_size_wan, write_vae


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for recipe in ("Q3_K_M", "Q8_0"):
        for noise in ("High", "Low"):
            write_full_size_wan(folder / f"Wan2.2-A14B-{noise}Noise-{recipe}.gguf", "wan2.2-t2v-a14b-high", recipe)
    write_full_size_encoder(folder / "umt5-Q5_K_M.gguf", "Q5_K_M")
    write_vae(folder / "vae.safetensors", 8)
    save_file({"a.lora_up.weight": torch.zeros(4, 4)}, folder / "lora.safetensors")
    return folder


def run(files, *more, recipe="Q3_K_M"):
    high, low = (files / f"Wan2.2-A14B-{noise}Noise-{recipe}.gguf" for noise in ("High", "Low"))
    arguments = ["--model", high, "--model-low", low, "--text-encoder", files / "umt5-Q5_K_M.gguf"]
    return plan_memory.main([*map(str, arguments), "--vae", str(files / "vae.safetensors"), *more])


def test_text(files, capsys):
    assert run(files, "--ram", "16") == 0
    text = capsys.readouterr().out
    assert "fits on a 16 GB Mac" in text
    assert all(stage in text for stage in ("text encoding", "sampling high", "sampling low", "decoding"))
    assert run(files, "--ram", "16", "--width", "1280", "--height", "720", "--frames", "97") == 1
    text = capsys.readouterr().out
    assert "fits with swap risk on a 16 GB Mac" in text and "What would fit, nearest first:" in text


def test_guidance(files, capsys):
    found = []
    for more in ((), ("--cfg", "1"), ("--batched",), ("--no-batched",)):
        run(files, "--ram", "64", "--json", *more)
        found.append(json.loads(capsys.readouterr().out)["cfg"])
    assert found == ["apart", "none", "batched", "apart"]


def test_loras_add_up(files, capsys):
    weights = []
    for loras in ((), ("--lora", files / "lora.safetensors") * 2):
        run(files, "--ram", "64", "--json", *map(str, loras))
        weights.append(json.loads(capsys.readouterr().out)["stages"][1]["weights"])
    assert weights[1] - weights[0] == 2 * 64  # bytes of one


def test_json_and_proposals(files, capsys):
    assert run(files, "--ram", "16", "--json", recipe="Q8_0") == 2
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] == "does not fit"
    assert found["proposals"][0]["changes"] == {"quantisation": "Q3_K_M"}
    assert found["proposals"][0]["plan"]["verdict"] == "fits"


def test_macs_and_picture(files, capsys, tmp_path):
    assert run(files, "--ram", "64", "--macs") == 0
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 14 and "does not fit" in table[1] and table[-1].startswith("512 GB")
    assert run(files, "--ram", "8", "--macs") == 2
    for ram, status in (("64", 0), ("8", 2)):
        assert run(files, "--ram", ram, "--picture", str(tmp_path / f"{ram}.png")) == status
        assert (tmp_path / f"{ram}.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--frames", "80"), "80 frames are not 4n + 1"),
        (("--lora", "missing.safetensors"), "missing.safetensors is missing"),
        (("--lora", "{lora}", "--lora", "second.safetensors"), "second.safetensors is missing"),
        (("--torch", "new"), "'new' is no version of torch"),
        (("--ram", "1"), "1 GB is no Mac's memory"),
    ],
)
def test_refusals(files, capsys, more, words):
    lora = str(files / "lora.safetensors")
    assert run(files, *(lora if word == "{lora}" else word for word in more)) == plan_memory.REFUSED
    error = capsys.readouterr().err.strip()
    assert words in error and "\n" not in error
