"""The entries of attention in the table of defects: probes of attention.py, cures of SDPA and of ComfyUI's functions.

The first three are cured in each model through its override (comfy_attention.py). Core calls attention without a
model's options in places (ControlNets, encoders, Wan Animate's face adapter, PixArt, parts of MMDiT), where no override
is asked: there the cure wraps core's functions process-wide, and leaves every call alone that an override sees.
"""

from __future__ import annotations

from . import attention, comfy_attention
from .registry import Cure, Defect, FirstUse
from .sdpa_cures import causal_in_half, short_query

SDPA = ("torch.nn.functional", "scaled_dot_product_attention")
CORE_FUNCTIONS = (
    "attention_basic",
    "attention_sub_quad",
    "attention_split",
    "attention_pytorch",
    "optimized_attention",
    "optimized_attention_masked",
)
CORE = tuple(("comfy.ldm.modules.attention", name) for name in CORE_FUNCTIONS)

OVERRIDE = (
    "transformer_options['optimized_attention_override'] of a model; the attention blocks of a VAE; for calls without "
    "a model's options the functions of comfy.ldm.modules.attention"
)

DEFECTS = (
    Defect(
        id="scores-2-31",
        title="Attention scores beyond 2^31 elements",
        symptom="Silent noise in long or large videos.",
        trigger="batch x heads x queries x keys in one score tensor at or beyond 2,147,483,648.",
        cause="32-bit element indices in MPSGraph's matrix product and softmax.",
        affected="Every torch version; every attention function of ComfyUI that forms scores, sub-quadratic included.",
        upstream=("ComfyUI#14837", "ComfyUI#14838", "pytorch#179592"),
        seam=OVERRIDE,
        advice="Leave attention on auto in Patch Model for MPS, or make the video shorter or smaller.",
        probe=attention.probe_scores,
        cure=Cure(
            CORE,
            comfy_attention.cure_unreached_scores,
            first_use=dict.fromkeys(
                CORE_FUNCTIONS, FirstUse(comfy_attention.meets_scores, comfy_attention.check_scores)
            ),
        ),
        reference="chunked_attention.reference_attention",
        kind="model",
        footprint=attention.scores_footprint,
    ),
    Defect(
        id="softmax-half",
        title="Half-precision softmax over many keys",
        symptom="Ghosting and smear that grow with length.",
        trigger="bfloat16 or float16 attention over more than about 3,000 keys.",
        cause="Weights and their sum are rounded to half precision.",
        affected="Attention that forms its scores in half precision.",
        upstream=("pytorch#190791",),
        seam=OVERRIDE,
        advice="Leave attention on auto in Patch Model for MPS; it computes scores in float32, block by block.",
        probe=attention.probe_softmax,
        cure=Cure(CORE, comfy_attention.cure_unreached, verify=attention.PATCHED_PROBES["softmax-half"]),
        reference="chunked_attention.reference_attention",
        kind="model",
    ),
    Defect(
        id="sdpa-materialises",
        title="Attention forms all scores at once",
        symptom="`total bytes of NDArray > 2**32`, `Invalid buffer size`, or the process is killed.",
        trigger="scaled_dot_product_attention over thousands of tokens; other head dims than the prefill kernels'.",
        cause="No kernel without a score matrix before torch 2.13.",
        affected="torch before 2.13; since, head dims other than 32, 64, 72, 80, 96, 128 and 256.",
        upstream=("pytorch#179592",),
        seam=OVERRIDE,
        advice="Update torch to 2.13 or later; until then attention runs in blocks, at a lower speed.",
        probe=attention.probe_materialised,
        cure=Cure(CORE, comfy_attention.cure_unreached, verify=attention.PATCHED_PROBES["sdpa-materialises"]),
        reference="chunked_attention.reference_attention",
        kind="model",
    ),
    Defect(
        id="sdpa-causal-half",
        title="Causal attention sees the future",
        symptom="Wrong text or video from causal models, without an error.",
        trigger="scaled_dot_product_attention(is_causal=True) in bfloat16 or float16.",
        cause="The causal mask of the half-precision kernels.",
        affected="Reported in 2026 for current torch.",
        upstream=("pytorch#195910",),
        seam="torch.nn.functional.scaled_dot_product_attention",
        advice="Nothing to do while the patch is on.",
        probe=attention.probe_causal,
        cure=Cure((SDPA,), causal_in_half),
        reference="chunked_attention.reference_attention",
    ),
    Defect(
        id="sdpa-short-query",
        title="Attention with few queries reads out of bounds",
        symptom="Garbage or NaN that changes from run to run.",
        trigger="scaled_dot_product_attention with 1 to 8 queries.",
        cause="The vector kernels read keys beyond the last one and write sums into buffers half the size.",
        affected="torch 2.8 to 2.10.",
        upstream=("pytorch#174861", "pytorch#169222", "pytorch#163597"),
        seam="torch.nn.functional.scaled_dot_product_attention",
        advice="Update torch to 2.11 or later.",
        probe=attention.probe_short_query,
        cure=Cure((SDPA,), short_query),
        reference="chunked_attention.reference_attention",
    ),
)
