"""What the tests of the cures share: wrapping a stand-in original, seeded noise, and errors."""

import torch
from apple_silicon_video.mps_patches import probing
from apple_silicon_video.mps_patches.registry import DEFECTS


def cured(defect_id, attribute, original=None):
    """The wrapper that a cure makes; without an original, one that must not be called."""
    return DEFECTS[defect_id].cure.maker(attribute)(original or forbidden)


def forbidden(*args, **kwargs):
    raise AssertionError("the cure called the original")


def marker(*args, **kwargs):
    return "original"


def noise(*shape, seed=0, dtype=torch.float32):
    return probing.noise(shape, dtype, seed)


def error(actual, expected):
    return probing.relative_error(actual, expected)


def rounding(dtype):
    """What a result in this dtype may be off by, relative to the largest value."""
    return torch.finfo(dtype).eps * (4 if dtype == torch.float32 else 1)
