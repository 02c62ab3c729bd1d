"""Where tests of this folder take ComfyUI's own modules from: $COMFYUI_DIR, or the newest tree that is pinned."""

import os


def folder():
    """The ComfyUI tree's path, for sys.path; child processes find it in $COMFYUI_DIR."""
    if os.environ.get("COMFYUI_DIR") is None:
        import fetch_comfyui

        os.environ["COMFYUI_DIR"] = str(fetch_comfyui.fetch())
    return os.environ["COMFYUI_DIR"]
