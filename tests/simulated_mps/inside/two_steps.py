"""A short sampling of a small Wan on the simulated device."""

import comfy.sample
import torch


def two_steps(patcher):
    """Two Euler steps through core's sampler, on the CPU afterwards."""
    generator = torch.Generator().manual_seed(0)
    latent = torch.zeros(1, 16, 2, 8, 8)
    conditioning = [[torch.randn(1, 20, 4096, generator=generator), {}]]
    noise = comfy.sample.prepare_noise(latent, 0)
    result = comfy.sample.sample(patcher, noise, 2, 1.0, "euler", "simple", conditioning, conditioning, latent, seed=0)
    return result.cpu()
