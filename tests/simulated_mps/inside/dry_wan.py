"""Prints the figures of one dry forward of ComfyUI's Wan 2.1 14B at 832x480x81 as JSON; for test_dry_mode.py."""

import json
import os
import sys
from pathlib import Path

TESTS = str(Path(__file__).resolve().parents[2])
sys.path.append(TESTS)
import simulated_mps as sim  # noqa: E402
import torch  # noqa: E402
from simulated_mps.environment import install_from_environment  # noqa: E402

install_from_environment()
sys.path.insert(0, os.environ["COMFYUI_DIR"])
import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.ldm.wan.model  # noqa: E402
import comfy.ops  # noqa: E402

FRAMES, HEIGHT, WIDTH = 21, 60, 104
CONFIG = {
    "model_type": "t2v", "patch_size": (1, 2, 2), "in_dim": 16, "dim": 5120, "ffn_dim": 13824, "freq_dim": 256,
    "text_dim": 4096, "out_dim": 16, "num_heads": 40, "num_layers": 40,
}  # fmt: skip


def main():
    with torch.device("meta"):
        model = comfy.ldm.wan.model.WanModel(
            **CONFIG, operations=comfy.ops.disable_weight_init, device="meta", dtype=torch.bfloat16
        )
    sim.dry(1 << 18)
    model = model.to_empty(device="mps")
    latent = torch.empty(1, 16, FRAMES, HEIGHT, WIDTH, dtype=torch.bfloat16, device="mps")
    text = torch.empty(1, 512, 4096, dtype=torch.bfloat16, device="mps")
    time = torch.full((1,), 500.0, device="mps")
    sim.reset()
    error = ""
    try:
        with torch.inference_mode(), sim.modules(model):
            model(latent, time, text)
    except RuntimeError as refused:
        error = str(refused)
    stats, timeline = sim.stats(), sim.timeline()
    figures = {
        "tokens": FRAMES * HEIGHT * WIDTH // 4,
        "weights": timeline.before,
        "peak": stats.peak - timeline.before,
        "computed": stats.dry_computed,
        "fell_back": stats.fell_back,
        "float64": stats.float64_ops,
        "modules": list(timeline.by_module()),
        "violations": [violation[:3] for violation in sim.violations()],
        "error": error,
    }
    print(json.dumps(figures))


main()
