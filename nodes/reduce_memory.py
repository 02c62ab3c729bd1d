"""Reduce Memory: what the pack's loader does for a Wan model's activations, for models that other nodes loaded."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

CATEGORY = "Apple Silicon Video/memory"


class ReduceMemory(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MPSReduceMemory",
            display_name="Reduce Memory (MPS)",
            category=CATEGORY,
            description=(
                "Makes a Wan model need about half of the memory beyond its weights while it samples: queries, "
                "feed-forward and output go through in chunks of tokens. The result is the same up to rounding. Other "
                "models, and with auto other devices than MPS, are passed through unchanged."
            ),
            search_aliases=["reduce memory", "low vram", "chunk feed forward", "activations", "wan", "apple", "mac"],
            inputs=[
                io.Model.Input("model", tooltip="The model. It is not changed; a patched clone comes out."),
                io.Combo.Input(
                    "activations",
                    options=["auto", "on", "off"],
                    default="auto",
                    tooltip=(
                        "auto: in chunks where the model runs on MPS; on: on every device; off: as ComfyUI does it, "
                        "also for a model that was patched before."
                    ),
                ),
                io.Float.Input(
                    "chunk_gib",
                    default=0.25,
                    min=0.03,
                    max=16.0,
                    step=0.01,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "GiB that the temporary tensors of one chunk may take. Less memory means more, smaller steps "
                        "on the GPU; below 0.1 that costs speed."
                    ),
                ),
            ],
            outputs=[io.Model.Output(tooltip="The patched model, for samplers, LoRA loaders and ModelSampling nodes.")],
        )

    @classmethod
    def execute(cls, model: Any, activations: str, chunk_gib: float = 0.25) -> io.NodeOutput:
        from ..memory.comfy_activations import reduce_activations

        return io.NodeOutput(reduce_activations(model, activations, int(chunk_gib * (1 << 30))))  # type: ignore[arg-type]


NODES: list[type[io.ComfyNode]] = [ReduceMemory]
