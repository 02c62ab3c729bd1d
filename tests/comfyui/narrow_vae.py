"""A custom node pack for tests: Wan 2.2's VAE with 16 channels in place of 160 and 256, and a file of random weights.

ComfyUI recognises that VAE by its tensors' names and takes its width for granted, which is 2.8 GB in float32.
"""

from pathlib import Path

import comfy.ldm.wan.vae2_2
import folder_paths
import torch
from safetensors.torch import save_file

FILE = "small-wan2.2-vae.safetensors"
WHOLE = comfy.ldm.wan.vae2_2.WanVAE


def narrow(**options):
    return WHOLE(**options | {"dim": 16, "dec_dim": 16})


def random_weights():
    torch.manual_seed(3)
    model = narrow(z_dim=48, temperal_downsample=[False, True, True])
    weights = {}
    for name, weight in model.state_dict().items():
        if name.endswith("gamma"):
            weights[name] = torch.ones(weight.shape)
        else:
            scale = weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.05
            weights[name] = torch.randn(weight.shape) * scale
    return weights


comfy.ldm.wan.vae2_2.WanVAE = narrow
with torch.inference_mode():
    save_file(random_weights(), Path(folder_paths.get_folder_paths("vae")[0]) / FILE)
NODE_CLASS_MAPPINGS = {}
