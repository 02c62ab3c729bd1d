"""Makes small, seeded models in the real file formats, for the demo, the tests and whoever wants to try a loader.

Nothing here knows ComfyUI: names and shapes are tables of published facts, weights are random, files are written by
the pack's own GGUF writer and by safetensors.
"""

from _pack import load_pack

load_pack()

from .full_size import write_full_size_encoder, write_full_size_wan  # noqa: E402
from .loras import ADAPTERS, KEY_STYLES, encoder_lora, lora_targets, published_lora, wan_lora  # noqa: E402
from .recipes import ENCODER_MIXES, WAN_MIXES, encoder_types, sd_cpp_types, wan_types  # noqa: E402
from .scaled import SCALED_LAYOUTS, ScaledModel, scaled_model, write_full_size_scaled, write_scaled  # noqa: E402
from .sets import SETS, make_set  # noqa: E402
from .text_encoders import (  # noqa: E402
    ENCODERS,
    UMT5_XXL,
    encoder_config,
    encoder_tensors,
    encoder_tokenizer,
    encoder_weights,
    transformers_name,
    write_encoder_gguf,
    write_encoder_reference,
)
from .vae import vae_tensors, write_vae  # noqa: E402
from .wan import LAYOUTS, Layout, wan_weights, write_wan_gguf, write_wan_reference  # noqa: E402
from .wan_shapes import SIZES, SMALL, VARIANTS, WanShape, wan_shape, wan_tensors  # noqa: E402
from .weights import Weight, decoded_state_dict, write_safetensors  # noqa: E402

__all__ = [
    "ADAPTERS",
    "ENCODERS",
    "ENCODER_MIXES",
    "KEY_STYLES",
    "LAYOUTS",
    "SCALED_LAYOUTS",
    "SETS",
    "SIZES",
    "SMALL",
    "UMT5_XXL",
    "VARIANTS",
    "WAN_MIXES",
    "Layout",
    "ScaledModel",
    "WanShape",
    "Weight",
    "decoded_state_dict",
    "encoder_config",
    "encoder_lora",
    "encoder_tensors",
    "encoder_tokenizer",
    "encoder_types",
    "encoder_weights",
    "lora_targets",
    "make_set",
    "published_lora",
    "scaled_model",
    "sd_cpp_types",
    "transformers_name",
    "vae_tensors",
    "wan_lora",
    "wan_shape",
    "wan_tensors",
    "wan_types",
    "wan_weights",
    "write_encoder_gguf",
    "write_encoder_reference",
    "write_full_size_encoder",
    "write_full_size_scaled",
    "write_full_size_wan",
    "write_safetensors",
    "write_scaled",
    "write_vae",
    "write_wan_gguf",
    "write_wan_reference",
]
