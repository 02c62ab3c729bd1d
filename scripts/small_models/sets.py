"""Sets of model files in ComfyUI's folder layout, and the manifest that names them by role.

"demo" is what scripts/demo.sh runs on, "test" adds every variant, type, layout and adapter, "full-size" holds sparse
files of the published sizes. A folder holds one set; its manifest carries a hash of the maker's sources, so that an
unchanged set is not made again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

from .full_size import write_full_size_encoder, write_full_size_wan
from .loras import ADAPTERS, encoder_lora, published_lora, wan_lora
from .text_encoders import (
    ENCODERS,
    encoder_tokenizer,
    encoder_weights,
    write_encoder_gguf,
    write_encoder_reference,
)
from .vae import write_vae
from .wan import LAYOUTS, wan_weights, write_wan_gguf, write_wan_reference
from .wan_shapes import VARIANTS
from .weights import Weight, write_safetensors

ROOT = Path(__file__).resolve().parents[2]
MANIFEST = "manifest.json"
_SOURCES = (
    "scripts/make_small_models.py",
    "scripts/small_models/*.py",
    "quantization/formats.py",
    "quantization/block_*.py",
    "quantization/*_quants.py",
    "quantization/data/*",
    "quantization/gguf_layout.py",
    "quantization/gguf_writer.py",
    "quantization/recipes.py",
)


@dataclass(frozen=True)
class ModelFile:
    """One file of a set: what it is for, its folder among ComfyUI's models, its name, and what writes it."""

    role: str
    folder: str
    name: str
    write: Callable[[Path], object]


_ENCODER_RECIPE = "Q5_K_M"
_T2V, _I2V = "wan2.1-t2v-1.3b", ("wan2.2-i2v-a14b-high", "wan2.2-i2v-a14b-low")
_A14B = ("wan2.2-t2v-a14b-high", "wan2.2-t2v-a14b-low", *_I2V)
_MIXES = ("Q3_K_M", "Q5_K_M")
_PLAIN_TYPES = ("Q3_K", "Q5_K", "Q8_0", "Q4_0", "Q2_K", "Q6_K", "IQ4_XS", "IQ3_S", "F16", "BF16")


@lru_cache(maxsize=8)
def _wan(variant: str, recipe: str, tool: str = "ComfyUI-GGUF") -> list[Weight]:
    return wan_weights(variant, recipe, tool)


@lru_cache(maxsize=2)
def _encoder(name: str, recipe: str) -> list[Weight]:
    return encoder_weights(ENCODERS[name], recipe)


def _wan_file(variant: str, recipe: str, layout: str = "plain") -> ModelFile:
    chosen = LAYOUTS[layout]
    label = f"{variant}-{recipe}" + ("" if layout == "plain" else f"-{layout}")

    def write(path: Path) -> object:
        return write_wan_gguf(path, _wan(variant, recipe, chosen.tool), recipe, chosen)

    return ModelFile(label, "diffusion_models", f"small-{label}.gguf", write)


def _wan_reference(variant: str, recipe: str) -> ModelFile:
    label = f"{variant}-{recipe}-decoded"
    return ModelFile(
        label,
        "diffusion_models",
        f"small-{label}.safetensors",
        lambda path: write_wan_reference(path, _wan(variant, recipe)),
    )


def _encoder_file(name: str, recipe: str) -> ModelFile:
    label = f"{name}-{recipe}"
    return ModelFile(
        label,
        "text_encoders",
        f"small-{label}.gguf",
        lambda path: write_encoder_gguf(path, ENCODERS[name], _encoder(name, recipe), recipe),
    )


def _encoder_reference(name: str, recipe: str) -> ModelFile:
    label = f"{name}-{recipe}-decoded"
    return ModelFile(
        label,
        "text_encoders",
        f"small-{label}.safetensors",
        lambda path: write_encoder_reference(path, ENCODERS[name], _encoder(name, recipe)),
    )


def _tokenizer_file(name: str) -> ModelFile:
    label = f"{name}-tokenizer"
    return ModelFile(
        label,
        "text_encoders",
        f"small-{name}.spiece.model",
        lambda path: path.write_bytes(encoder_tokenizer(ENCODERS[name])),
    )


def _lora_file(label: str, tensors: Callable[[], dict]) -> ModelFile:
    return ModelFile(label, "loras", f"small-{label}.safetensors", lambda path: write_safetensors(path, tensors()))


def _demo_files() -> Iterator[ModelFile]:
    for variant in (_T2V, *_A14B):
        yield _wan_file(variant, "Q5_K_M")
    for variant in _A14B:
        yield _lora_file(f"{variant}-published", partial(published_lora, variant))
    yield _encoder_file("umt5", _ENCODER_RECIPE)
    yield ModelFile("vae", "vae", "small-wan2.1-vae.safetensors", write_vae)


def _test_files() -> Iterator[ModelFile]:
    yield from _demo_files()
    for variant in VARIANTS:
        if variant not in (_T2V, *_A14B):
            yield _wan_file(variant, "Q5_K_M")
    for variant in (_T2V, *_I2V):
        yield _wan_file(variant, "Q3_K_M")
        for recipe in _MIXES:
            yield _wan_reference(variant, recipe)
    for recipe in _PLAIN_TYPES:
        yield _wan_file(_T2V, recipe)
    for layout in LAYOUTS:
        if layout != "plain":
            yield _wan_file(_T2V, "Q5_K", layout)
    yield _encoder_file("umt5", "Q3_K_M")
    yield _encoder_file("umt5-2-layers", _ENCODER_RECIPE)
    yield _encoder_file("t5", _ENCODER_RECIPE)
    for recipe in _MIXES:
        yield _encoder_reference("umt5", recipe)
    yield _tokenizer_file("umt5")
    yield _tokenizer_file("t5")
    yield from _test_loras()


def _test_loras() -> Iterator[ModelFile]:
    yield _lora_file(f"{_T2V}-published", partial(published_lora, _T2V))
    for adapter in ADAPTERS:
        modules = ["blocks.0.self_attn.norm_q", "blocks.1.norm3"] if adapter == "w-norm" else None
        yield _lora_file(f"{_T2V}-{adapter}", partial(wan_lora, _T2V, adapter, modules))
    for style in ("kohya", "videox-fun"):
        yield _lora_file(f"{_T2V}-lora-{style}", partial(wan_lora, _T2V, "lora", None, style))
    yield _lora_file("umt5-lora", partial(encoder_lora, ENCODERS["umt5"]))


def _full_size_files() -> Iterator[ModelFile]:
    wan = (
        ("wan2.1-t2v-14b", "Q3_K_M", "sparse"),
        ("wan2.1-t2v-14b", "Q3_K_M", "shared"),
        ("wan2.1-t2v-1.3b", "Q5_K_M", "sparse"),
        ("wan2.2-ti2v-5b", "Q5_K_M", "sparse"),
        ("wan2.2-i2v-a14b-high", "Q5_K_M", "sparse"),
        ("wan2.2-i2v-a14b-low", "Q5_K_M", "sparse"),
    )
    for variant, recipe, kind in wan:
        label = f"{variant}-{recipe}-{kind}"
        yield ModelFile(
            label,
            "diffusion_models",
            f"full-size-{label}.gguf",
            partial(write_full_size_wan, variant=variant, recipe=recipe, kind=kind),
        )
    for kind in ("sparse", "shared"):
        yield ModelFile(
            f"umt5-xxl-Q5_K_M-{kind}",
            "text_encoders",
            f"full-size-umt5-xxl-Q5_K_M-{kind}.gguf",
            partial(write_full_size_encoder, recipe="Q5_K_M", kind=kind),
        )


SETS: dict[str, Callable[[], Iterator[ModelFile]]] = {
    "demo": _demo_files,
    "test": _test_files,
    "full-size": _full_size_files,
}

# Which file of the demo stands for which model of a workflow: role in the workflow (demo.role_of) -> role here.
SUBSTITUTIONS = {
    "diffusion_model_t2v": f"{_T2V}-Q5_K_M",
    **{
        f"diffusion_model_{task}_{expert}": f"wan2.2-{task}-a14b-{expert}-Q5_K_M"
        for task in ("t2v", "i2v")
        for expert in ("high", "low")
    },
    **{
        f"lora_{task}_{expert}": f"wan2.2-{task}-a14b-{expert}-published"
        for task in ("t2v", "i2v")
        for expert in ("high", "low")
    },
    "text_encoder": f"umt5-{_ENCODER_RECIPE}",
    "vae": "vae",
}


def sources_hash() -> str:
    """SHA-256 over everything that decides the files' bytes."""
    digest = hashlib.sha256()
    for pattern in _SOURCES:
        for path in sorted(ROOT.glob(pattern)):
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def make_set(name: str, folder: Path, report: Callable[[str], object] = lambda line: None) -> dict:
    """Make a set of files below ``folder`` unless it is there already.

    Args:
        name: "demo", "test" or "full-size".
        folder: gets diffusion_models, text_encoders, vae, loras and manifest.json.
        report: called with one line for each file made.

    Returns:
        The manifest: "set", "sources" (hash), "files" (role to path below ``folder``), "sizes" (path to bytes) and,
        "substitutions" (a model's role in a workflow to the file's name as a loader lists it).
    """
    files = list(SETS[name]())
    sources = sources_hash()
    manifest = _read_manifest(folder)
    if manifest is not None and _is_current(manifest, name, sources, folder):
        return manifest
    (folder / MANIFEST).unlink(missing_ok=True)
    paths = {file.role: Path(file.folder, file.name) for file in files}
    for file in files:
        path = folder / paths[file.role]
        path.parent.mkdir(parents=True, exist_ok=True)
        file.write(path)
        report(f"{paths[file.role]} ({path.stat().st_size / 1e6:.1f} MB)")
    manifest = {
        "set": name,
        "sources": sources,
        "files": {role: path.as_posix() for role, path in paths.items()},
        "sizes": {path.as_posix(): (folder / path).stat().st_size for path in paths.values()},
        "substitutions": {role: paths[ours].name for role, ours in SUBSTITUTIONS.items() if ours in paths},
    }
    beside = folder / f".{MANIFEST}.part"
    beside.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    beside.replace(folder / MANIFEST)
    return manifest


def _read_manifest(folder: Path) -> dict | None:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) else None


def _is_current(manifest: dict, name: str, sources: str, folder: Path) -> bool:
    if manifest.get("set") != name or manifest.get("sources") != sources:
        return False
    sizes: dict[str, int] = manifest.get("sizes", {})
    return all((folder / path).is_file() and (folder / path).stat().st_size == size for path, size in sizes.items())
