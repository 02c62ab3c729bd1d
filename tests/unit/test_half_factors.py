"""float16 factors against float64: the stated bound at every size, nothing but float32 changed."""

import pytest
import torch
from apple_silicon_video.quantization.half_factors import MOST_EXPONENT, TOP, to_half

SIZES = [1e-24, 1e-6, 0.02, 1.0, 1e4, 6e4, 1e20]


def wide(size):
    """60 octaves of magnitudes, the greatest ``size``."""
    generator = torch.Generator().manual_seed(1)
    octaves = torch.rand(64, 96, generator=generator) * 60
    signs = torch.randint(0, 2, (64, 96), generator=generator) * 2 - 1
    values = signs * torch.exp2(-octaves)
    return values * (size / values.abs().max())


@pytest.mark.parametrize("size", SIZES)
def test_bound(size):
    factor = wide(size)
    before = factor.clone()
    half, exponent = to_half(factor)
    assert half.dtype == torch.float16 and half.shape == factor.shape and torch.isfinite(half).all()
    assert torch.equal(factor, before)
    exact = factor.double()
    error = (half.double() * 2.0**exponent - exact).abs()
    allowed = torch.maximum(exact.abs() * 2**-11, exact.abs().max() * 2**-32)
    assert (error <= allowed).all()
    octaves = exact.abs() >= exact.abs().max() * 2**-21
    assert (error <= exact.abs() * 2**-11)[octaves].all() and 0.3 < octaves.float().mean() < 0.4


@pytest.mark.parametrize("power", [-90, -30, 0, 10, 80])
def test_what_float16_can_hold_is_kept_exactly(power):
    """Powers of two change no bit: eleven significant ones come back as they were."""
    factor = torch.arange(-2048, 2049, dtype=torch.float32) * 2.0**power
    half, exponent = to_half(factor)
    assert torch.equal(half.float() * 2.0**exponent, factor)
    assert half.abs().max() <= 2**TOP


def test_zeros():
    half, exponent = to_half(torch.zeros(3, 2))
    assert torch.equal(half, torch.zeros(3, 2, dtype=torch.float16)) and exponent == 0


LEFT = {
    "float16": torch.ones(2, dtype=torch.float16),
    "bfloat16": torch.ones(2, dtype=torch.bfloat16),
    "float64": torch.ones(2, dtype=torch.float64),
    "empty": torch.ones(0, 4),
    "infinite": torch.tensor([1.0, float("inf")]),
    "minus infinite": torch.tensor([1.0, -float("inf")]),
    "nan": torch.tensor([1.0, float("nan")]),
    "too small": torch.tensor([2.0 ** (TOP - MOST_EXPONENT - 2), 0.0]),
    "too large": torch.tensor([2.0 ** (TOP + MOST_EXPONENT), 0.0]),
}


@pytest.mark.parametrize("kind", LEFT)
def test_what_is_left_as_it_is(kind):
    assert to_half(LEFT[kind]) is None
