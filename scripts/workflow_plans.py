"""The memory plan of each workflow of workflow_table.py, from the published files' tables: no file is needed."""

from __future__ import annotations

from published_tables import published_table
from workflow_table import Row

from apple_silicon_video.memory.plan import Machine, Plan, plan  # isort: skip


def model_files(row: Row) -> list[str]:
    """Names of the model files that a workflow's loaders name, each once, in the order of the graph."""
    found = row.draw(row).to_ui()["nodes"]
    return list(dict.fromkeys(model["name"] for node in found for model in node["properties"].get("models", ())))


def planned(row: Row) -> Plan:
    """What a workflow takes on the Mac it is made for; a clip of several segments: each of them."""
    names = model_files(row)
    diffusion = sorted((name for name in names if name.startswith("Wan")), key=lambda name: "LowNoise" in name)
    encodes = {node["class_type"] for node in row.draw(row).to_api().values()} & {"VAEEncode", "MPSVAEEncode"}
    (encoder,) = (name for name in names if name.startswith("umt5"))
    (vae,) = (name for name in names if "vae" in name)
    loras = [name for name in names if "lora" in name]
    return plan(
        published_table(diffusion[0]),
        model_low=published_table(diffusion[1]) if len(diffusion) > 1 else None,
        text_encoder=published_table(encoder),
        vae=published_table(vae),
        loras=[published_table(name) for name in loras[:1]],
        width=row.width,
        height=row.height,
        frames=row.frames,
        machine=Machine.with_ram(row.memory),
        guidance=not row.fast,
        clip=bool(encodes),
    )
