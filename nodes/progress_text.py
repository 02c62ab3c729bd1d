"""Text inside a node while it runs and after."""

from __future__ import annotations

import sys


def show_text(text: str, node_id: str | None) -> None:
    """Write the text into the node: the front end shows the result of PreviewText only for core's own nodes."""
    server = sys.modules.get("server")  # missing where ComfyUI runs without its web server
    instance = getattr(getattr(server, "PromptServer", None), "instance", None)
    if instance is not None and node_id is not None:
        instance.send_progress_text(text, node_id)
