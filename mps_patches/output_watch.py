"""Recognises broken output while there is still time: NaN latents, flat or saturated frames, drift over frames.

Each finding names the defect of the table that most often looks like it. Thresholds are far from anything that a
working model makes; they were set on Wan latents (unit variance) and frames from 0 to 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LATENT_LARGE = 60.0  # standard deviations; working Wan latents stay below 10
LATENT_FLAT = 1e-4
FRAME_FLAT = 2 / 255  # standard deviation of a frame
SATURATED_SHARE = 0.98  # of pixels at 0 or 1
DRIFT_MEAN = 0.25  # change of brightness from the first to the last quarter of the clip
DRIFT_CONTRAST = 0.4  # remaining share of contrast
DRIFT_STEADY = 0.8  # share of frame-to-frame changes that go the same way
MIN_DRIFT_FRAMES = 8

LIKELY = {
    "nan": "float16 overflow or baddbmm-uninitialised: try dtype bfloat16 or float32, and look at the MPS Doctor",
    "explosion": "unipc-float32 or scores-2-31: use the euler sampler and leave the attention patch on",
    "flat latent": "pad-rank-5 in the VAE's encoder: leave its patch on",
    "flat frames": "pad-rank-5: leave its patch on, or update torch to 2.15",
    "black frames": "interpolate-half-5d or float16 overflow in the VAE: leave the patch on, or load it in float32",
    "saturated": "float16 overflow in the VAE: load it with dtype bfloat16 or float32",
    "drift": "expm1-coarse or unipc-float32 (washed frames with uni_pc): use the euler sampler",
}


@dataclass(frozen=True)
class Finding:
    """What was seen (a key of ``LIKELY``), in words, and where."""

    kind: str
    detail: str

    def sentence(self) -> str:
        """One sentence for the user."""
        return f"{self.detail}; likely cause: {LIKELY[self.kind]}."


def check_latent(latent: Tensor) -> Finding | None:
    """Look at a denoised latent of any shape, on any device."""
    values = latent.detach().float()
    broken = int((~torch.isfinite(values)).sum())
    if broken:
        return Finding("nan", f"{broken} of {values.numel()} values of the latent are NaN or infinite")
    spread = float(values.std()) if values.numel() > 1 else 1.0
    if spread > LATENT_LARGE:
        return Finding("explosion", f"the latent's standard deviation is {spread:.3g}, far beyond a working model's")
    if spread < LATENT_FLAT:
        return Finding("flat latent", f"the latent is flat (standard deviation {spread:.1g})")
    return None


def check_frames(frames: Tensor) -> list[Finding]:
    """Look at frames [count, height, width, channels] from 0 to 1; at most one finding of each kind."""
    broken = int((~torch.isfinite(frames)).sum())
    if broken:
        return [Finding("nan", f"{broken} of {frames.numel()} values of the frames are NaN or infinite")]
    per_frame = [frame.float() for frame in frames[..., :3]]
    means = torch.stack([frame.mean() for frame in per_frame]).cpu()
    spreads = torch.stack([frame.std() for frame in per_frame]).cpu()
    ends = torch.stack([((frame <= 0) | (frame >= 1)).float().mean() for frame in per_frame]).cpu()

    findings = []
    flat = spreads < FRAME_FLAT
    if bool(flat.any()):
        black = bool((means[flat] < FRAME_FLAT).all())
        what = "black" if black else "of one colour"
        findings.append(Finding("black frames" if black else "flat frames", f"{_which(flat)} {what}"))
    saturated = (ends > SATURATED_SHARE) & ~flat
    if bool(saturated.any()):
        findings.append(Finding("saturated", f"{_which(saturated)} almost only black and white"))
    if not findings and (drift := _drift(means, spreads)) is not None:
        findings.append(drift)
    return findings


def _which(mask: Tensor) -> str:
    numbers = mask.nonzero().flatten().tolist()
    if len(numbers) == len(mask):
        return "all frames are"
    return f"frame {numbers[0]} is" if len(numbers) == 1 else f"{len(numbers)} frames, from {numbers[0]} on, are"


def _drift(means: Tensor, spreads: Tensor) -> Finding | None:
    """A steady change over the clip: brightness that runs away, or contrast that washes out."""
    count = len(means)
    if count < MIN_DRIFT_FRAMES:
        return None
    quarter = count // 4
    change = float(means[-quarter:].mean() - means[:quarter].mean())
    kept = float(spreads[-quarter:].mean() / spreads[:quarter].mean().clamp_min(1e-6))
    steps = means.diff() if abs(change) > DRIFT_MEAN else spreads.diff()
    steady = float(((steps > 0) if float(steps.sum()) > 0 else (steps < 0)).float().mean())
    if steady < DRIFT_STEADY or (abs(change) <= DRIFT_MEAN and kept >= DRIFT_CONTRAST):
        return None
    what = f"brightness changes by {change:+.2f}" if abs(change) > DRIFT_MEAN else f"contrast falls to {kept:.0%}"
    return Finding("drift", f"{what} steadily over {count} frames")
