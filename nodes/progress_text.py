"""Text inside a node while it runs and after."""

from ..memory.comfy_server import show_text

__all__ = ["show_text"]
