"""Prompts to core's CONDITIONING with the text encoder in memory only for as long as that takes."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import comfyui_version
import folder_paths

from .comfy_models import have_device_to_itself, unload_models
from .prompt_cache import PromptCache, file_fingerprint
from .release import release_memory

log = logging.getLogger(__name__)

EMBEDDING = "embedding:"  # text that names a file of its own, which the cache does not know


@dataclass(frozen=True)
class EncodedPrompts:
    """CONDITIONING of each text, in order; how many came from the disk; whether the encoder was loaded."""

    conditionings: tuple[Any, ...]
    from_cache: int
    loaded_encoder: bool


def default_cache() -> PromptCache:
    """The cache in ComfyUI's user folder."""
    return PromptCache(Path(folder_paths.get_user_directory()) / "apple-silicon-video" / "prompts")


def encode_prompts(
    texts: Sequence[str],
    encoder: Path,
    load: Callable[[], Any],
    options: dict[str, str],
    cache: PromptCache | None,
) -> EncodedPrompts:
    """CONDITIONING of each text.

    encoder: the text encoder's file. load: returns core's CLIP of it; called at most once, and only if a text is not
    in the cache. options: what else the result depends on (the encoder's type and device). cache: None keeps nothing.
    The encoder is released before the function returns, also when it fails.
    """
    found: dict[str, Any] = {}
    places: dict[str, Path] = {}
    if cache is not None:
        facts = options | {"encoder": file_fingerprint(encoder), "comfyui": comfyui_version.__version__}
        places = {text: cache.path(text=text, **facts) for text in texts if EMBEDDING not in text}
        found = {text: value for text, path in places.items() if (value := cache.get(path)) is not None}
    hits = sum(text in found for text in texts)
    missing = [text for text in dict.fromkeys(texts) if text not in found]
    if missing:
        try:
            found |= _encode(missing, load)
        finally:
            _release()
        for text in missing:
            if cache is not None and text in places:
                cache.put(places[text], found[text])
    return EncodedPrompts(tuple(found[text] for text in texts), hits, bool(missing))


def _encode(texts: list[str], load: Callable[[], Any]) -> dict[str, Any]:
    clip = load()
    have_device_to_itself(clip.patcher)
    encoded = {}
    try:
        for text in texts:
            comfy.model_management.throw_exception_if_processing_interrupted()
            encoded[text] = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    finally:
        unload_models(only=clip.patcher)
    return encoded


def _release() -> None:
    gc.collect()
    comfy.model_management.cleanup_models_gc()
    release_memory()
