"""Nodes for runs of hours: what is done survives a crash."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..memory.comfy_server import show_text

CATEGORY = "Apple Silicon Video/memory"


class CheckpointSampling(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MPSCheckpointSampling",
            display_name="Checkpoint Sampling (MPS)",
            category=CATEGORY,
            description=(
                "Saves the latent while sampling, so that the same queue entry goes on where it stopped after a crash, "
                "a power loss or a cancel. Exact with euler and heun; other samplers go on with their history anew."
            ),
            search_aliases=["resume", "checkpoint", "continue sampling", "crash", "long run", "save latent"],
            inputs=[
                io.Model.Input("model", tooltip="The model to sample with. It comes out with checkpoints switched on."),
                io.Int.Input(
                    "every",
                    default=1,
                    min=1,
                    max=1000,
                    tooltip="Save after every so many steps. One save is a few megabytes and takes no noticeable time.",
                ),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
            outputs=[io.Model.Output(tooltip="The model, for samplers.")],
        )

    @classmethod
    def execute(cls, model: Any, every: int) -> io.NodeOutput:
        from ..memory.comfy_checkpoints import default_store, with_checkpoints
        from ..memory.comfy_server import show_at_running_node

        node = cls.hidden.unique_id
        show_text(f"saves every {every} steps" if every > 1 else "saves every step", node)
        identity = ancestors(cls.hidden.prompt or {}, str(node))
        return io.NodeOutput(with_checkpoints(model, default_store(), identity, every, show_at_running_node))


class MemoryGovernor(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MPSMemoryGovernor",
            display_name="Memory Governor (MPS)",
            category=CATEGORY,
            description=(
                "Watches the GPU's memory and swap while sampling and acts before the Mac begins to swap: trims the "
                "allocator's cache, makes chunks smaller, and at last stops with the steps saved. Queue again to go on."
            ),
            search_aliases=["memory limit", "swap", "out of memory", "oom", "guard", "watchdog"],
            inputs=[
                io.Model.Input("model", tooltip="The model to sample with."),
                io.Combo.Input(
                    "setting",
                    options=["off", "careful", "strict"],
                    default="careful",
                    tooltip=(
                        "careful stops only when swap has grown by a quarter of the memory; strict keeps the run "
                        "inside the recommended working set; off passes the model through."
                    ),
                ),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
            outputs=[io.Model.Output(tooltip="The model, for samplers.")],
        )

    @classmethod
    def execute(cls, model: Any, setting: str) -> io.NodeOutput:
        from ..memory.comfy_checkpoints import default_store, with_checkpoints
        from ..memory.comfy_governor import govern
        from ..memory.comfy_server import show_at_running_node

        if setting != "off":
            identity = ancestors(cls.hidden.prompt or {}, str(cls.hidden.unique_id))
            model = with_checkpoints(model, default_store(), identity, 1, show_at_running_node)
        return io.NodeOutput(govern(model, setting))


def ancestors(prompt: dict[str, Any], node: str) -> dict[str, Any]:
    """Class and inputs of a node and of everything that it is made from, by node id."""
    found: dict[str, Any] = {}
    waiting = [node]
    while waiting:
        key = waiting.pop()
        if key in found or key not in prompt:
            continue
        inputs = prompt[key].get("inputs", {})
        found[key] = {"class_type": prompt[key].get("class_type"), "inputs": inputs}
        waiting += [str(value[0]) for value in inputs.values() if isinstance(value, list) and len(value) == 2]
    return dict(sorted(found.items()))


NODES: list[type[io.ComfyNode]] = [CheckpointSampling, MemoryGovernor]
