"""Noise drawn on MPS depends on the dtype, and no other device can reproduce it.

ComfyUI draws the first noise on the CPU in float32, so it is the same everywhere; what ancestral and SDE samplers add
later comes from the device's own generator in the latents' dtype (``default_noise_sampler`` of comfy.k_diffusion in
0.16 to 0.30). That is no error, but a seed then gives other frames on a Mac. The cure, off unless switched on, draws it
on the CPU in float32 with the seed that core uses for CPU latents, so that a Mac's frames match a CPU run's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import gate, probing
from .registry import Cure, Defect, Function, ProbeResult

SAMPLES = 1 << 16


def reference(x: Tensor, seed: int) -> Function:
    """A noise sampler (sigma, sigma_next) -> noise like ``x``: drawn on the CPU in float32, seeded with seed + 1.

    One more than the seed, because the first noise of a run is drawn with the seed itself on the same device.
    """
    generator = torch.Generator().manual_seed(seed + 1)

    def sample(sigma: Any, sigma_next: Any) -> Tensor:
        return torch.randn(x.shape, generator=generator).to(x.device, x.dtype)

    return sample


def _make(original: Function) -> Function:
    def cured(x: Tensor, seed: int | None = None) -> Function:
        if gate.acts_on(x) and seed is not None:
            return reference(x, seed)
        return original(x, seed)

    return cured


def probe(device: torch.device, quick: bool) -> ProbeResult:
    """Two draws with one seed must agree, and their mean, deviation and lag-1 correlation must be a normal one's."""
    draws = []
    for _ in range(2):
        generator = torch.Generator(device=device).manual_seed(7)
        draws.append(torch.randn(SAMPLES, device=device, generator=generator).cpu())
    first, second = draws
    if not torch.equal(first, second):
        return ProbeResult(False, float("inf"), 0.0, "the same seed gives other numbers")
    moments = (first.mean(), first.std() - 1, (first[1:] * first[:-1]).mean())
    error = max(abs(value.item()) for value in moments)
    same = torch.equal(first, probing.noise((SAMPLES,), seed=7))
    numbers = "the CPU's numbers" if same else "other numbers than the CPU's"
    detail = f"{numbers}; mean, deviation and correlation within {error:.2g}"
    return ProbeResult(error <= 0.03, error, 0.03, detail)


DEFECTS = (
    Defect(
        id="randomness",
        title="Seeds give other noise than on other machines",
        symptom="Ancestral and SDE samplers give other frames than CUDA or the CPU with the same seed",
        trigger="noise drawn on mps, by samplers that add noise at each step",
        cause="every device has its own generator, and on MPS the numbers depend on the dtype",
        affected="always",
        upstream=(),
        seam="comfy.k_diffusion.sampling.default_noise_sampler",
        advice="Where frames must match another machine, use a sampler that adds no noise (euler), or set "
        "ASV_PATCH_RANDOMNESS=on.",
        probe=probe,
        cure=Cure(targets=(("comfy.k_diffusion.sampling", "default_noise_sampler"),), make=_make),
        reference="randomness.reference",
        switch=False,
    ),
)
