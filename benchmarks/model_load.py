"""Time and resident memory to load models in a real ComfyUI, with the pack's loader and with core's.

The files have the real shapes of Wan and UMT5-XXL, but are sparse: a hole is read like any other data, and takes no
disk. A load lasts until the model is on its device, ready to sample. Core is measured where its dense copy fits a
quarter of the memory. Part of ``python benchmarks/run.py``.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from measure import PeakMemory, Row, in_own_process, main

PACK, CORE = "the pack", "core"
SMALL_WAN = "wan2.1-t2v-1.3b"
MEMORY_SHARE_FOR_CORE = 4
SMALL_SET = ("Wan 1.3B fp16",)


@dataclass(frozen=True)
class ModelFile:
    """A file to load: how it is written (full-size, and small), whether a text encoder, whether core can load it."""

    write: Callable[[Path], Any]
    write_small: Callable[[Path], Any]
    suffix: str = ".safetensors"
    encoder: bool = False
    core: bool = False


def _models() -> dict[str, ModelFile]:
    import small_models as make
    import torch

    def wan(variant: str, matrices: str) -> Callable[[Path], Any]:
        return lambda path: make.write_full_size_scaled(path, variant, matrices)

    def gguf(path: Path) -> Any:
        return make.write_full_size_wan(path, "wan2.1-t2v-14b", "Q5_K_M")

    def encoder_gguf(path: Path) -> Any:
        return make.write_full_size_encoder(path, "Q5_K_M")

    def encoder(path: Path) -> Any:
        return make.write_full_size_scaled(path, "umt5-xxl", "F8_E4M3")

    core_has_fp8 = not torch.backends.mps.is_available()
    return {
        "Wan 14B Q5_K_M": ModelFile(gguf, _small_gguf, ".gguf"),
        "Wan 14B fp8 scaled": ModelFile(wan("wan2.1-t2v-14b", "F8_E4M3"), _small_fp8, core=core_has_fp8),
        "Wan 14B fp16": ModelFile(wan("wan2.1-t2v-14b", "F16"), _small_fp16, core=True),
        "Wan 1.3B fp8 scaled": ModelFile(wan("wan2.1-t2v-1.3b", "F8_E4M3"), _small_fp8, core=core_has_fp8),
        "Wan 1.3B fp16": ModelFile(wan("wan2.1-t2v-1.3b", "F16"), _small_fp16, core=True),
        "UMT5-XXL Q5_K_M": ModelFile(encoder_gguf, _small_encoder_gguf, ".gguf", encoder=True),
        "UMT5-XXL fp8 scaled": ModelFile(encoder, _small_encoder, encoder=True),
    }


def _small_gguf(path: Path) -> None:
    import small_models as make

    make.write_wan_gguf(path, make.wan_weights(SMALL_WAN, "Q5_K_M"), "Q5_K_M")


def _small_fp16(path: Path) -> None:
    import small_models as make
    import torch

    make.write_wan_reference(path, make.wan_weights(SMALL_WAN, "F16"), torch.float16)


def _small_fp8(path: Path) -> None:
    import small_models as make

    dense = make.decoded_state_dict(make.wan_weights(SMALL_WAN, "F16"))
    make.write_scaled(path, make.scaled_model(dense, make.SCALED_LAYOUTS["marker"]))


def _small_encoder_gguf(path: Path) -> None:
    import small_models as make

    shape = make.ENCODERS["umt5"]
    make.write_encoder_gguf(path, shape, make.encoder_weights(shape, "Q5_K_M"), "Q5_K_M")


def _small_encoder(path: Path) -> None:
    import small_models as make
    import torch

    shape = make.ENCODERS["umt5"]
    dense = {make.transformers_name(weight.name): weight.decoded() for weight in make.encoder_weights(shape, "F16")}
    dense["spiece_model"] = torch.frombuffer(bytearray(make.encoder_tokenizer(shape)), dtype=torch.uint8)
    make.write_scaled(path, make.scaled_model(dense, make.SCALED_LAYOUTS["marker"]))


def _comfyui() -> None:
    """Put the ComfyUI of this pack (or $COMFYUI_DIR, or the pinned one) on the path, on the CPU where MPS is not."""
    import torch
    from fetch_comfyui import fetch, find, is_comfyui

    tree = find()
    sys.path.insert(0, str(tree if is_comfyui(tree) else fetch()))
    sys.argv = ["main.py"] if torch.backends.mps.is_available() else ["main.py", "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args


def measure(loader: str, encoder: str, file_name: str, warm_up: str) -> Row:
    """Load ``warm_up`` (imports, kernels), forget it, then load the file; ``encoder`` is "1" for a text encoder."""
    _comfyui()
    import comfy.model_management
    from _pack import load_pack

    load_pack()
    from apple_silicon_video.quantization import comfy_loader
    from apple_silicon_video.quantization.gguf import GGUFFile
    from apple_silicon_video.quantization.safetensors_file import SafetensorsFile

    path, is_encoder = Path(file_name), encoder == "1"
    load = comfy_loader.load_text_encoder if is_encoder else comfy_loader.load_diffusion_model

    def patcher_on_its_device(file: Path) -> Any:
        loaded = load(file, own_loader=loader == PACK)
        patcher = loaded.patcher if is_encoder else loaded
        comfy.model_management.load_models_gpu([patcher])
        return patcher

    warm = patcher_on_its_device(Path(warm_up))
    comfy.model_management.unload_all_models()
    del warm
    comfy.model_management.cleanup_models()
    infos = (GGUFFile(path) if path.suffix == ".gguf" else SafetensorsFile(path)).tensors.values()
    with PeakMemory() as memory:
        begin = time.perf_counter()
        patcher = patcher_on_its_device(path)
        seconds = time.perf_counter() - begin
    return {
        "seconds": seconds,
        "model_bytes": patcher.model_size(),
        "peak_bytes": memory.peak - memory.before,
        "resident_bytes": memory.after - memory.before,
        "largest_tensor_bytes": max(info.nbytes for info in infos),
    }


def run(small: bool = False) -> list[Row]:
    """A row per model and loader; ``peak_bytes`` and ``resident_bytes`` are above what was resident before."""
    rows: list[Row] = []
    most = psutil.virtual_memory().total / MEMORY_SHARE_FOR_CORE
    with tempfile.TemporaryDirectory() as folder:
        models = _models()
        for name, model in ((name, models[name]) for name in (SMALL_SET if small else models)):
            path, warm_up = (Path(folder) / f"{stem}{model.suffix}" for stem in ("model", "small"))
            (model.write_small if small else model.write)(path)
            model.write_small(warm_up)
            for loader in (PACK, *[CORE] * (model.core and path.stat().st_size < most)):
                row = in_own_process(__file__, loader, int(model.encoder), path, warm_up)
                rows.append({"model": name, "loader": loader, "file_bytes": path.stat().st_size, **row})
            path.unlink()
            warm_up.unlink()
    return rows


if __name__ == "__main__":
    main(measure, run)
