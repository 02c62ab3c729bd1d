"""What only an update, a smaller job or another order of work can help: reported and advised on, not patched.

The convolution of macOS 26.2 (pytorch#197114), the largest buffer of this Mac, and the command-buffer abort where CPU
fallback is mixed with fused attention, which cannot be probed because it would end this process.
"""

from __future__ import annotations

import platform
from functools import partial

import torch
from torch import Tensor

from . import probing
from .registry import Defect, ProbeResult

# Feed-forward activations of the 14B model at 1280x720, 81 frames, in half precision: tokens x width x bytes.
LARGEST_ACTIVATION = 75600 * 13824 * 2


def reference(input: Tensor, weight: Tensor) -> Tensor:
    """conv3d as a sum of conv2d over the kernel's frames: input [N, C, T, H, W], weight [O, C, t, h, w], no padding."""
    frames = input.size(2) - weight.size(2) + 1
    slices = [
        sum(
            torch.nn.functional.conv2d(input[:, :, start + k], weight[:, :, k].contiguous())
            for k in range(weight.size(2))
        )
        for start in range(frames)
    ]
    return torch.stack(slices, 2)  # type: ignore[arg-type]


def probe_conv3d(device: torch.device, quick: bool) -> ProbeResult:
    """A causal convolution of the Wan VAE (not quick: 96 channels); macOS 26.2 counts as wrong whatever it shows."""
    channels, side = (8, 16) if quick else (96, 64)
    video = probing.noise((1, channels, 4, side, side))
    weight = probing.noise((channels, channels, 3, 3, 3), seed=1) / channels
    compute = partial(torch.nn.functional.conv3d, video.to(device), weight.to(device))
    found = probing.compare(compute, reference(video, weight), 1e-4, f"conv3d, {channels} channels")
    if platform.mac_ver()[0].split(".")[:2] == ["26", "2"]:
        return ProbeResult(False, found.error, found.tolerance, f"macOS 26.2 has a wrong conv3d; {found.detail}")
    return found


def _footprint(quick: bool) -> int:
    return LARGEST_ACTIVATION + (1 << 20)


def probe_buffer(device: torch.device, quick: bool) -> ProbeResult:
    """Reserve the largest tensor of a 14B run at 1280x720x81, without touching it."""
    try:
        torch.empty(LARGEST_ACTIVATION, dtype=torch.uint8, device=device)
    except RuntimeError as error:
        return ProbeResult(False, float("inf"), 0.0, f"no buffer of {LARGEST_ACTIVATION >> 20} MiB: {error}")
    return ProbeResult(True, 0.0, 0.0, f"a buffer of {LARGEST_ACTIVATION >> 20} MiB can be had")


DEFECTS = (
    Defect(
        id="conv3d-macos-26-2",
        title="conv3d is wrong on macOS 26.2",
        symptom="Wrong frames from every video VAE",
        trigger="torch.nn.functional.conv3d on macOS 26.2",
        cause="the tensor-operation library of that macOS",
        affected="macOS 26.2; right again from 26.3",
        upstream=("pytorch#197114",),
        seam="none",
        advice="macOS 26.2 has a wrong conv3d: update macOS to 26.3 or later.",
        probe=probe_conv3d,
        cure=None,
        reference="system.reference",
        kind="advice",
    ),
    Defect(
        id="buffer-limit",
        title="Largest buffer of this Mac",
        symptom='"Invalid buffer size: ... GB"',
        trigger="a single tensor above Metal's maxBufferLength, such as a materialised score matrix",
        cause="Metal limits one buffer to a part of the memory",
        affected="every Mac, the smaller the earlier",
        upstream=("ComfyUI#11584",),
        seam="none",
        advice="Choose fewer frames or a smaller size, or use Patch Model for MPS, which keeps attention in blocks.",
        probe=probe_buffer,
        cure=None,
        reference="",
        kind="advice",
        footprint=_footprint,
    ),
    Defect(
        id="command-buffer",
        title="Abort on a committed command buffer",
        symptom='The process ends with "commit an already committed command buffer"',
        trigger="operations that fall back to the CPU, mixed with fused attention, or worker threads that use the GPU",
        cause="the fallback commits the command buffer that attention is still encoding into",
        affected="seen on torch 2.13",
        upstream=(),
        seam="none",
        advice="Set PYTORCH_ENABLE_MPS_FALLBACK=0 to see which operation falls back; this pack's own never do.",
        probe=None,
        cure=None,
        reference="",
        kind="advice",
    ),
)
