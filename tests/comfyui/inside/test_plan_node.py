"""Plan Memory as a node of a real ComfyUI, with full-size files that are holes."""

import asyncio

import pytest
import torch
from apple_silicon_video import comfy_entrypoint
from apple_silicon_video.memory import plan
from apple_silicon_video.mps_patches import attention
from apple_silicon_video.nodes import plan_memory
from safetensors.torch import save_file
from small_models import write_full_size_encoder, write_full_size_wan, write_vae

HIGH, LOW = "Wan2.2-HighNoise-{}.gguf", "Wan2.2-LowNoise-{}.gguf"
VIDEO = {"width": 832, "height": 480, "frames": 81}


@pytest.fixture
def node(model_folders):
    """The node as the executor calls it, with two quantisations of both experts in ComfyUI's folders."""
    for recipe in ("Q3_K_M", "Q8_0"):
        for name in (HIGH, LOW):
            write_full_size_wan(model_folders["diffusion_models"] / name.format(recipe), "wan2.2-t2v-a14b-high", recipe)
    write_full_size_encoder(model_folders["text_encoders"] / "umt5-Q5_K_M.gguf", "Q5_K_M")
    write_vae(model_folders["vae"] / "vae.safetensors")
    extension = asyncio.run(comfy_entrypoint())
    asyncio.run(extension.on_load())
    pack = {node.GET_SCHEMA().node_id: node for node in asyncio.run(extension.get_node_list())}
    return pack["MPSPlanMemory"].PREPARE_CLASS_CLONE(None)


def run(node, recipe, **options):
    files = {"unet_name": HIGH.format(recipe), "unet_low_name": LOW.format(recipe)}
    return node.execute(**{**files, "clip_name": "umt5-Q5_K_M.gguf", "vae_name": "vae.safetensors", **VIDEO, **options})


def test_what_fits_passes_through(node):
    latent = {"samples": torch.zeros(1)}
    found, text, picture, verdict, fits = run(node, "Q3_K_M", ram_gb=16, anything=latent).result
    assert found is latent and verdict == "fits" and fits is True
    assert all(stage in text for stage in ("text encoding", "sampling high", "sampling low", "decoding", "16 GB Mac"))
    assert picture.shape[0] == 1 and picture.shape[-1] == 3 and 0 <= float(picture.min()) <= float(picture.max()) <= 1


def test_what_does_not_fit_stops_with_one_sentence(node):
    with pytest.raises(ValueError, match=r"does not fit on a 16 GB Mac: .* with Q3_K_M it would fit\.$") as refused:
        run(node, "Q8_0", ram_gb=16)
    assert str(refused.value).count(". ") == 0
    with pytest.raises(ValueError, match="does not fit on a 16 GB Mac"):
        run(node, "Q8_0", ram_gb=16, stop_if="swap risk")


def test_never_only_reports(node):
    _, text, _, verdict, fits = run(node, "Q8_0", ram_gb=16, stop_if="never").result
    assert verdict == "does not fit" and fits is False and "Q3_K_M (quantisation)" in text


def test_the_verdict_and_the_text_are_shown(node, monkeypatch):
    shown = []
    monkeypatch.setattr(plan_memory, "show_text", lambda text, node: shown.append(text))
    for ram_gb, verdict in ((16, "does not fit"), (64, "fits")):
        output = run(node, "Q8_0", ram_gb=ram_gb, stop_if="never")
        assert output.ui["verdict"] == [verdict] and len(output.ui["images"]) == 1
        assert shown.pop() == output.result[1]


def test_what_the_run_will_be_is_planned(node, model_folders, monkeypatch):
    """Guidance, LoRA, and attention as this torch has it; proposals are quantisations of both experts."""
    planned = []
    monkeypatch.setattr(plan, "plan", lambda *given, whole=plan.plan, **options: planned.append(options) or
                        whole(*given, **options))  # fmt: skip
    factors = {"up": torch.zeros(5120, 4), "down": torch.zeros(4, 5120)}
    names = {f"diffusion_model.blocks.0.self_attn.q.lora_{name}.weight": part for name, part in factors.items()}
    save_file(names, model_folders["loras"] / "lora.safetensors")
    monkeypatch.setattr(attention, "attention_version", lambda device: (2, 8))
    text = run(node, "Q8_0", stop_if="never", ram_gb=64, lora_name="lora.safetensors").result[1]
    assert "Both prompts are evaluated" in text and planned[0]["compute"].torch_version == "2.8"
    assert [lora.name for lora in planned[0]["loras"]] == ["lora.safetensors"]
    assert "Both prompts" not in run(node, "Q8_0", stop_if="never", ram_gb=64, cfg=1.0).result[1]
    (model_folders["diffusion_models"] / LOW.format("Q3_K_M")).unlink()
    assert "Q3_K_M" not in run(node, "Q8_0", stop_if="never", ram_gb=16).result[1]


def test_swap_risk_stops_only_where_asked(node):
    size = {"width": 1280, "height": 720, "frames": 97, "ram_gb": 16}
    assert run(node, "Q3_K_M", stop_if="does not fit", **size).result[3] == "swap risk"
    with pytest.raises(ValueError, match="fits with swap risk on a 16 GB Mac"):
        run(node, "Q3_K_M", stop_if="swap risk", **size)


def test_this_machine_and_wrong_inputs(node):
    assert run(node, "Q3_K_M", stop_if="never").result[3] in ("fits", "swap risk", "does not fit")
    with pytest.raises(ValueError, match=r"^80 frames are not 4n \+ 1: take 77 or 81\.$"):
        run(node, "Q3_K_M", frames=80, ram_gb=16)
    with pytest.raises(FileNotFoundError, match=r"^gone\.gguf is not in models/diffusion_models"):
        run(node, "Q3_K_M", unet_name="gone.gguf", ram_gb=16)
    with pytest.raises(FileNotFoundError, match=r"^gone\.safetensors is not in models/vae"):
        run(node, "Q3_K_M", vae_name="gone.safetensors", ram_gb=16)
