"""Plan Memory: what a Wan run will need, stage by stage, before it begins."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..memory.comfy_server import show_text
from .folders import model_files, model_path
from .memory import pass_through

CATEGORY = "Apple Silicon Video/memory"
NONE = "none"
STOPS = {"never": (), "does not fit": ("does not fit",), "swap risk": ("does not fit", "swap risk")}


def _file_or_none(name: str, folder: str, tooltip: str) -> io.Combo.Input:
    return io.Combo.Input(name, options=[NONE, *model_files(folder)], default=NONE, optional=True, tooltip=tooltip)


class PlanMemory(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        anything, unchanged = pass_through(
            "Any value; it comes out unchanged. Lead the latent through here, so that the plan is made before the "
            "sampler begins."
        )
        return io.Schema(
            node_id="MPSPlanMemory",
            display_name="Plan Memory (MPS)",
            category=CATEGORY,
            description=(
                "Predicts what a Wan run needs in each stage, from the files' tables alone, and says whether this Mac "
                "(or another one) has it. Where it does not fit, the nearest settings that do are proposed; the run "
                "can be stopped before hours are lost."
            ),
            search_aliases=["memory plan", "will it fit", "estimate memory", "vram calculator", "swap", "ram", "oom"],
            inputs=[
                anything,
                io.Combo.Input(
                    "unet_name",
                    options=model_files("diffusion_models"),
                    tooltip="The Wan model, as in its loader; for A14B the high-noise expert.",
                ),
                io.Int.Input("width", default=832, min=32, max=16384, step=16, tooltip="Of the video, in pixels."),
                io.Int.Input("height", default=480, min=32, max=16384, step=16, tooltip="Of the video, in pixels."),
                io.Int.Input("frames", default=81, min=1, max=16381, step=4, tooltip="Of the video: 4n + 1."),
                io.Combo.Input(
                    "stop_if",
                    options=list(STOPS),
                    default="does not fit",
                    tooltip=(
                        "Stop the run with one sentence if the plan does not fit, or already if macOS may begin to "
                        "swap; never only reports."
                    ),
                ),
                _file_or_none("unet_low_name", "diffusion_models", "A14B's low-noise expert."),
                _file_or_none("clip_name", "text_encoders", "The text encoder; none leaves its stage out."),
                _file_or_none("vae_name", "vae", "The VAE; none leaves encoding of pictures and decoding out."),
                _file_or_none("lora_name", "loras", "A LoRA that the model carries, for A14B that of one expert."),
                io.Float.Input(
                    "cfg",
                    default=5.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    optional=True,
                    tooltip="The sampler's cfg. 1 means one evaluation per step, which needs the least.",
                ),
                io.Int.Input(
                    "ram_gb",
                    default=0,
                    min=0,
                    max=4096,
                    optional=True,
                    advanced=True,
                    tooltip="Plan for a Mac with this many GB; 0 reads this machine's own limits.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            outputs=[
                unchanged,
                io.String.Output(display_name="plan", tooltip="Verdict, stages and proposals as text."),
                io.Image.Output(display_name="picture", tooltip="The stages against the recommended working set."),
                io.String.Output(display_name="verdict", tooltip="fits, swap risk or does not fit."),
                io.Boolean.Output(display_name="fits", tooltip="Whether it fits without swap risk."),
            ],
        )

    @classmethod
    def execute(
        cls,
        unet_name: str,
        width: int,
        height: int,
        frames: int,
        stop_if: str = "does not fit",
        unet_low_name: str = NONE,
        clip_name: str = NONE,
        vae_name: str = NONE,
        lora_name: str = NONE,
        cfg: float = 5.0,
        ram_gb: int = 0,
        anything: Any = None,
    ) -> io.NodeOutput:
        import torch

        from ..memory import plan as planner
        from ..memory import plan_search, plan_views
        from ..mps_patches.attention import attention_version

        device = torch.device("mps" if torch.backends.mps.is_available() else "cpu")
        version = ".".join(map(str, attention_version(device)))
        model, low = _table("diffusion_models", unet_name), _table("diffusion_models", unet_low_name)
        lora = _table("loras", lora_name)
        assert model is not None
        settings: dict[str, Any] = {
            "width": width,
            "height": height,
            "frames": frames,
            "machine": planner.Machine.with_ram(ram_gb) if ram_gb else planner.Machine.here(),
            "model_low": low,
            "text_encoder": _table("text_encoders", clip_name),
            "vae": _table("vae", vae_name),
            "loras": [] if lora is None else [lora],
            "guidance": cfg != 1.0,
            "compute": planner.Compute(torch_version=version),
        }
        made = planner.plan(model, **settings)
        proposals = []
        if made.verdict != "fits":
            proposals = plan_search.nearest(model, plan_search.tables_beside(model, low), **settings)
        text = plan_views.to_text(made, proposals)
        show_text(text, cls.hidden.unique_id)
        if made.verdict in STOPS[stop_if]:
            raise planner.PlanError(plan_views.refusal(made, proposals))
        picture = torch.from_numpy(plan_views.to_picture(made, proposals))
        shown = ui.PreviewImage(picture, cls=cls).as_dict() | {"verdict": [made.verdict]}  # for web/js/plan_verdict.js
        return io.NodeOutput(anything, text, picture, made.verdict, made.verdict == "fits", ui=shown)


def _table(folder: str, name: str) -> Any:
    """The table of a file chosen in a combo, None for none."""
    from ..memory.plan import read_table

    return None if name == NONE else read_table(model_path(folder, name))


NODES: list[type[io.ComfyNode]] = [PlanMemory]
