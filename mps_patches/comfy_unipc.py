"""ComfyUI's UniPC step with float64 coefficients, and the probe that says whether ComfyUI's own needs them.

`comfy.extra_samplers.uni_pc.UniPC.multistep_uni_pc_bh_update` is the step behind the samplers uni_pc and uni_pc_bh2.
ComfyUI 0.16 to 0.30 compute its coefficients in float32 on the device; later ones in float64 on the CPU. Signature and
meaning are those of 0.16 to 0.30.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .registry import Function, ProbeResult
from .unipc_weights import BASES, StepWeights, Variant, step_weights

MODULE = "comfy.extra_samplers.uni_pc"
TARGETS = ((f"{MODULE}.UniPC", "multistep_uni_pc_bh_update"),)
# Steps and shift of the schedules probed: the first of the default workflows, the others with ever smaller h.
SCHEDULES = ((20, 5.0), (20, 8.0), (30, 8.0))
WEIGHT_TOLERANCE = 0.01


def exact_update(original: Function) -> Function:
    """The step for mps tensors and models that predict x0; everything else goes to ``original``."""

    @functools.wraps(original)
    def wrapper(
        self: Any, x: Tensor, model_prev_list: list[Tensor], t_prev_list: list[Tensor], t: Tensor, order: int,
        x_t: Tensor | None = None, use_corrector: bool = True, **options: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        known = not options and self.predict_x0 and self.variant in BASES
        if not (x.is_mps and known):
            return original(self, x, model_prev_list, t_prev_list, t, order, x_t, use_corrector, **options)
        return update(self, x, model_prev_list, t_prev_list, t, order, x_t, use_corrector)

    return wrapper


def update(
    solver: Any,
    x: Tensor,
    outputs: Sequence[Tensor],
    times: Sequence[Tensor],
    t: Tensor,
    order: int,
    x_t: Tensor | None = None,
    use_corrector: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """One predictor-corrector step of UniPC, data prediction, on x's device with coefficients from the CPU.

    solver: has noise_schedule, variant and model_fn(x, t). outputs, times: at least ``order``, the latest last; the
    times are sigmas [B], equal over the batch. x_t: a prediction made elsewhere. Returns the new x and, with the
    corrector, the model's output at the prediction, else None.
    """
    schedule = solver.noise_schedule
    sigmas = torch.stack([time.reshape(-1)[0] for time in (*times[-order:], t)]).cpu().double()
    stds = schedule.marginal_std(sigmas).tolist()
    alpha = schedule.marginal_alpha(sigmas[-1:]).item()
    weights = step_weights(schedule.marginal_lambda(sigmas).tolist(), solver.variant)
    latest = outputs[-1]
    differences = [(outputs[-1 - i] - latest) / ratio for i, ratio in enumerate(weights.ratios, start=1)]

    start = x * (stds[-1] / stds[-2]) - latest * (alpha * weights.decay)
    if x_t is None:
        x_t = _add(start, differences, weights.predictor, -alpha * weights.base)
    if not use_corrector:
        return x_t, None
    output = solver.model_fn(x_t, t)
    return _add(start, [*differences, output - latest], weights.corrector, -alpha * weights.base), output


def _add(start: Tensor, terms: Sequence[Tensor], weights: Sequence[float], factor: float) -> Tensor:
    for term, weight in zip(terms, weights):
        start = start + term * (weight * factor)
    return start


def flow_sigmas(steps: int, shift: float) -> list[float]:
    """Wan's schedule (flow matching, ComfyUI's "simple" scheduler): ``steps`` sigmas from 1, then 0.001 for zero."""
    table = [shift * i / 1000 / (1 + (shift - 1) * i / 1000) for i in range(1, 1001)]
    return [*(table[-1 - int(i * 1000 / steps)] for i in range(steps)), 0.001]


def probe_device(device: torch.device, quick: bool) -> ProbeResult:
    """Whether ComfyUI's step is as good on the device as the same code is on the CPU."""
    return _probe(device, quick, lambda on_cpu: max(WEIGHT_TOLERANCE, 4 * on_cpu), "beside the CPU's {:.2g}")


def probe_float64(device: torch.device, quick: bool) -> ProbeResult:
    """Whether ComfyUI's step has the coefficients that float64 gives."""
    return _probe(device, quick, lambda on_cpu: WEIGHT_TOLERANCE, "")


def _probe(device: torch.device, quick: bool, tolerance: Callable[[float], float], words: str) -> ProbeResult:
    try:
        core = importlib.import_module(MODULE)
    except ImportError:
        return ProbeResult(True, 0.0, 0.0, "ComfyUI is not loaded here", applicable=False)
    schedules = SCHEDULES[:2] if quick else SCHEDULES
    steps = (4,) if quick else (3, 4, 5, 8)
    variants: tuple[Variant, ...] = ("bh1",) if quick else ("bh1", "bh2")
    cases = [(flow_sigmas(*schedule), i, variant) for schedule in schedules for i in steps for variant in variants]
    on_cpu = max(_weight_error(core, torch.device("cpu"), *case) for case in cases)
    allowed = tolerance(on_cpu)
    try:
        here = max(_weight_error(core, device, *case) for case in cases)
    except RuntimeError as error:  # NotImplementedError is one: torch 2.6 cannot solve a linear system on MPS
        return ProbeResult(False, float("inf"), allowed, f"uni_pc cannot run here: {str(error).splitlines()[0]}")
    detail = f"error of the corrector's weights, which are about 0.37, at shift 8 {words}".format(on_cpu).strip()
    return ProbeResult(here <= allowed, here, allowed, detail)


def _weight_error(core: Any, device: torch.device, sigmas: list[float], i: int, variant: Variant) -> float:
    """Largest error of an order-3 step's weights at step i, read off by giving each model output a place of its own."""
    solver = core.UniPC.__new__(core.UniPC)
    solver.noise_schedule = core.SigmaConvert()
    solver.predict_x0, solver.thresholding, solver.variant = True, False, variant
    # Rows of 5: x, the three outputs from the earliest, the output at the prediction.
    places = torch.eye(5, device=device).reshape(5, 1, 5, 1, 1)
    solver.model_fn = lambda x, t: places[4]
    times = [torch.tensor([sigma], device=device) for sigma in sigmas]
    found, _ = solver.multistep_uni_pc_bh_update(
        places[0], [places[1], places[2], places[3]], times[i - 3 : i], times[i], 3, use_corrector=True
    )
    exact = torch.tensor(sigmas, dtype=torch.float32).double()
    weights = step_weights((-exact[i - 3 : i + 1].log()).tolist(), variant)
    factor = -((1 + exact[i].item() ** 2) ** -0.5) * weights.base
    right = _places(weights)
    values = found.flatten().cpu().double() / factor
    return max(abs(values[place].item() - value) for place, value in right.items())


def _places(weights: StepWeights) -> dict[int, float]:
    """The corrector's weight of each model output but the latest, by its place among the five."""
    (second, first), (rho_second, rho_first, rho_new) = weights.ratios, weights.corrector
    return {1: rho_first / first, 2: rho_second / second, 4: rho_new}
