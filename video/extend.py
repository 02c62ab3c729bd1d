"""Clips of one scene joined into a longer one: the last frames of each start the next, and fade into it.

Image-to-video models make a few seconds at a time; the last frames of one segment are given to the next run as its
start, so both show the same moment there. A cross-fade mixes light, not code values: frames are decoded with the
transfer function of sRGB (IEC 61966-2-1), mixed, and encoded again; only the frames of an overlap are touched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from .errors import VideoError

CURVES: dict[str, Callable[[Tensor], Tensor]] = {
    "smooth": lambda x: x * x * (3 - 2 * x),
    "linear": lambda x: x,
    "cut": lambda x: (x > 0.5).to(x.dtype),
}
"""How much of the next clip a cross-fade shows, by how far it has come (0 to 1); "cut" changes in the middle."""

LARGEST_GAIN = 2.0
LEAST_SPREAD = 1e-3


def last_frames(images: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Split [frames, H, W, C] into the last `count` frames, to start the next clip with, and all before them.

    Both are views. Raises VideoError if there are fewer frames.
    """
    if not 0 < count <= images.shape[0]:
        raise VideoError(
            f"The last {count} frames are wanted and the clip has {images.shape[0]}; ask for 1 to {images.shape[0]}."
        )
    return images[-count:], images[:-count]


def fade(overlap: int, curve: str) -> Tensor:
    """Share of the next clip in each frame of an overlap: float32 [overlap], rising, never quite 0 or 1 but for "cut".

    Frame i of n stands at (i + 1) / (n + 1). curve: one of CURVES.
    """
    return CURVES[curve](torch.arange(1, overlap + 1, dtype=torch.float32) / (overlap + 1))


def join_images(
    segments: Sequence[Tensor],
    overlap: int,
    curve: str = "smooth",
    match_color: bool = False,
    on_segment: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """One clip of several that overlap by `overlap` frames.

    segments: floating [frames, H, W, C] of one size, each of at least `overlap` frames, and of twice as many if it
    overlaps on both sides. Returns [sum of frames - overlap * (segments - 1), H, W, C] in the dtype of the first, on
    its device; it is the only tensor of the clip's size that is made. match_color: give every further clip the means
    and spreads of R', G' and B' that its forerunner has where they overlap, or, without overlap, at the seam.
    on_segment: called with the number of segments done, after each; what it raises ends the work. Raises VideoError.
    """
    _check(segments, overlap)
    if curve not in CURVES:
        raise VideoError(f"The transition {curve!r} is none of {', '.join(CURVES)}; choose one of them.")
    first = segments[0]
    total = sum(len(segment) for segment in segments) - overlap * (len(segments) - 1)
    joined = first.new_empty(total, *first.shape[1:])
    joined[: len(first)] = first
    on_segment(1)
    end = len(first)
    weights = fade(overlap, curve)
    for index, segment in enumerate(segments[1:], 2):
        begin = end - overlap
        tail = joined[begin:end] if overlap else joined[end - 1 : end]
        gain, offset = _color_match(segment[: max(overlap, 1)], tail) if match_color else (None, None)
        if gain is None:
            joined[end : begin + len(segment)] = segment[overlap:]
        for frame in range(overlap if gain is None else len(segment)):
            pixels = segment[frame].to(joined.device)
            if gain is not None and offset is not None:
                pixels = (pixels.float() * gain + offset).clamp(0, 1)
            if frame < overlap:
                pixels = mix(joined[begin + frame], pixels, float(weights[frame]))
            joined[begin + frame] = pixels
        end = begin + len(segment)
        on_segment(index)
    return joined


def mix(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Two frames [H, W, C] as a light mixer shows them: (1 - share) of a and share of b; alpha is mixed as it is."""
    if share in (0, 1):
        return b if share else a
    mixed = torch.lerp(a.float(), b.float(), share)
    light = torch.lerp(_to_light(a[..., :3].float()), _to_light(b[..., :3].float()), share)
    mixed[..., :3] = _from_light(light)
    return mixed.to(a.dtype)


def join_audio(
    clips: Sequence[Mapping[str, Any]],
    frames: Sequence[int],
    overlap: int,
    fps: float | Fraction,
    curve: str = "smooth",
) -> dict[str, Any]:
    """The sound of joined clips: each cut or filled with silence to its frames' length, cross-faded like them.

    clips: AUDIO of one sample rate, as many as `frames` has numbers. Amplitudes add up to 1 throughout a fade, which
    suits two recordings of one moment. Returns AUDIO of the joined length, to the sample. Raises VideoError.
    """
    rates = sorted({int(clip["sample_rate"]) for clip in clips})
    if len(rates) > 1:
        raise VideoError(f"The clips' sounds have {rates} samples a second; convert them to one rate first.")
    if len(clips) != len(frames):
        raise VideoError(f"There are {len(frames)} clips of frames and {len(clips)} of sound; connect as many of each.")
    rate, exact = rates[0], Fraction(fps).limit_denominator(1001)
    channels = max(clip["waveform"].shape[1] for clip in clips)
    for number, clip in enumerate(clips, 1):
        if clip["waveform"].shape[1] not in (1, channels):
            found = clip["waveform"].shape[1]
            raise VideoError(
                f"Sound {number} has {found} channels and another {channels}; mix it to 1 or {channels} first."
            )
    total = sum(frames) - overlap * (len(frames) - 1)
    joined = torch.zeros(1, channels, round(total * rate / exact))
    begin = 0
    for index, (clip, count) in enumerate(zip(clips, frames)):
        start, stop = round(begin * rate / exact), round((begin + count) * rate / exact)
        sound = _of_length(clip["waveform"][:1], stop - start).expand(-1, channels, -1).float()
        if index:
            seam = round((begin + overlap) * rate / exact) - start
            x = (torch.arange(seam, dtype=torch.float32) + 1) / (seam + 1)
            share = CURVES[curve](x)
            joined[..., start : start + seam] *= 1 - share
            sound = torch.cat((sound[..., :seam] * share, sound[..., seam:]), -1)
        joined[..., start:stop] += sound
        begin += count - overlap
    return {"waveform": joined, "sample_rate": rate}


def _check(segments: Sequence[Tensor], overlap: int) -> None:
    if not segments or overlap < 0:
        raise VideoError("There is nothing to join; connect two clips or more, with an overlap of 0 or more frames.")
    size = segments[0].shape[1:]
    for number, segment in enumerate(segments, 1):
        if segment.shape[1:] != size:
            height, width, channels = segment.shape[1:]
            raise VideoError(
                f"Clip {number} is {width}x{height} with {channels} channels and the first is {size[1]}x{size[0]} "
                f"with {size[2]}; scale it to the first one's size."
            )
        sides = (number > 1) + (number < len(segments))
        if len(segment) < max(1, overlap * sides):
            raise VideoError(
                f"Clip {number} has {len(segment)} frames, too few to overlap by {overlap} on "
                f"{'both sides' if sides == 2 else 'one side'}; choose a smaller overlap."
            )


def _color_match(frames: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Gain and offset of each channel, float32 [C], that give frames the means and spreads of a reference."""
    mean, spread = _statistics(frames.to(reference.device))
    wanted_mean, wanted_spread = _statistics(reference)
    gain = torch.where(spread > LEAST_SPREAD, wanted_spread / spread.clamp(min=LEAST_SPREAD), torch.ones_like(spread))
    gain = gain.clamp(1 / LARGEST_GAIN, LARGEST_GAIN)
    gain[3:] = 1
    offset = wanted_mean - gain * mean
    offset[3:] = 0
    return gain, offset


def _statistics(frames: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, frame by frame so that no copy of the clip is made."""
    means = torch.stack([frame.float().mean((0, 1)) for frame in frames])
    squares = torch.stack([frame.float().square().mean((0, 1)) for frame in frames])
    mean = means.mean(0)
    return mean, (squares.mean(0) - mean.square()).clamp(min=0).sqrt()


def _of_length(waveform: Tensor, samples: int) -> Tensor:
    """[..., samples], cut at the end or filled with silence."""
    return torch.nn.functional.pad(waveform, (0, max(0, samples - waveform.shape[-1])))[..., :samples]


def _to_light(value: Tensor) -> Tensor:
    """sRGB's decoding, IEC 61966-2-1: code values 0..1 to light 0..1."""
    value = value.clamp(0, 1)
    return torch.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def _from_light(light: Tensor) -> Tensor:
    """sRGB's encoding, the inverse of `_to_light`."""
    return torch.where(light <= 0.0031308, light * 12.92, 1.055 * light.clamp(min=0.0031308) ** (1 / 2.4) - 0.055)
