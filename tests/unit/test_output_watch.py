"""The watch over latents and frames: every kind of trouble is named, and good output is left alone."""

import pytest
import torch
from apple_silicon_video.mps_patches.output_watch import LIKELY, check_frames, check_latent


def clip(count=16):
    """A working clip: a bright disc that moves over a textured background."""
    y, x = torch.meshgrid(torch.linspace(0, 1, 32), torch.linspace(0, 1, 48), indexing="ij")
    frames = []
    for index in range(count):
        disc = ((x - 0.2 - 0.6 * index / count) ** 2 + (y - 0.5) ** 2 < 0.03).float()
        frames.append(torch.stack([0.3 + 0.3 * x, 0.2 + 0.4 * y, 0.5 * disc + 0.2], dim=-1))
    return torch.stack(frames)


def latent():
    return torch.randn(1, 16, 5, 8, 12, generator=torch.Generator().manual_seed(0))


LATENTS = {
    "nan": lambda x: x.index_fill(2, torch.tensor([3]), float("nan")),
    "explosion": lambda x: x * 1000,
    "flat latent": lambda x: torch.zeros_like(x),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_good_latents_pass(dtype):
    assert check_latent(latent().to(dtype)) is None
    assert check_latent(latent().to(dtype) * 6) is None


@pytest.mark.parametrize("kind", LATENTS)
def test_bad_latents_are_named(kind):
    finding = check_latent(LATENTS[kind](latent()))
    assert finding.kind == kind and LIKELY[kind] in finding.sentence()


def test_infinity_is_nan_trouble():
    broken = latent()
    broken[0, 0, 0, 0, 0] = float("inf")
    assert check_latent(broken).kind == "nan"


FRAMES = {
    "nan": lambda x: x.index_fill(0, torch.tensor([5]), float("nan")),
    "black frames": lambda x: torch.cat([x[:1], torch.zeros_like(x[1:])]),
    "flat frames": lambda x: torch.full_like(x, 0.6),
    "saturated": lambda x: (x > 0.4).float(),
    "drift": lambda x: (x + torch.linspace(0, 0.5, len(x))[:, None, None, None]).clamp(0, 1),
}


@pytest.mark.parametrize("kind", FRAMES)
def test_bad_frames_are_named(kind):
    (finding,) = check_frames(FRAMES[kind](clip()))
    assert finding.kind == kind and LIKELY[kind] in finding.sentence()


def test_contrast_that_washes_out_is_drift():
    frames = clip()
    fade = torch.linspace(1, 0.15, len(frames))[:, None, None, None]
    (finding,) = check_frames(0.5 + (frames - 0.5) * fade)
    assert finding.kind == "drift" and "contrast" in finding.detail


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x,
        lambda x: x[:1],
        lambda x: x.flip(0),
        lambda x: x * 0.15,
        lambda x: (x * 1.8).clamp(0, 1),
        lambda x: torch.cat([x, torch.ones(*x.shape[:3], 1)], dim=-1),
        lambda x: torch.cat([x[:8] * 0.3, x[8:]]),
    ],
    ids=["plain", "one frame", "reversed", "dark", "overexposed", "alpha", "a cut"],
)
def test_good_frames_pass(change):
    assert check_frames(change(clip())) == []


def test_a_single_black_frame_is_told_by_its_number():
    frames = clip()
    frames[7] = 0
    (finding,) = check_frames(frames)
    assert finding.kind == "black frames" and "frame 7 is black" in finding.detail
