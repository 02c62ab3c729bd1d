"""T5 and UMT5 encoders as llama.cpp names them, in the names of the transformers library.

Names follow llama.cpp's tensor name table for the architectures "t5" and "t5encoder". Hyperparameters are read from
tensor shapes, which cannot disagree with the weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

ARCHITECTURES = ("t5", "t5encoder")

_OUTSIDE_BLOCKS = {
    "token_embd.weight": "shared.weight",
    "enc.output_norm.weight": "encoder.final_layer_norm.weight",
}
_IN_BLOCK = {
    "attn_norm": "layer.0.layer_norm",
    "attn_q": "layer.0.SelfAttention.q",
    "attn_k": "layer.0.SelfAttention.k",
    "attn_v": "layer.0.SelfAttention.v",
    "attn_o": "layer.0.SelfAttention.o",
    "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
    "ffn_norm": "layer.1.layer_norm",
    "ffn_gate": "layer.1.DenseReluDense.wi_0",
    "ffn_up": "layer.1.DenseReluDense.wi_1",
    "ffn_down": "layer.1.DenseReluDense.wo",
}
_BLOCK_NAME = re.compile(r"enc\.blk\.(\d+)\.(\w+)\.weight")


def transformers_name(name: str) -> str | None:
    """The transformers name of an encoder tensor, or None for what an encoder does not use (the decoder)."""
    if name in _OUTSIDE_BLOCKS:
        return _OUTSIDE_BLOCKS[name]
    match = _BLOCK_NAME.fullmatch(name)
    if match is None or match[2] not in _IN_BLOCK:
        return None
    return f"encoder.block.{match[1]}.{_IN_BLOCK[match[2]]}.weight"


def encoder_config(state_dict: Mapping[str, Any]) -> dict[str, int]:
    """Hyperparameters (transformers' names) of an encoder state dict in transformers' naming.

    Raises:
        KeyError: with the name of a tensor that every encoder has and this one lacks.
    """
    blocks = {int(k.split(".")[2]) for k in state_dict if k.startswith("encoder.block.")}
    layers = max(blocks, default=-1) + 1
    query = state_dict["encoder.block.0.layer.0.SelfAttention.q.weight"]
    heads = state_dict["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"].shape[1]
    needed = list(_OUTSIDE_BLOCKS.values())
    for block in range(layers):
        needed += [f"encoder.block.{block}.{part}.weight" for part in _IN_BLOCK.values()]
    for name in needed:
        if name not in state_dict and not ("relative_attention_bias" in name and ".block.0." not in name):
            raise KeyError(name)
    return {
        "num_layers": layers,
        "d_model": query.shape[1],
        "d_kv": query.shape[0] // heads,
        "num_heads": heads,
        "d_ff": state_dict["encoder.block.0.layer.1.DenseReluDense.wi_1.weight"].shape[0],
        "vocab_size": state_dict["shared.weight"].shape[0],
    }


def is_umt5(state_dict: Mapping[str, Any], layers: int) -> bool:
    """Whether every layer has its own relative attention bias, as in UMT5; T5 has one, in its first layer."""
    name = _IN_BLOCK["attn_rel_b"]
    return all(f"encoder.block.{block}.{name}.weight" in state_dict for block in range(layers))
