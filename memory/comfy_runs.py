"""What every sampling on a model of this pack gets: the Mac stays awake, and the sampler's node shows the time left."""

from __future__ import annotations

from typing import Any

import comfy.patcher_extension

from .awake import awake
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
