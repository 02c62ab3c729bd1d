"""Writes workflows/*.json (to open) and workflows/api/*.json (for scripts) from the descriptions below.

``python scripts/build_workflows.py`` writes them; ``--check`` only compares and fails when a file differs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from workflow_graph import Graph, Node

WORKFLOWS = Path(__file__).resolve().parents[1] / "workflows"

HUGGING_FACE = "https://huggingface.co"
FILES = {
    "Wan2.1-T2V-1.3B-Q5_K_M.gguf": (
        "diffusion_models",
        f"{HUGGING_FACE}/samuelchristlie/Wan2.1-T2V-1.3B-GGUF/resolve/main/Wan2.1-T2V-1.3B-Q5_K_M.gguf",
        "1.1 GB",
    ),
    "Wan2.2-I2V-A14B-HighNoise-Q5_K_M.gguf": (
        "diffusion_models",
        f"{HUGGING_FACE}/QuantStack/Wan2.2-I2V-A14B-GGUF/resolve/main/HighNoise/Wan2.2-I2V-A14B-HighNoise-Q5_K_M.gguf",
        "10.8 GB",
    ),
    "Wan2.2-I2V-A14B-LowNoise-Q5_K_M.gguf": (
        "diffusion_models",
        f"{HUGGING_FACE}/QuantStack/Wan2.2-I2V-A14B-GGUF/resolve/main/LowNoise/Wan2.2-I2V-A14B-LowNoise-Q5_K_M.gguf",
        "10.8 GB",
    ),
    "umt5-xxl-encoder-Q5_K_M.gguf": (
        "text_encoders",
        f"{HUGGING_FACE}/city96/umt5-xxl-encoder-gguf/resolve/main/umt5-xxl-encoder-Q5_K_M.gguf",
        "4.1 GB",
    ),
    "wan_2.1_vae.safetensors": (
        "vae",
        f"{HUGGING_FACE}/Comfy-Org/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files/vae/wan_2.1_vae.safetensors",
        "0.25 GB",
    ),
}
NEGATIVE = (
    "overexposed, static, blurry details, subtitles, painting, still picture, overall grey, worst quality, "
    "low quality, JPEG artifacts, ugly, deformed, extra fingers, poorly drawn hands, poorly drawn face"
)
MODEL, CLIP, VAE = [("MODEL", "MODEL")], [("CLIP", "CLIP")], [("VAE", "VAE")]
CONDITIONING, LATENT, IMAGE = [("CONDITIONING", "CONDITIONING")], [("LATENT", "LATENT")], [("IMAGE", "IMAGE")]


def _download(name: str) -> list[dict[str, str]]:
    directory, url, _ = FILES[name]
    return [{"name": name, "url": url, "directory": directory}]


def _note(title: str, files: list[str], advice: str) -> Node:
    rows = "\n".join(f"| [{name}]({FILES[name][1]}) | {FILES[name][2]} | models/{FILES[name][0]} |" for name in files)
    text = f"## {title}\n\n| file | size | folder |\n|---|---|---|\n{rows}\n\n{advice}"
    return Node("MarkdownNote", widgets={"~text": text}, title="Read me", width=460, height=420)


def _diffusion_model(name: str, title: str | None = None) -> Node:
    widgets = {"unet_name": name, "dtype": "auto"}
    return Node("MPSLoadDiffusionModel", widgets=widgets, outputs=MODEL, models=_download(name), title=title)


def _text_encoder(name: str) -> Node:
    widgets = {"clip_name": name, "type": "wan", "device": "auto"}
    return Node("MPSLoadTextEncoder", widgets=widgets, outputs=CLIP, models=_download(name))


def _vae(name: str) -> Node:
    return Node("MPSLoadVAE", widgets={"vae_name": name, "dtype": "auto"}, outputs=VAE, models=_download(name))


def _prompt(clip: Node, text: str, title: str) -> Node:
    return Node("CLIPTextEncode", {"clip": (clip, 0)}, {"text": text}, CONDITIONING, title, height=180)


def _shift(model: Node, shift: float) -> Node:
    return Node("ModelSamplingSD3", {"model": (model, 0)}, {"shift": shift}, MODEL)


def _save(images: Node, prefix: str, fps: float) -> Node:
    widgets = {"fps": fps, "filename_prefix": prefix, "format": "h264-mp4", "quality": "standard"}
    outputs = [("video", "VIDEO"), ("path", "STRING")]
    return Node("MPSSaveVideo", {"images": (images, 0)}, widgets, outputs, width=460, height=500)


def wan21_t2v_1_3b() -> Graph:
    """Wan 2.1 text to video, 1.3B at Q5_K_M, for 16 GB."""
    unet, encoder, vae_file = (
        "Wan2.1-T2V-1.3B-Q5_K_M.gguf",
        "umt5-xxl-encoder-Q5_K_M.gguf",
        "wan_2.1_vae.safetensors",
    )
    graph = Graph()
    advice = (
        "Made for Macs with 16 GB. If memory is tight, lower *length* first (33 frames are 2 seconds), then the size. "
        "Keep the sampler on *euler*: uni_pc can garble frames on a Mac with older ComfyUI versions."
    )
    note = _note("Wan 2.1 text to video 1.3B", [unet, encoder, vae_file], advice)
    graph.column("Read me", note)
    model, clip, vae = _diffusion_model(unet), _text_encoder(encoder), _vae(vae_file)
    graph.column("1. Load", model, clip, vae)
    positive = _prompt(
        clip, "A red fox walks through fresh snow at sunrise, low camera, soft light, film grain", "Prompt"
    )
    negative = _prompt(clip, NEGATIVE, "Negative prompt")
    latent = Node(
        "EmptyHunyuanLatentVideo",
        {},
        {"width": 832, "height": 480, "length": 49, "batch_size": 1},
        LATENT,
        "Size and length",
    )
    graph.column("2. Prompt", positive, negative, latent)
    shift = _shift(model, 8.0)
    links = {
        "model": (shift, 0),
        "positive": (positive, 0),
        "negative": (negative, 0),
        "latent_image": (latent, 0),
    }
    widgets = {
        "seed": 42,
        "~control_after_generate": "fixed",
        "steps": 25,
        "cfg": 6.0,
        "sampler_name": "euler",
        "scheduler": "simple",
        "denoise": 1.0,
    }
    sampler = Node("KSampler", links, widgets, LATENT)
    graph.column("3. Sample", shift, sampler)
    decode = Node("VAEDecode", {"samples": (sampler, 0), "vae": (vae, 0)}, {}, IMAGE)
    graph.column("4. Decode and save", decode, _save(decode, "video/wan2.1_t2v", 16.0))
    return graph


def wan22_i2v_a14b() -> Graph:
    """Wan 2.2 image to video, A14B high and low noise experts at Q5_K_M, for 64 GB."""
    high_file, low_file = "Wan2.2-I2V-A14B-HighNoise-Q5_K_M.gguf", "Wan2.2-I2V-A14B-LowNoise-Q5_K_M.gguf"
    encoder, vae_file = "umt5-xxl-encoder-Q5_K_M.gguf", "wan_2.1_vae.safetensors"
    graph = Graph()
    advice = (
        "Made for Macs with 64 GB. The high-noise expert makes the first half of the steps, the low-noise expert the "
        "second. If memory is tight, lower *length* first (4n + 1 frames), then the size."
    )
    note = _note("Wan 2.2 image to video A14B", [high_file, low_file, encoder, vae_file], advice)
    graph.column("Read me", note)
    high, low = (
        _diffusion_model(high_file, "High-noise expert"),
        _diffusion_model(low_file, "Low-noise expert"),
    )
    clip, vae = _text_encoder(encoder), _vae(vae_file)
    graph.column("1. Load", high, low, clip, vae)
    image = Node(
        "LoadImage",
        {},
        {"image": "example.png", "~upload": "image"},
        [*IMAGE, ("MASK", "MASK")],
        "First frame",
        height=320,
    )
    positive = _prompt(clip, "The scene comes alive: gentle wind, slow camera push-in, natural motion", "Prompt")
    negative = _prompt(clip, NEGATIVE, "Negative prompt")
    links = {"positive": (positive, 0), "negative": (negative, 0), "vae": (vae, 0), "start_image": (image, 0)}
    size = {"width": 832, "height": 480, "length": 81, "batch_size": 1}
    outputs = [("positive", "CONDITIONING"), ("negative", "CONDITIONING"), ("latent", "LATENT")]
    to_video = Node("WanImageToVideo", links, size, outputs, "Size and length")
    graph.column("2. Prompt and image", image, positive, negative, to_video)

    def sampler(model: Node, latent: tuple[Node, int], first: bool) -> Node:
        links = {
            "model": (model, 0),
            "positive": (to_video, 0),
            "negative": (to_video, 1),
            "latent_image": latent,
        }
        widgets = {
            "add_noise": "enable" if first else "disable",
            "noise_seed": 42 if first else 0,
            "~control_after_generate": "fixed",
            "steps": 20,
            "cfg": 3.5,
            "sampler_name": "euler",
            "scheduler": "simple",
            "start_at_step": 0 if first else 10,
            "end_at_step": 10 if first else 10000,
            "return_with_leftover_noise": "enable" if first else "disable",
        }
        return Node(
            "KSamplerAdvanced",
            links,
            widgets,
            LATENT,
            "High noise: steps 0-10" if first else "Low noise: steps 10-20",
        )

    shift_high, shift_low = _shift(high, 8.0), _shift(low, 8.0)
    sampler_high = sampler(shift_high, (to_video, 2), True)
    sampler_low = sampler(shift_low, (sampler_high, 0), False)
    graph.column("3. Sample", shift_high, sampler_high, shift_low, sampler_low)
    decode = Node("VAEDecode", {"samples": (sampler_low, 0), "vae": (vae, 0)}, {}, IMAGE)
    graph.column("4. Decode and save", decode, _save(decode, "video/wan2.2_i2v", 16.0))
    return graph


TABLE: dict[str, Callable[[], Graph]] = {
    "wan2.1_t2v_1.3b_16gb": wan21_t2v_1_3b,
    "wan2.2_i2v_a14b_64gb": wan22_i2v_a14b,
}


def workflow_files() -> dict[Path, str]:
    """Path -> text of every workflow file, as it should be on disk."""
    files = {}
    for name, make in TABLE.items():
        graph = make()
        files[WORKFLOWS / f"{name}.json"] = json.dumps(graph.to_ui(), indent=2, ensure_ascii=False) + "\n"
        files[WORKFLOWS / "api" / f"{name}.json"] = json.dumps(graph.to_api(), indent=2, ensure_ascii=False) + "\n"
    return files


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare only; fail when a file differs")
    check = parser.parse_args().check
    stale = [path for path, text in workflow_files().items() if not path.is_file() or path.read_text() != text]
    if check:
        for path in stale:
            print(
                f"{path.name} is not what scripts/build_workflows.py makes: run it and commit the result.",
                file=sys.stderr,
            )
        return 1 if stale else 0
    for path, text in workflow_files().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(".partial")
        aside.write_text(text)
        os.replace(aside, path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
