"""HDR pictures (PQ and HLG) as standard dynamic range.

PQ and its inverse, HLG's inverse OETF and its OOTF are those of ITU-R BT.2100-2 (tables 4 and 5); the curve is the
EETF of ITU-R BT.2390-8, section 5.4.1, applied to the largest of R, G and B so that hues stay, from a 1000 cd/m2
picture to reference white at 203 cd/m2 (ITU-R BT.2408). BT.2020 primaries become BT.709 by the matrix of ITU-R
BT.2407, and what lies outside is clipped. The result is coded for a BT.1886 display, as SDR video is.
"""

from __future__ import annotations

import torch
from torch import Tensor

PQ_M1, PQ_M2 = 2610 / 16384, 2523 / 4096 * 128
PQ_C1, PQ_C2, PQ_C3 = 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32
HLG_A, HLG_B, HLG_C = 0.17883277, 0.28466892, 0.55991073
HLG_GAMMA = 1.2  # at a peak of 1000 cd/m2
LUMA_2020 = (0.2627, 0.6780, 0.0593)
PQ_PEAK = 10000.0  # cd/m2
MASTER_PEAK = 1000.0
REFERENCE_WHITE = 203.0
DISPLAY_GAMMA = 2.4
BT2020_TO_BT709 = (
    (1.6605, -0.5876, -0.0728),
    (-0.1246, 1.1329, -0.0083),
    (-0.0182, -0.1006, 1.1187),
)


def pq_to_nits(code: Tensor) -> Tensor:
    """PQ code values in 0..1 to cd/m2 in 0..10000."""
    power = code.clamp(0, 1).pow(1 / PQ_M2)
    return PQ_PEAK * ((power - PQ_C1).clamp_min(0) / (PQ_C2 - PQ_C3 * power)).pow(1 / PQ_M1)


def nits_to_pq(nits: Tensor) -> Tensor:
    """cd/m2 in 0..10000 to PQ code values in 0..1."""
    power = (nits / PQ_PEAK).clamp(0, 1).pow(PQ_M1)
    return ((PQ_C1 + PQ_C2 * power) / (1 + PQ_C3 * power)).pow(PQ_M2)


def hlg_to_nits(code: Tensor) -> Tensor:
    """HLG code values [3, ...] in 0..1 to cd/m2 on a display with a peak of 1000."""
    code = code.clamp(0, 1)
    scene = torch.where(code <= 0.5, code.square() / 3, (((code - HLG_C) / HLG_A).exp() + HLG_B) / 12)
    luma = sum(weight * channel for weight, channel in zip(LUMA_2020, scene))
    assert isinstance(luma, Tensor)
    return MASTER_PEAK * luma.clamp_min(1e-12).pow(HLG_GAMMA - 1) * scene


def compress(nits: Tensor, source_peak: float = MASTER_PEAK, target_peak: float = REFERENCE_WHITE) -> Tensor:
    """The EETF of BT.2390: luminance up to `source_peak` to luminance up to `target_peak`, both in cd/m2."""
    scale = nits_to_pq(torch.tensor(source_peak, dtype=nits.dtype))
    largest = nits_to_pq(torch.tensor(target_peak, dtype=nits.dtype)) / scale
    knee = 1.5 * largest - 0.5
    value = (nits_to_pq(nits) / scale).clamp(0, 1)
    t = (value - knee) / (1 - knee)
    t2, t3 = t.square(), t.pow(3)
    rolled = (2 * t3 - 3 * t2 + 1) * knee + (t3 - 2 * t2 + t) * (1 - knee) + (3 * t2 - 2 * t3) * largest
    return pq_to_nits(torch.where(value < knee, value, rolled) * scale)


TO_NITS = {"pq": pq_to_nits, "hlg": hlg_to_nits}


def to_sdr(code: Tensor, kind: str, wide: bool = True) -> Tensor:
    """An HDR picture as SDR code values in 0..1.

    code: floating [3, H, W], R'G'B' of PQ or HLG in 0..1. kind: a key of TO_NITS. wide: primaries are BT.2020's, not
    BT.709's.
    """
    nits = TO_NITS[kind](code)
    peak = nits.amax(0, keepdim=True)
    light = nits * (compress(peak) / peak.clamp_min(1e-6))
    if wide:
        light = torch.einsum("ij,jhw->ihw", torch.tensor(BT2020_TO_BT709, dtype=light.dtype), light)
    return (light / REFERENCE_WHITE).clamp_(0, 1).pow_(1 / DISPLAY_GAMMA)
