"""The part of giving memory back that touches ComfyUI: its list of loaded models."""

from __future__ import annotations


def unload_models() -> list[str]:
    """Take every loaded model off its device, on whatever device it is, and return the models' class names.

    Core's own unload_all_models leaves models on other devices than the GPU alone, such as a patched text encoder on
    the CPU. The models stay usable: core loads them again when they are sampled next.
    """
    import comfy.model_management as management

    loaded = list(management.current_loaded_models)
    names = [type(entry.model.model).__name__ for entry in loaded if entry.model is not None]
    devices = {entry.device for entry in loaded}
    del loaded
    for device in devices:
        management.free_memory(1e30, device)
    management.cleanup_models()
    return names
