"""The pack's ComfyExtension: the list of all nodes, in the order in which menus show them."""

from __future__ import annotations

import torch
from comfy_api.latest import ComfyExtension, io

from . import (
    doctor,
    edit_video,
    load_video,
    loaders,
    long_runs,
    memory,
    patches,
    plan_memory,
    prompts,
    quantize,
    reduce_memory,
    vae,
    video,
)
from .folders import register_gguf_folders

NODES: list[type[io.ComfyNode]] = [
    *loaders.NODES,
    *prompts.NODES,
    *load_video.NODES,
    *video.NODES,
    *edit_video.NODES,
    *vae.NODES,
    *memory.NODES,
    *plan_memory.NODES,
    *long_runs.NODES,
    *reduce_memory.NODES,
    *patches.NODES,
    *doctor.NODES,
    *quantize.NODES,
]


class AppleSiliconVideo(ComfyExtension):
    async def on_load(self) -> None:
        from ..memory.comfy_checkpoints import clean_up_after_runs
        from ..memory.comfy_server import serve_meter
        from ..memory.report import meter_figures
        from ..memory.telemetry import take_snapshot
        from ..video import decord_module

        register_gguf_folders()
        decord_module.register()
        clean_up_after_runs()
        serve_meter("/apple_silicon_video/memory", lambda: meter_figures(take_snapshot()))
        if torch.backends.mps.is_available():
            from ..mps_patches import install

            install.apply()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES
