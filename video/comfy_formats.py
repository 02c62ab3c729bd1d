"""Where ComfyUI's users put video formats of their own, and the list of all formats for a menu."""

from __future__ import annotations

from pathlib import Path

import folder_paths

from .video_formats import FOLDER, VideoFormat, load_formats


def user_folder() -> Path:
    """ComfyUI's user/video_formats, which survives an update of the pack."""
    return Path(folder_paths.get_user_directory()) / "video_formats"


def formats() -> dict[str, VideoFormat]:
    """The pack's formats and the user's by name; of two with one name the user's counts."""
    return load_formats(FOLDER, user_folder())
