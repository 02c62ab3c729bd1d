"""A custom node pack for the test servers only: core's CLIP loader for small encoders, and tensors as files."""

import os

import comfy.sd
import folder_paths
import numpy as np


class CoreCLIPLoader:
    """comfy.sd.load_clip with the size of a small UMT5, which core cannot see in a file."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("CLIP",), "load", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"clip_name": (folder_paths.get_filename_list("text_encoders"),), "config": ("STRING",)}}

    def load(self, clip_name, config):
        import json

        path = folder_paths.get_full_path_or_raise("text_encoders", clip_name)
        options = {"umt5xxl_model_config": json.loads(config)}
        return (comfy.sd.load_clip([path], clip_type=comfy.sd.CLIPType.WAN, model_options=options),)


class SaveTensor:
    """Frames as float32 .npy in the output folder, without any rounding."""

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "save", "test", True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"images": ("IMAGE",), "name": ("STRING",)}}

    def save(self, images, name):
        file = f"{name}.npy"
        np.save(os.path.join(folder_paths.get_output_directory(), file), images.float().cpu().numpy())
        return {"ui": {"tensors": [{"filename": file, "subfolder": "", "type": "output"}]}}


NODE_CLASS_MAPPINGS = {"CoreCLIPLoader": CoreCLIPLoader, "SaveTensor": SaveTensor}
