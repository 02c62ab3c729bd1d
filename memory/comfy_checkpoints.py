"""Checkpoints for core's samplers, through a wrapper around sampling on the MODEL (WrappersMP.OUTER_SAMPLE).

A sampler reports the latent and the model's answer at every step; that pair is stored. To go on, the same sampler
function is called with the remaining sigmas and the stored latent, and the first answer comes from the file instead of
the model, so that only the interrupted step is computed again.
"""

from __future__ import annotations

import atexit
import copy
import functools
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.patcher_extension
import comfyui_version
import folder_paths
import torch

from .checkpoints import Checkpoint, CheckpointStore, digest
from .comfy_server import current_run, on_every_prompt, run_succeeded

log = logging.getLogger(__name__)

WRAPPER_KEY = "apple_silicon_video_checkpoints"
SAMPLING_MODULE = "comfy.k_diffusion.sampling"
EXACT = {"sample_euler", "sample_heun", "sample_dpm_2"}
"""Samplers whose whole state is the latent, unless their options add noise: going on equals never having stopped."""

NOISE_OPTIONS = ("s_churn", "eta")


def default_store() -> CheckpointStore:
    """The store in ComfyUI's user folder."""
    return CheckpointStore(Path(folder_paths.get_user_directory()) / "apple-silicon-video" / "checkpoints")


def with_checkpoints(
    model: Any, store: CheckpointStore, identity: Any, every: int, tell: Callable[[str], None] = log.info
) -> Any:
    """A clone of the MODEL that stores a checkpoint every ``every`` steps and goes on from the last one.

    identity: JSON value that tells this model from others (how it was made). tell: hears what is done, one sentence.
    """
    model = model.clone()
    model.remove_wrappers_with_key(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, WRAPPER_KEY)
    wrapper = functools.partial(_outer_sample, store=store, identity=identity, every=every, tell=tell)
    model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, WRAPPER_KEY, wrapper)
    return model


def is_exact(sampler: Any) -> bool:
    """Whether going on with this KSAMPLER gives the undisturbed result bit for bit."""
    options = getattr(sampler, "extra_options", {})
    return sampler.sampler_function.__name__ in EXACT and not any(options.get(name) for name in NOISE_OPTIONS)


def can_resume(sampler: Any) -> bool:
    """Whether the sampler goes through the sigmas one by one, so that the rest of them is a sampling of its own."""
    return getattr(getattr(sampler, "sampler_function", None), "__module__", None) == SAMPLING_MODULE


def _outer_sample(
    executor: Any,
    noise: torch.Tensor,
    latent_image: torch.Tensor,
    sampler: Any,
    sigmas: torch.Tensor,
    *arguments: Any,
    store: CheckpointStore,
    identity: Any,
    every: int,
    tell: Callable[[str], None],
    **options: Any,
) -> torch.Tensor:
    if not can_resume(sampler):
        tell("This sampler cannot be resumed; choose euler to have its steps saved.")
        return executor(noise, latent_image, sampler, sigmas, *arguments, **options)
    store.remove_runs(run_succeeded)
    mask_and_seed = [*arguments[:1], *arguments[3:]]  # between them: the callback and the progress bar's switch
    facts = _facts(executor.class_obj, sampler)
    key = digest([identity, facts, noise, latent_image, sigmas, mask_and_seed, options])
    name, steps, run = sampler.sampler_function.__name__, len(sigmas) - 1, current_run()
    checkpoint = store.get(key)
    if checkpoint is not None and checkpoint.finished:
        tell("This sampling was finished before; its result is used.")
        store.put(key, replace(checkpoint, run=run))  # it goes when this run has succeeded
        return checkpoint.latent
    if checkpoint is not None:
        history = "" if is_exact(sampler) else "; this sampler's history starts anew"
        tell(f"Going on after step {checkpoint.step} of {steps}{history}.")

    def save(step: int, latent: torch.Tensor, denoised: torch.Tensor | None) -> None:
        if step % every == 0 or step == steps:
            store.put(key, Checkpoint(step, steps, latent, denoised, name, run))

    resumable = copy.copy(sampler)
    resumable.sampler_function = _resumable(sampler, checkpoint, save)
    result = executor(noise, latent_image, resumable, sigmas, *arguments, **options)
    save(steps, result, None)
    return result


def _facts(guider: Any, sampler: Any) -> list[Any]:
    """What the result depends on beside the latent: conditioning, guidance, sampler options, patches on the model."""
    patcher = guider.model_patcher
    settings = {key: value for key, value in vars(guider).items() if isinstance(value, (int, float, str, bool))}
    weights = {key: [patch[:3] for patch in patches] for key, patches in patcher.patches.items()}
    return [
        comfyui_version.__version__,
        str(patcher.load_device.type),
        type(patcher.model).__name__,
        sampler.sampler_function.__name__,
        {key: value for key, value in sampler.extra_options.items() if not callable(value)},
        settings,
        guider.original_conds,
        {key: [_sketch(patch) for patch in patches] for key, patches in weights.items()},
        sorted(patcher.object_patches),
    ]


def _sketch(patch: Any) -> Any:
    """A weight patch without its size: of each tensor the shape and the first numbers."""
    if isinstance(patch, torch.Tensor):
        return [list(patch.shape), patch.detach().flatten()[:16].to("cpu", torch.float32)]
    if isinstance(patch, (list, tuple)):
        return [_sketch(item) for item in patch]
    return _sketch(patch.weights) if hasattr(patch, "weights") else patch


def _resumable(
    sampler: Any, checkpoint: Checkpoint | None, save: Callable[[int, torch.Tensor, torch.Tensor | None], None]
) -> Callable[..., torch.Tensor]:
    """The sampler's function, which starts at the checkpoint and reports each step to ``save``."""
    function = sampler.sampler_function
    start = checkpoint.step if checkpoint is not None else 0

    @functools.wraps(function)
    def run(
        model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: Any = None, callback: Any = None, **options: Any
    ) -> torch.Tensor:
        extra_args = dict(extra_args or {})
        if checkpoint is not None:
            x = checkpoint.latent.to(x)
            if is_exact(sampler):
                model = _Answered(model, x, checkpoint.denoised)
            elif extra_args.get("seed") is not None:
                extra_args["seed"] += start  # other noise than that of the steps that are done

        def report(state: dict[str, Any]) -> None:
            step = state["i"] + start
            if checkpoint is None or step > start:
                save(step, state["x"], state["denoised"])
            if callback is not None:
                callback({**state, "i": step})

        return function(model, x, sigmas[start:], extra_args=extra_args, callback=report, **options)

    return run


class _Answered:
    """A model whose answer to one latent is known; everything else is the model's."""

    def __init__(self, model: Any, latent: torch.Tensor, denoised: torch.Tensor | None) -> None:
        self._model = model
        self._latent = latent
        self._denoised = denoised

    def __call__(self, x: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        denoised, self._denoised = self._denoised, None
        if denoised is not None and x is self._latent:
            return denoised.to(x)
        return self._model(x, *arguments, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def clean_up_after_runs() -> None:
    """Remove what succeeded runs have left whenever a prompt is queued, and at the end of the process."""

    def clean() -> None:
        default_store().remove_runs(run_succeeded)

    atexit.register(clean)
    on_every_prompt(clean)
