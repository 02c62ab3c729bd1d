"""What every sampling on a model of this pack gets: the device to itself, a Mac that stays awake, and the time left."""

from __future__ import annotations

from typing import Any

import comfy.patcher_extension
import comfy.sampler_helpers

from .awake import awake
from .comfy_models import have_device_to_itself
from .comfy_server import show_at_running_node
from .step_times import StepTimes

WRAPPER_KEY = "apple_silicon_video_runs"
CALLBACK = 1  # index of the callback behind noise, latent image, sampler and sigmas


def watch_runs(model: Any) -> Any:
    """Add the wrapper to this MODEL (no clone), once; returns it."""
    kind = comfy.patcher_extension.WrappersMP.OUTER_SAMPLE
    model.remove_wrappers_with_key(kind, WRAPPER_KEY)
    model.add_wrapper_with_key(kind, WRAPPER_KEY, _outer_sample)
    return model


def _outer_sample(
    executor: Any, noise: Any, latent_image: Any, sampler: Any, sigmas: Any, *arguments: Any, **options: Any
) -> Any:
    _make_room(executor.class_obj)
    times = StepTimes(len(sigmas) - 1)
    rest = list(arguments)
    callback = rest[CALLBACK] if len(rest) > CALLBACK else None

    def report(step: int, denoised: Any, x: Any, steps: int) -> None:
        show_at_running_node(times.step(step + 1))
        if callback is not None:
            callback(step, denoised, x, steps)

    if len(rest) > CALLBACK:
        rest[CALLBACK] = report
    with awake():
        return executor(noise, latent_image, sampler, sigmas, *rest, **options)


def _make_room(guider: Any) -> None:
    """Control nets and the like that this GUIDER samples with stay where they are."""
    patcher = guider.model_patcher
    conditioned, _ = comfy.sampler_helpers.get_additional_models(guider.conds, patcher.model_dtype())
    hooked = comfy.sampler_helpers.get_additional_models_from_model_options(guider.model_options)
    have_device_to_itself(patcher, [*conditioned, *hooked])
