"""Memory nodes: giving memory back in the middle or at the end of a graph."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..memory.comfy_server import show_text
from .rerun import RunsAlways

CATEGORY = "Apple Silicon Video/memory"


def pass_through(tooltip: str) -> tuple[io.MatchType.Input, io.MatchType.Output]:
    """An input for any value, and the output on which it comes out unchanged; the tooltip is the input's."""
    template = io.MatchType.Template("anything")
    return (
        io.MatchType.Input("anything", template=template, optional=True, tooltip=tooltip),
        io.MatchType.Output(template=template, display_name="anything", tooltip="The input, unchanged."),
    )


class FreeMemory(RunsAlways):
    @classmethod
    def define_schema(cls) -> io.Schema:
        anything, unchanged = pass_through(
            "Any value; it comes out unchanged. Put the node on the connection where memory should be free, such as "
            "the latent between sampling and decoding."
        )
        return io.Schema(
            node_id="MPSFreeMemory",
            display_name="Free Memory (MPS)",
            category=CATEGORY,
            description=(
                "Passes its input through and gives memory back on the way: unloads models, collects unused tensors, "
                "empties the MPS cache, and reports what was held before and after."
            ),
            search_aliases=["free memory", "empty cache", "clear cache", "unload models", "purge vram", "clean memory"],
            inputs=[
                anything,
                io.Boolean.Input(
                    "unload_models",
                    default=True,
                    tooltip="Take all models off the GPU. They are loaded again when a later node needs them.",
                ),
                io.Boolean.Input(
                    "empty_cache",
                    default=True,
                    tooltip="Return the MPS allocator's unused memory to the system.",
                ),
                io.Boolean.Input(
                    "drop_patches",
                    default=False,
                    optional=True,
                    tooltip=(
                        "Take models that carry LoRAs or other patches off the GPU even if unload_models is off, and "
                        "forget their patched weights."
                    ),
                ),
                io.Combo.Input(
                    "drop_caches",
                    options=["keep", "files", "everything"],
                    default="files",
                    optional=True,
                    tooltip=(
                        "files: pages of model files that were read into RAM; everything: also ComfyUI's stored "
                        "results of all nodes when this run ends, so that the next run computes them anew; keep: none."
                    ),
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            not_idempotent=True,
            outputs=[
                unchanged,
                io.String.Output(display_name="report", tooltip="Memory before and after, as text."),
            ],
        )

    @classmethod
    def execute(
        cls,
        unload_models: bool,
        empty_cache: bool,
        drop_patches: bool = False,
        drop_caches: Any = "files",
        anything: Any = None,
    ) -> io.NodeOutput:
        from ..memory.comfy_models import free_memory

        report = free_memory(unload_models, empty_cache, drop_patches, drop_caches).text()
        show_text(report, cls.hidden.unique_id)
        return io.NodeOutput(anything, report, ui=ui.PreviewText(report))


class MemoryReport(RunsAlways):
    @classmethod
    def define_schema(cls) -> io.Schema:
        anything, unchanged = pass_through("Any value; it comes out unchanged. The report is made when it arrives.")
        return io.Schema(
            node_id="MPSMemoryReport",
            display_name="Memory Report (MPS)",
            category=CATEGORY,
            description=(
                "Passes its input through and reports what memory holds at that point of the graph: the MPS allocator, "
                "tensors, the process, swap, and the models that are loaded. Changes nothing."
            ),
            search_aliases=["memory", "vram", "show memory", "memory usage", "swap", "loaded models"],
            inputs=[anything],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            not_idempotent=True,
            outputs=[unchanged, io.String.Output(display_name="report", tooltip="The figures, as text.")],
        )

    @classmethod
    def execute(cls, anything: Any = None) -> io.NodeOutput:
        from ..memory.comfy_models import loaded_models
        from ..memory.report import memory_report
        from ..memory.telemetry import take_snapshot

        report = memory_report(take_snapshot(), loaded_models())
        show_text(report, cls.hidden.unique_id)
        return io.NodeOutput(anything, report, ui=ui.PreviewText(report))


NODES: list[type[io.ComfyNode]] = [FreeMemory, MemoryReport]
