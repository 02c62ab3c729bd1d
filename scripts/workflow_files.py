"""The model files that the workflows name: where they go, where they come from, how large they are.

Names and folders are those under which the files are published; sizes are the published ones, in 10^9 bytes.
"""

from __future__ import annotations

from typing import NamedTuple

HUB = "https://huggingface.co"
COMFY_21 = f"{HUB}/Comfy-Org/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files"
COMFY_22 = f"{HUB}/Comfy-Org/Wan_2.2_ComfyUI_Repackaged/resolve/main/split_files"


class ModelFile(NamedTuple):
    """Folder below models/, address, and size in GB."""

    directory: str
    url: str
    gigabytes: float


def _file(directory: str, url: str, gigabytes: float) -> tuple[str, ModelFile]:
    return url.rsplit("/", 1)[1], ModelFile(directory, url, gigabytes)


def _quantised(repository: str, name: str, sizes: dict[str, float], directory: str) -> list[tuple[str, ModelFile]]:
    return [
        _file(directory, f"{HUB}/{repository}/resolve/main/{name}-{kind}.gguf", size) for kind, size in sizes.items()
    ]


A14B = {"Q3_K_M": 7.2, "Q4_K_M": 9.7, "Q5_K_M": 10.8, "Q6_K": 12.0, "Q8_0": 15.4}
SPEED_LORAS = {
    "t2v": "wan2.2_t2v_lightx2v_4steps_lora_v1.1",
    "i2v": "wan2.2_i2v_lightx2v_4steps_lora_v1",
}

FILES: dict[str, ModelFile] = dict(
    [
        *_quantised(
            "samuelchristlie/Wan2.1-T2V-1.3B-GGUF",
            "Wan2.1-T2V-1.3B",
            {"Q5_K_M": 1.1, "Q8_0": 1.5},
            "diffusion_models",
        ),
        *_quantised(
            "QuantStack/Wan2.2-TI2V-5B-GGUF",
            "Wan2.2-TI2V-5B",
            {"Q4_K_M": 3.4, "Q5_K_M": 3.8, "Q8_0": 5.4},
            "diffusion_models",
        ),
        *(
            entry
            for task in ("T2V", "I2V")
            for noise in ("HighNoise", "LowNoise")
            for entry in _quantised(
                f"QuantStack/Wan2.2-{task}-A14B-GGUF",
                f"{noise}/Wan2.2-{task}-A14B-{noise}",
                A14B,
                "diffusion_models",
            )
        ),
        *_quantised(
            "city96/umt5-xxl-encoder-gguf",
            "umt5-xxl-encoder",
            {"Q5_K_M": 4.1, "Q8_0": 6.0},
            "text_encoders",
        ),
        _file("vae", f"{COMFY_21}/vae/wan_2.1_vae.safetensors", 0.25),
        _file("vae", f"{COMFY_22}/vae/wan2.2_vae.safetensors", 1.4),
        *(
            _file("loras", f"{COMFY_22}/loras/{stem}_{noise}_noise.safetensors", 1.2)
            for stem in SPEED_LORAS.values()
            for noise in ("high", "low")
        ),
    ]
)
"""File name -> ModelFile."""
