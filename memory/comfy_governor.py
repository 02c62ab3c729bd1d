"""The governor on a MODEL: a wrapper around sampling, and a look before each model evaluation and in each block."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.patcher_extension
import torch

from .comfy_activations import CHECK, activation_budget
from .governor import POLICIES, Governor
from .telemetry import take_snapshot

WRAPPER_KEY = "apple_silicon_video_governor"
KINDS = (comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL)


def govern(model: Any, setting: str) -> Any:
    """A clone of the MODEL that is watched while it samples; "off" takes the watch away."""
    model = model.clone()
    for kind in KINDS:
        model.remove_wrappers_with_key(kind, WRAPPER_KEY)
    options = dict(model.model_options.get("transformer_options", {}))
    options.pop(CHECK, None)
    if setting != "off":
        watch = _Watch(setting)
        sampling, evaluation = KINDS
        model.add_wrapper_with_key(sampling, WRAPPER_KEY, watch.sample)
        model.add_wrapper_with_key(evaluation, WRAPPER_KEY, watch.evaluate)
        options[CHECK] = watch.check
    model.model_options = {**model.model_options, "transformer_options": options}
    return model


class _Watch:
    """The three places where one MODEL is watched; a governor exists only while it samples."""

    def __init__(self, setting: str) -> None:
        self.policy = POLICIES[setting]
        self.governor: Governor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Watch:
        return self

    def sample(self, executor: Any, *arguments: Any, **options: Any) -> Any:
        """Around all steps (OUTER_SAMPLE)."""
        budget = activation_budget(executor.class_obj.model_patcher)
        governor = Governor(self.policy, budget, take_snapshot, _trim)
        self.governor = governor
        try:
            return executor(*arguments, **options)
        finally:
            governor.restore()
            self.governor = None

    def evaluate(self, executor: Any, *arguments: Any, **options: Any) -> Any:
        """Around one evaluation of the model (DIFFUSION_MODEL)."""
        self.look()
        return executor(*arguments, **options)

    def check(self) -> None:
        """Between the chunks of a block."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        self.look()

    def look(self) -> None:
        if self.governor is not None:
            self.governor.look()


def _trim() -> None:
    torch.mps.synchronize()
    torch.mps.empty_cache()
