"""The pack's ComfyExtension: the list of all nodes, in the order in which menus show them."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import loaders, memory, video
from .folders import register_gguf_folders

NODES: list[type[io.ComfyNode]] = [*loaders.NODES, *video.NODES, *memory.NODES]


class AppleSiliconVideo(ComfyExtension):
    async def on_load(self) -> None:
        register_gguf_folders()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES
