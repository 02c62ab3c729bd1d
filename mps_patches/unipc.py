"""UniPC's coefficients in float32: the reason why uni_pc gives washed or garbled frames where euler is clean.

Two entries with one cure: what a coarse `expm1` on the device adds, and what float32 in ComfyUI's own code costs on
any device. Facts: ComfyUI 7027, 15921, 15793; the numbers are computed by the probes.
"""

from __future__ import annotations

from .comfy_unipc import TARGETS, exact_update, probe_device, probe_float64
from .registry import Cure, Defect
from .unipc_weights import StepWeights, phi, step_weights

__all__ = ["DEFECTS", "StepWeights", "phi", "step_weights"]

_CURE = Cure(TARGETS, exact_update)
_SEAM = "comfy.extra_samplers.uni_pc.UniPC.multistep_uni_pc_bh_update"
_SYMPTOM = "Washed, banded or garbled frames with uni_pc, no error; euler is clean."
_TRIGGER = "uni_pc or uni_pc_bh2 with many steps or a high shift: half-logSNR steps h of 0.01 and less."

DEFECTS = (
    Defect(
        id="expm1-coarse",
        title="Coarse expm1 in UniPC",
        symptom=_SYMPTOM,
        trigger=_TRIGGER,
        cause="float32 expm1 on MPS is off by more than its last digits, and the coefficients divide that by h^3.",
        affected="ComfyUI versions that compute the coefficients on the device.",
        upstream=("ComfyUI#7027", "ComfyUI#15921", "ComfyUI#15793"),
        seam=_SEAM,
        advice="Use euler, or leave the patch on.",
        probe=probe_device,
        cure=_CURE,
        reference="unipc_weights.step_weights",
    ),
    Defect(
        id="unipc-float32",
        title="UniPC coefficients in float32",
        symptom=_SYMPTOM,
        trigger=_TRIGGER,
        cause="Nearly equal numbers are subtracted in float32; at 50 steps and shift 12 a weight of 0.37 is off by 20.",
        affected="ComfyUI up to 0.30 at least; later versions use float64 on the CPU.",
        upstream=("ComfyUI#7027", "ComfyUI#15921"),
        seam=_SEAM,
        advice="Update ComfyUI, or leave the patch on.",
        probe=probe_float64,
        cure=_CURE,
        reference="unipc_weights.step_weights",
    ),
)
