"""The part of giving memory back that touches ComfyUI: its list of loaded models."""

from __future__ import annotations

from typing import Any


def unload_models(only: Any = None) -> list[str]:
    """Take every loaded model, or ``only`` that ModelPatcher's, off its device and return the models' class names.

    Core's own unload_all_models leaves models on other devices than the GPU alone, such as a patched text encoder on
    the CPU. The models stay usable: core loads them again when they are sampled next.
    """
    import comfy.model_management as management

    living = [entry for entry in management.current_loaded_models if entry.model is not None]
    loaded = [entry for entry in living if only is None or entry.model is only]
    kept = [entry for entry in living if entry not in loaded]
    names = [type(entry.model.model).__name__ for entry in loaded]
    devices = {entry.device for entry in loaded}
    del living, loaded
    for device in devices:
        management.free_memory(1e30, device, keep_loaded=kept)
    management.cleanup_models()
    return names


def loaded_models() -> list[tuple[str, str, int]]:
    """(class name, device, bytes on it) of every model that ComfyUI has loaded."""
    import comfy.model_management as management

    living = [entry for entry in management.current_loaded_models if entry.model is not None]
    return [(type(entry.model.model).__name__, str(entry.device), int(entry.model_loaded_memory())) for entry in living]
