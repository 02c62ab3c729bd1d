"""Paths as people enter them, and the files of the input folder: what the video nodes share."""

from __future__ import annotations

import os
from pathlib import Path


def input_videos() -> list[str]:
    """Videos, GIF and WebP files in the input folder."""
    import folder_paths

    folder = folder_paths.get_input_directory()
    files = [name for name in os.listdir(folder) if os.path.isfile(os.path.join(folder, name))]
    moving = [name for name in files if name.lower().endswith((".gif", ".webp"))]
    return sorted({*folder_paths.filter_files_content_types(files, ["video"]), *moving})


def find(path: str) -> Path:
    """A path as entered: absolute, or in the input, output or temporary folder."""
    import folder_paths

    entered = Path(path.strip().strip('"')).expanduser()
    if entered.is_absolute():
        return entered
    folders = (
        folder_paths.get_input_directory(),
        folder_paths.get_output_directory(),
        folder_paths.get_temp_directory(),
    )
    places = [Path(folder, entered) for folder in folders]
    return next((place for place in places if place.exists()), places[0])


def sequence_path(path: str) -> Path:
    """The same for a pattern: the first place whose folder has a match."""
    import folder_paths

    entered = Path(path.strip().strip('"')).expanduser()
    if entered.is_absolute() or find(path).exists():
        return find(path)
    folders = (
        folder_paths.get_input_directory(),
        folder_paths.get_output_directory(),
        folder_paths.get_temp_directory(),
    )
    places = [Path(folder, entered) for folder in folders]
    return next((place for place in places if place.parent.is_dir()), places[0])


def path_problem(path: str) -> str | None:
    """Why a path cannot be used; an empty one is left to the node, since a video may be connected."""
    if not (path or "").strip():
        return None
    found = find(path)
    if found.is_dir():
        return f"{found} is a folder; enter a video file."
    if not found.exists():
        return f"{path} does not exist; enter an absolute path, or a name in the input or output folder."
    return None


def file_fingerprint(path: Path) -> str:
    """Changes when the file does; without its name, since ComfyUI stores the value in what it saves."""
    try:
        stat = path.stat()
    except OSError:
        return "missing"
    return f"{stat.st_size} {stat.st_mtime_ns}"
