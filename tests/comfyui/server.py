"""Real ComfyUI servers for tests: the driver of scripts/comfyui_server.py, started from a pinned tree.

with server("0.30.0", tmp_path, models=folder) as comfy:
    outputs = comfy.run(prompt)
"""

from pathlib import Path
from typing import Any

import apple_silicon_video.tests.scripts_path  # noqa: F401

from .trees import tree

from comfyui_server import ComfyServer, PromptError, PromptInterrupted, ServerError  # isort: skip

__all__ = ["ComfyServer", "PromptError", "PromptInterrupted", "ServerError", "server"]


def server(version: str, base: Path, **options: Any) -> ComfyServer:
    """Return the server of a pinned ComfyUI version, not yet started, with ``base`` as its private directory."""
    return ComfyServer(tree(version), base, **options)
