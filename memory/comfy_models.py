"""The part of giving memory back that touches ComfyUI: its loaded models, and what it keeps between runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any, Literal

from ..quantization import mapped_pages
from .release import ReleaseReport, release_memory

log = logging.getLogger(__name__)

Caches = Literal["keep", "files", "everything"]


def free_memory(
    models: bool = True, cache: bool = True, patches: bool = False, caches: Caches = "files"
) -> ReleaseReport:
    """Give back what the caller chooses; what is needed later is loaded again.

    models: take all models off their devices. cache: empty the MPS allocator's cache. patches: take patched models off
    too. caches: "files" drops the pages that were read from model files; "everything" also has ComfyUI forget the
    results of nodes once the run ends, and with them models and LoRAs that rest in RAM.
    """

    def unload() -> list[str]:
        if models or patches:
            drop_stored_weights()
        if models:
            return unload_models()
        return unload_patched_models() if patches else []

    def drop() -> list[str]:
        from .comfy_server import forget_results_after_run

        lines = []
        if caches != "keep":
            lines.append(f"Pages of model files in RAM: dropped for {mapped_pages.release_all()} files")
        if caches == "everything" and forget_results_after_run():
            lines.append("Stored results of nodes: forgotten when this run ends")
        return lines

    return release_memory(unload, cache, drop)


def unload_models(only: Any = None) -> list[str]:
    """Take every loaded model, or ``only`` that ModelPatcher's, off its device and return the models' class names.

    Core's own unload_all_models leaves models on other devices than the GPU alone, such as a patched text encoder on
    the CPU. The models stay usable: core loads them again when they are sampled next.
    """
    return _unload(lambda entry: only is None or entry.model is only)


def unload_patched_models() -> list[str]:
    """Take the loaded models that carry LoRAs or other weight patches off their devices; return their class names.

    A patch cannot leave alone: core takes the weights of a loaded model for patched until it is loaded anew.
    """
    return _unload(lambda entry: bool(entry.model.patches or entry.model.hook_patches))


def drop_stored_weights() -> None:
    """Forget the weights that loaded models keep beside their own, to switch between scheduled LoRAs."""
    for entry in _living():
        entry.model.clean_hooks()


def have_device_to_itself(patcher: Any, needed: Iterable[Any] = ()) -> None:
    """Unload everything else from MPS before ``patcher``'s model runs there; other devices are left to core.

    Core keeps models on the device while it counts enough free memory, so that two stages of a workflow would lie
    there together. Loading a model again takes seconds and a stage takes minutes, so every other model leaves, whatever
    the memory: the peak of a run is then that of one stage, on every Mac. needed: ModelPatchers that run with this one,
    beside those that it names itself; clones are the same model.
    """
    if patcher.load_device.type != "mps":
        return
    wanted = [patcher, *needed, *patcher.model_patches_models(), *patcher.get_nested_additional_models()]
    keep_on_mps(*(each.model for each in wanted))


def keep_on_mps(*models: Any) -> None:
    """Unload every model but these (modules, not patchers) from MPS; the first one is what the room is for."""
    kept = {id(model) for model in models}
    unloaded = _unload(lambda entry: entry.device.type == "mps" and id(entry.model.model) not in kept)
    if unloaded:
        release_memory()
        log.info("Unloaded to make room for %s: %s.", type(models[0]).__name__, ", ".join(unloaded))


def loaded_models() -> list[tuple[str, str, int]]:
    """(class name, device, bytes on it) of every model that ComfyUI has loaded."""
    return [(_name(entry), str(entry.device), int(entry.model_loaded_memory())) for entry in _living()]


def _living() -> list[Any]:
    import comfy.model_management as management

    return [entry for entry in management.current_loaded_models if entry.model is not None]


def _name(entry: Any) -> str:
    return type(entry.model.model).__name__


def _unload(wanted: Callable[[Any], bool]) -> list[str]:
    import comfy.model_management as management

    living = _living()
    leaving = [entry for entry in living if wanted(entry)]
    kept = [entry for entry in living if entry not in leaving]
    names = [_name(entry) for entry in leaving]
    devices = {entry.device for entry in leaving}
    del living, leaving
    for device in devices:
        management.free_memory(1e30, device, keep_loaded=kept)
    management.cleanup_models()
    return names
