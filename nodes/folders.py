"""Model folders: where the loaders look, and the ``unet_gguf`` and ``clip_gguf`` folder names.

Core lists no .gguf files. Other packs register the same two names; whoever comes first, the folders are shared.
"""

from __future__ import annotations

from pathlib import Path

import folder_paths

GGUF_FOLDERS = {"unet_gguf": "diffusion_models", "clip_gguf": "text_encoders"}


def register_gguf_folders() -> None:
    """Make .gguf files in core's folders visible under the names of ``GGUF_FOLDERS``."""
    for name, core_name in GGUF_FOLDERS.items():
        core_paths = folder_paths.folder_names_and_paths[core_name][0]
        if name not in folder_paths.folder_names_and_paths:
            folder_paths.folder_names_and_paths[name] = (core_paths, {".gguf"})
            continue
        paths, extensions = folder_paths.folder_names_and_paths[name]
        for path in core_paths:
            if path not in paths:
                paths.append(path)
        folder_paths.folder_names_and_paths[name] = (paths, {*extensions, ".gguf"})


def model_files(core_name: str) -> list[str]:
    """File names for a combo: core's list of ``core_name`` and, where GGUF is read, the .gguf files beside them."""
    return sorted({file for name in _folder_names(core_name) for file in folder_paths.get_filename_list(name)})


def model_path(core_name: str, file_name: str) -> Path:
    """Full path of a file chosen in such a combo.

    Raises:
        FileNotFoundError: it is not there (any more).
    """
    for name in _folder_names(core_name):
        path = folder_paths.get_full_path(name, file_name)
        if path is not None:
            return Path(path)
    raise FileNotFoundError(
        f"{file_name} is not in models/{core_name} (or its link is broken): put it there and press R to refresh."
    )


def _folder_names(core_name: str) -> list[str]:
    return [core_name, *(name for name, core in GGUF_FOLDERS.items() if core == core_name)]
