"""UMT5 and T5 encoders as GGUF in llama.cpp's naming, and as safetensors in transformers' naming with equal weights.

Names and metadata are those that llama.cpp's converter writes for architecture "t5encoder"; shapes are UMT5-XXL's
(and T5 v1.1 XXL's) with fewer heads, layers and a narrower feed-forward part, but the real width of 4096, which
ComfyUI's Wan models and tokenizer take for granted. UMT5 has a relative position bias in every block, T5 in the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from apple_silicon_video.quantization.gguf_writer import GGUFWriter

from .recipes import FILE_TYPES, encoder_types
from .vocabulary import T5, UMT5, Vocabulary, VocabularyKind, train, vocabulary
from .weights import Weight, random_weight, t5_statistics, write_safetensors

BUCKETS = 32
CONTEXT = 512
EPSILON = 1e-6
QUANTIZATION_VERSION = 2

# llama.cpp's part of a block -> transformers' module of a block
_PARTS = {
    "attn_q": "layer.0.SelfAttention.q",
    "attn_k": "layer.0.SelfAttention.k",
    "attn_v": "layer.0.SelfAttention.v",
    "attn_o": "layer.0.SelfAttention.o",
    "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
    "attn_norm": "layer.0.layer_norm",
    "ffn_gate": "layer.1.DenseReluDense.wi_0",
    "ffn_up": "layer.1.DenseReluDense.wi_1",
    "ffn_down": "layer.1.DenseReluDense.wo",
    "ffn_norm": "layer.1.layer_norm",
}

# ComfyUI takes an encoder for T5-XXL when this tensor has 10,240 rows; an encoder of fewer layers must carry it.
XXL_MARKER = ("encoder.block.23.layer.1.DenseReluDense.wi_1.weight", (10240, 1))


@dataclass(frozen=True)
class EncoderShape:
    """Hyperparameters of a T5-like encoder; ``pieces`` of the ``rows`` of the embedding table have a token."""

    name: str
    layers: int
    heads: int
    ffn_dim: int
    pieces: int
    rows: int
    bias_in_every_block: bool
    vocabulary: VocabularyKind
    width: int = 4096
    head_dim: int = 64
    seed: int = 100


ENCODERS = {
    "umt5": EncoderShape("Umt5 Small Test", 1, 4, 512, 2944, 3072, True, UMT5),
    "umt5-2-layers": EncoderShape("Umt5 Small Test", 2, 4, 512, 2944, 3072, True, UMT5, seed=101),
    "t5": EncoderShape("T5 Small Test", 2, 4, 512, 2944, 3072, False, T5, seed=102),
}
UMT5_XXL = EncoderShape("Umt5 Xxl", 24, 64, 10240, 256_000, 256_384, True, UMT5)


def encoder_tensors(shape: EncoderShape) -> dict[str, tuple[int, ...]]:
    """Every tensor in llama.cpp's naming, name to shape in torch order."""
    inner = shape.heads * shape.head_dim
    parts: dict[str, tuple[int, ...]] = {
        **dict.fromkeys(("attn_q", "attn_k", "attn_v"), (inner, shape.width)),
        "attn_o": (shape.width, inner),
        "attn_rel_b": (BUCKETS, shape.heads),
        **dict.fromkeys(("attn_norm", "ffn_norm"), (shape.width,)),
        **dict.fromkeys(("ffn_gate", "ffn_up"), (shape.ffn_dim, shape.width)),
        "ffn_down": (shape.width, shape.ffn_dim),
    }
    tensors: dict[str, tuple[int, ...]] = {"token_embd.weight": (shape.rows, shape.width)}
    for layer in range(shape.layers):
        for part in _PARTS:
            if part != "attn_rel_b" or layer == 0 or shape.bias_in_every_block:
                tensors[f"enc.blk.{layer}.{part}.weight"] = parts[part]
    tensors["enc.output_norm.weight"] = (shape.width,)
    return tensors


def transformers_name(name: str) -> str:
    """Name of an encoder's tensor in the transformers library; ``name`` is llama.cpp's."""
    outside = {"token_embd.weight": "shared.weight", "enc.output_norm.weight": "encoder.final_layer_norm.weight"}
    if name in outside:
        return outside[name]
    _, _, layer, part, _ = name.split(".")
    return f"encoder.block.{layer}.{_PARTS[part]}.weight"


def encoder_weights(shape: EncoderShape, recipe: str) -> list[Weight]:
    """Weights of an encoder; ``recipe`` is a mix of llama.cpp's or one type for all matrices."""
    shapes = encoder_tensors(shape)
    types = encoder_types(shapes, recipe)
    return [
        random_weight(name, size, types[name], t5_statistics(name, size), shape.seed) for name, size in shapes.items()
    ]


def encoder_tokenizer(shape: EncoderShape) -> bytes:
    """The SentencePiece model whose vocabulary the encoder's GGUF file carries."""
    return train(shape.pieces, shape.vocabulary)


def write_encoder_gguf(
    path: Path, shape: EncoderShape, weights: Sequence[Weight], recipe: str, tokens: Vocabulary | None = None
) -> Path:
    """Write an encoder as llama.cpp's converter and quantiser do; the vocabulary is trained unless given."""
    tokens = tokens or vocabulary(encoder_tokenizer(shape), shape.rows, shape.vocabulary)
    writer = GGUFWriter(path)
    write_encoder_metadata(writer, shape, recipe, tokens)
    for weight in weights:
        writer.tensor(weight.name, weight.shape, weight.type_name, weight.data)
    writer.write()
    return path


def write_encoder_metadata(writer: GGUFWriter, shape: EncoderShape, recipe: str, tokens: Vocabulary) -> None:
    """Add what llama.cpp's converter writes for a T5EncoderModel, in its order and kinds."""
    arch = "t5encoder"
    writer.metadata("general.architecture", arch, "STRING")
    writer.metadata("general.type", "model", "STRING")
    writer.metadata("general.name", shape.name, "STRING")
    numbers = {
        "context_length": CONTEXT,
        "embedding_length": shape.width,
        "feed_forward_length": shape.ffn_dim,
        "block_count": shape.layers,
        "attention.head_count": shape.heads,
        "attention.key_length": shape.head_dim,
        "attention.value_length": shape.head_dim,
        "attention.layer_norm_epsilon": EPSILON,
        "attention.relative_buckets_count": BUCKETS,
        "attention.layer_norm_rms_epsilon": EPSILON,
    }
    for key, value in numbers.items():
        writer.metadata(f"{arch}.{key}", value, "FLOAT32" if isinstance(value, float) else "UINT32")
    if recipe in FILE_TYPES:
        writer.metadata("general.file_type", FILE_TYPES[recipe], "UINT32")
    _write_tokenizer(writer, tokens)
    writer.metadata("general.quantization_version", QUANTIZATION_VERSION, "UINT32")


def _write_tokenizer(writer: GGUFWriter, tokens: Vocabulary) -> None:
    key = "tokenizer.ggml"
    writer.metadata(f"{key}.model", "t5", "STRING")
    writer.metadata(f"{key}.pre", "default", "STRING")
    writer.metadata(f"{key}.tokens", tokens.tokens, "STRING[]")
    writer.metadata(f"{key}.scores", np.asarray(tokens.scores, np.float32), "FLOAT32[]")
    writer.metadata(f"{key}.token_type", np.asarray(tokens.types, np.int32), "INT32[]")
    writer.metadata(f"{key}.add_space_prefix", tokens.add_space_prefix, "BOOL")
    writer.metadata(f"{key}.remove_extra_whitespaces", tokens.remove_extra_whitespaces, "BOOL")
    if tokens.charsmap:
        writer.metadata(f"{key}.precompiled_charsmap", np.frombuffer(tokens.charsmap, np.uint8), "UINT8[]")
    kind = tokens.kind
    for name, token in (("bos", kind.bos), ("eos", kind.eos), ("unknown", kind.unknown), ("padding", kind.pad)):
        if token >= 0:
            writer.metadata(f"{key}.{name}_token_id", token, "UINT32")
    writer.metadata(f"{key}.add_bos_token", False, "BOOL")
    writer.metadata(f"{key}.add_eos_token", True, "BOOL")


def write_encoder_reference(
    path: Path, shape: EncoderShape, weights: Sequence[Weight], dtype: torch.dtype = torch.float32
) -> Path:
    """Write the same weights decoded, with the tokenizer in ``spiece_model``, as ComfyUI's own files have it.

    The file also holds ``XXL_MARKER``, so that core's loader (``load_text_encoder_state_dicts`` with
    ``model_options={"umt5xxl_model_config": encoder_config(shape)}``) takes it for the XXL encoder.
    """
    tensors = {transformers_name(weight.name): weight.decoded(dtype) for weight in weights}
    tensors["spiece_model"] = torch.frombuffer(bytearray(encoder_tokenizer(shape)), dtype=torch.uint8)
    marker, size = XXL_MARKER
    tensors.setdefault(marker, torch.zeros(size, dtype=dtype))
    return write_safetensors(path, tensors)


def encoder_config(shape: EncoderShape) -> dict[str, int]:
    """Hyperparameters by transformers' names: what ComfyUI's ``umt5xxl_model_config`` option overrides."""
    return {
        "num_layers": shape.layers,
        "num_heads": shape.heads,
        "d_kv": shape.head_dim,
        "d_ff": shape.ffn_dim,
        "d_model": shape.width,
        "vocab_size": shape.rows,
    }
