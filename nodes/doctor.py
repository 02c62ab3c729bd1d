"""Diagnosis nodes: the Doctor, and the watch over a run's output."""

from __future__ import annotations

import logging
import sys
from typing import Any

from comfy_api.latest import io, ui

from ..memory.comfy_server import show_text
from .progress import show_part
from .rerun import RunsAlways

CATEGORY = "Apple Silicon Video/diagnosis"
# Packs whose presence explains a result, by the names of their folders.
RELEVANT_PACKS = ("ComfyUI-GGUF", "ComfyUI-AppleSilicon-FP8", "ComfyUI-WanVideoWrapper", "ComfyUI-LatentSyncWrapper")

log = logging.getLogger(__name__)


class Doctor(RunsAlways):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MPSDoctor",
            display_name="MPS Doctor",
            category=CATEGORY,
            description=(
                "Examines this Mac: probes every known MPS defect at real Wan shapes, shows which are there and which "
                "are cured, and says what to do, in order of effect."
            ),
            search_aliases=["diagnose", "mps", "check", "health", "bug report", "black frames", "apple"],
            inputs=[
                io.Boolean.Input(
                    "quick",
                    default=False,
                    tooltip="Small tensors only, about 10 seconds; otherwise real Wan shapes in under a minute.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            not_idempotent=True,
            outputs=[
                io.String.Output(display_name="report", tooltip="The findings as a Markdown table for a bug report."),
                io.Image.Output(display_name="picture", tooltip="The findings as a picture."),
            ],
        )

    @classmethod
    def execute(cls, quick: bool = False) -> io.NodeOutput:
        import torch

        from ..memory.telemetry import take_snapshot
        from ..mps_patches import doctor, doctor_views

        show = show_part()
        memory = {name: value for name, value in vars(take_snapshot()).items() if value is not None}
        diagnosis = doctor.diagnose(
            quick=quick,
            memory=memory,
            comfyui=_comfyui_version(),
            packs=_packs(),
            progress=lambda done, total: show(done / total),
        )
        report = doctor_views.to_markdown(diagnosis)
        picture = torch.from_numpy(doctor_views.to_picture(diagnosis))
        show_text(report, cls.hidden.unique_id)
        return io.NodeOutput(report, picture, ui=ui.PreviewImage(picture, cls=cls))


def _comfyui_version() -> str | None:
    return getattr(sys.modules.get("comfyui_version"), "__version__", None)


def _packs() -> list[str]:
    paths = {str(getattr(module, "__file__", "") or "").lower() for module in list(sys.modules.values())}
    return [name for name in RELEVANT_PACKS if any(f"/{name.lower()}/" in path for path in paths)]


class WatchOutput(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MPSWatchOutput",
            display_name="Watch Output (MPS)",
            category=CATEGORY,
            description=(
                "Watches a run for broken output: NaN or exploding latents at every step, flat, black, saturated or "
                "drifting frames at the end. Names the likely defect, and can stop the run at once."
            ),
            search_aliases=["nan", "black frames", "noise", "watch", "check output", "guard", "apple"],
            inputs=[
                io.Model.Input(
                    "model", optional=True, tooltip="Watched at every step of whatever sampler it is given to."
                ),
                io.Image.Input("images", optional=True, tooltip="Frames to look at before they are saved."),
                io.Combo.Input(
                    "on_trouble",
                    options=["stop", "warn"],
                    default="stop",
                    tooltip="stop ends the run with a sentence that names the likely cause; warn only reports it.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model, watched."),
                io.Image.Output(display_name="images", tooltip="The frames, unchanged."),
                io.String.Output(display_name="report", tooltip="What was found in the frames."),
            ],
        )

    @classmethod
    def execute(cls, on_trouble: str = "stop", model: Any = None, images: Any = None) -> io.NodeOutput:
        from ..mps_patches.output_watch import check_frames

        findings = [] if images is None else check_frames(images)
        report = "\n".join(finding.sentence() for finding in findings) or "No trouble found."
        if findings:
            _report(f"The frames look broken: {findings[0].sentence()}", on_trouble == "stop")
        show_text(report, cls.hidden.unique_id)
        watched = None if model is None else _watched(model, on_trouble == "stop")
        return io.NodeOutput(watched, images, report)


def _watched(model: Any, stop: bool) -> Any:
    """A clone of the model whose denoised latent is looked at in every step."""
    from ..mps_patches.output_watch import check_latent

    warned: set[str] = set()

    def after_guidance(arguments: dict[str, Any]) -> Any:
        denoised = arguments["denoised"]
        finding = check_latent(denoised)
        if finding is not None and finding.kind not in warned:
            warned.add(finding.kind)
            sigma = float(arguments["sigma"].flatten()[0])
            _report(f"Sampling has gone wrong at sigma {sigma:.3f}: {finding.sentence()}", stop)
        return denoised

    clone = model.clone()
    clone.set_model_sampler_post_cfg_function(after_guidance)
    return clone


def _report(sentence: str, stop: bool) -> None:
    if stop:
        raise RuntimeError(sentence)
    log.warning(sentence)


NODES: list[type[io.ComfyNode]] = [Doctor, WatchOutput]
