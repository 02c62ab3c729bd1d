"""Types of the tensors of small models: the pack's recipes, and those of stable-diffusion.cpp's converter.

stable-diffusion.cpp quantises whatever fits but embeddings and biases, modulation, norms and head included.
"""

from __future__ import annotations

from apple_silicon_video.quantization.recipes import (
    ENCODER_MIXES,
    FILE_TYPES,
    WAN_MIXES,
    Shapes,
    Types,
    encoder_types,
    fitting,
    known,
    wan_types,
)

__all__ = ["ENCODER_MIXES", "FILE_TYPES", "WAN_MIXES", "Shapes", "Types", "encoder_types", "sd_cpp_types", "wan_types"]

_UNQUANTIZED = ("embedding", ".bias", ".scale")


def sd_cpp_types(shapes: Shapes, recipe: str, kept: str = "F16") -> Types:
    """Types of a Wan file as stable-diffusion.cpp converts it: also modulation, norms and head are quantised."""
    known(recipe)
    return {
        name: kept if any(part in name for part in _UNQUANTIZED) else fitting(recipe, shape, kept)
        for name, shape in shapes.items()
    }
