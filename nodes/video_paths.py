"""Paths as people enter them, and the files of the input folder: what the video nodes share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from comfy_api.latest import io

from .rerun import always, file_fingerprint


class VideoFromPath(io.ComfyNode):
    """A node that reads the video at ``path`` or, if one is connected, ``video``.

    ComfyUI asks before the run: an input that comes from another node is None then, one that does not is absent.
    """

    @classmethod
    def fingerprint_inputs(cls, path: str | None = "", video: Any = False, **options: Any) -> Any:
        if video is None:
            return ""
        if path is None:
            return always()
        return file_fingerprint(find(path)) if path.strip() else ""

    @classmethod
    def validate_inputs(cls, path: str | None = "", video: Any = False) -> bool | str:
        if video is None or path is None or not path.strip():
            return True
        found = find(path)
        if found.is_dir():
            return f"{found} is a folder; enter a video file."
        if not found.exists():
            return f"{path} does not exist; enter an absolute path, or a name in the input or output folder."
        return True


def input_videos() -> list[str]:
    """Videos, GIF and WebP files in the input folder."""
    import folder_paths

    folder = folder_paths.get_input_directory()
    files = [name for name in os.listdir(folder) if os.path.isfile(os.path.join(folder, name))]
    moving = [name for name in files if name.lower().endswith((".gif", ".webp"))]
    return sorted({*folder_paths.filter_files_content_types(files, ["video"]), *moving})


def find(path: str) -> Path:
    """A path as entered: absolute, or in the input, output or temporary folder."""
    places = _places(path)
    return next((place for place in places if place.exists()), places[0])


def sequence_path(path: str) -> Path:
    """The same for a pattern, which names no file: the first place whose folder exists."""
    found = find(path)
    if found.exists():
        return found
    places = _places(path)
    return next((place for place in places if place.parent.is_dir()), places[0])


def _places(path: str) -> list[Path]:
    """Where a path as entered may be."""
    import folder_paths

    entered = Path(path.strip().strip('"')).expanduser()
    if entered.is_absolute():
        return [entered]
    folders = (
        folder_paths.get_input_directory(),
        folder_paths.get_output_directory(),
        folder_paths.get_temp_directory(),
    )
    return [Path(folder, entered) for folder in folders]
