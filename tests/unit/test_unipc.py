"""UniPC's coefficients against mpmath, over the schedules that people use, and the step built on them."""

import math
import types

import mpmath
import pytest
import torch
from apple_silicon_video.mps_patches import comfy_unipc
from apple_silicon_video.mps_patches.comfy_unipc import exact_update, flow_sigmas, update
from apple_silicon_video.mps_patches.unipc import DEFECTS, phi, step_weights

STEPS = (10, 15, 20, 25, 30, 40, 50)
SHIFTS = (1.0, 3.0, 5.0, 8.0, 12.0)
TIGHT = 1e-9


@pytest.fixture(autouse=True)
def fifty_digits():
    with mpmath.workdps(50):
        yield


def exact_weights(lambdas, variant):
    """decay, base, ratios, predictor, corrector from the paper's recursion, in 50 digits."""
    *earlier, latest, target = (mpmath.mpf(value) for value in lambdas)
    h = target - latest
    ratios = [(value - latest) / h for value in reversed(earlier)]
    order = len(ratios) + 1
    decay = mpmath.expm1(-h)
    base = -h if variant == "bh1" else decay
    moments, value, factorial = [], decay / -h - 1, 1
    for i in range(1, order + 1):
        moments.append(value * factorial / base)
        factorial *= i + 1
        value = value / -h - mpmath.mpf(1) / factorial

    def solve(nodes, right):
        if not nodes:
            return []
        return list(mpmath.lu_solve(mpmath.matrix([[node**i for node in nodes] for i in range(len(nodes))]), right))

    half = [mpmath.mpf(1) / 2]
    predictor = half if order == 2 else solve(ratios, moments[:-1])
    corrector = half if order == 1 else solve([*ratios, mpmath.mpf(1)], moments)
    return decay, base, ratios, predictor, corrector


def close(found, right):
    return len(found) == len(right) and all(abs(a - b) <= TIGHT * max(1, abs(b)) for a, b in zip(found, right))


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
def test_weights_against_mpmath(steps, shift, variant):
    lambdas = [-math.log(sigma) for sigma in flow_sigmas(steps, shift)]
    for order in (1, 2, 3):
        for i in range(order, steps + 1):
            found = step_weights(lambdas[i - order : i + 1], variant)
            decay, base, ratios, predictor, corrector = exact_weights(lambdas[i - order : i + 1], variant)
            assert close((found.decay, found.base), (decay, base)), i
            assert close(found.ratios, ratios), i
            assert close(found.predictor, predictor), i
            assert close(found.corrector, corrector), i


def test_the_weight_that_float32_loses():
    """The figure of the reports: the order-3 corrector at 20 steps and shift 8."""
    lambdas = [-math.log(sigma) for sigma in flow_sigmas(20, 8.0)]
    assert step_weights(lambdas[1:5], "bh1").corrector[-1] == pytest.approx(0.366, abs=1e-3)


@pytest.mark.parametrize("k", range(6))
@pytest.mark.parametrize("z", [-12.0, -1.5, -1.0, -0.3, -1e-3, -1e-9, 0.0, 1e-5, 0.9, 3.0])
def test_phi_against_mpmath(k, z):
    right = mpmath.nsum(lambda n: mpmath.mpf(z) ** n / mpmath.factorial(n + k), [0, mpmath.inf]) if z else None
    right = 1 / mpmath.factorial(k) if right is None else right
    assert abs(phi(k, z) - right) <= 1e-11 * abs(right)


def test_unknown_variant():
    with pytest.raises(ValueError, match="'vary' is not a UniPC variant: use one of bh1, bh2"):
        step_weights([0.0, 1.0], "vary")


def test_flow_sigmas():
    assert flow_sigmas(20, 8.0)[:2] == [1.0, pytest.approx(0.99346, abs=1e-5)]
    assert flow_sigmas(10, 1.0)[:3] == [1.0, 0.9, pytest.approx(0.8)]
    assert len(flow_sigmas(30, 5.0)) == 31


# ---- the step


class Schedule:
    """sigma as the noise of a variance-exploding process, as ComfyUI hands flow models to UniPC."""

    def marginal_alpha(self, sigma):
        return (1 + sigma**2) ** -0.5

    def marginal_std(self, sigma):
        return sigma * self.marginal_alpha(sigma)

    def marginal_lambda(self, sigma):
        return -sigma.log()


def solver(variant, model_fn):
    return types.SimpleNamespace(noise_schedule=Schedule(), variant=variant, model_fn=model_fn, predict_x0=True)


@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_step_solves_what_it_is_exact_for(order, variant):
    """x0 as a power of lambda has a solution in closed form; the corrector is exact to one degree more."""
    sigmas = flow_sigmas(20, 5.0)
    i = 9

    def exact_step(degree):
        """x at sigmas[i] from x at sigmas[i-1], for x0 = lambda^degree: x/sigma' = sum of x0 over exp(lambda)."""
        start, end = (-mpmath.log(sigmas[j]) for j in (i - 1, i))
        area = mpmath.quad(lambda value: mpmath.exp(value) * value**degree, [start, end])
        noise = sigmas[i] / sigmas[i - 1]
        stretch = [(1 + sigma**2) ** -0.5 for sigma in sigmas]
        return float((0.7 / stretch[i - 1] * noise + sigmas[i] * area) * stretch[i])

    def x0(degree, sigma):
        return torch.full((1, 1, 1), (-math.log(sigma)) ** degree, dtype=torch.float64)

    times = [torch.tensor([sigma], dtype=torch.float64) for sigma in sigmas]
    for degree in range(3):
        outputs = [x0(degree, sigma) for sigma in sigmas[i - 3 : i]]
        x = torch.full((1, 1, 1), 0.7, dtype=torch.float64)
        of = solver(variant, lambda x, t, degree=degree: x0(degree, t.item()))
        predicted, nothing = update(of, x, outputs, times[i - 3 : i], times[i], order, use_corrector=False)
        corrected, output = update(of, x, outputs, times[i - 3 : i], times[i], order)
        assert nothing is None
        assert torch.equal(output, x0(degree, sigmas[i]))
        right = exact_step(degree)
        # The weights of one half make order 2's predictor and order 1's corrector exact to a degree less.
        if degree <= order - 1 - (order == 2):
            assert predicted.item() == pytest.approx(right, rel=1e-9)
        if degree <= order - (order == 1):
            assert corrected.item() == pytest.approx(right, rel=1e-9)
        if degree == order:
            assert predicted.item() != pytest.approx(right, rel=1e-9)


def test_a_given_prediction_is_used():
    times = [torch.tensor([sigma]) for sigma in flow_sigmas(20, 5.0)]
    outputs = [torch.randn(2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    seen = []
    of = solver("bh2", lambda x, t: (seen.append(x), outputs[0])[1])
    given = torch.zeros_like(outputs[3])
    _, output = update(of, outputs[3], outputs[:3], times[4:7], times[7], 3, x_t=given)
    assert seen[0] is given
    assert output is outputs[0]


def test_the_wrapper_leaves_other_devices_alone():
    calls = []
    wrapper = exact_update(lambda *args: calls.append(args))
    x = torch.zeros(1)
    of = solver("bh1", None)
    wrapper(of, x, [x], [x], x, 1, use_corrector=False)
    assert calls == [(of, x, [x], [x], x, 1, None, False)]


def test_probes_without_comfyui(monkeypatch):
    monkeypatch.setattr(comfy_unipc, "MODULE", "no_comfyui_here")
    for defect in DEFECTS:
        result = defect.probe(torch.device("cpu"), True)
        assert (result.ok, result.applicable) == (True, False)
