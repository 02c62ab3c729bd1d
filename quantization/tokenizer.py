"""Rebuilds a SentencePiece model from the vocabulary that llama.cpp stores in a GGUF file.

The message layout (field numbers, piece types) is that of sentencepiece_model.proto; llama.cpp keeps the same piece
types and the normaliser's compiled character map. The few fields needed are encoded here, so that no protobuf
runtime is required.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

UNIGRAM = 1
BYTE_PIECE = 6


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _integer(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _pieces(tokens: list[str], scores: np.ndarray, kinds: np.ndarray) -> bytes:
    """The repeated field ``pieces``. UMT5 has 256,384 of them, so lengths and types come from tables."""
    lengths = [_varint(length) for length in range(256)]
    types = {int(kind): _integer(3, int(kind)) for kind in np.unique(kinds)}
    packed = scores.astype("<f4").tobytes()
    parts: list[bytes] = []
    for index, (token, kind) in enumerate(zip(tokens, kinds.tolist())):
        text = token.encode("utf-8", "surrogateescape")
        length = lengths[len(text)] if len(text) < 256 else _varint(len(text))
        piece = b"\x0a" + length + text + b"\x15" + packed[4 * index : 4 * index + 4] + types[kind]
        parts += (b"\x0a", lengths[len(piece)] if len(piece) < 256 else _varint(len(piece)), piece)
    return b"".join(parts)


def sentencepiece_model(metadata: Mapping[str, Any]) -> bytes:
    """Serialised SentencePiece ModelProto of a GGUF file's ``tokenizer.ggml.*`` metadata.

    Raises:
        KeyError: the vocabulary (tokens, scores or token types) is not in the file.
        ValueError: it is of another kind than SentencePiece unigram, or its arrays differ in length.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind != "t5":
        raise ValueError(f"its tokenizer is of the kind {kind!r}, not the SentencePiece unigram ('t5') of T5 models")
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    scores = np.asarray(metadata["tokenizer.ggml.scores"], dtype=np.float32)
    kinds = np.asarray(metadata["tokenizer.ggml.token_type"], dtype=np.int32)
    if not len(tokens) == len(scores) == len(kinds):
        raise ValueError(
            f"its vocabulary has {len(tokens)} tokens, {len(scores)} scores and {len(kinds)} types, which must agree"
        )

    trainer = _integer(3, UNIGRAM) + _integer(4, len(tokens)) + _integer(35, int((kinds == BYTE_PIECE).any()))
    special = {"unknown": (40, 45), "bos": (41, 46), "eos": (42, 47), "padding": (43, 48)}
    for name, (id_field, piece_field) in special.items():
        token_id = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if token_id is not None and 0 <= token_id < len(tokens):
            trainer += _integer(id_field, int(token_id))
            trainer += _bytes(piece_field, tokens[token_id].encode("utf-8", "surrogateescape"))

    charsmap = metadata.get("tokenizer.ggml.precompiled_charsmap")
    normalizer = b"" if charsmap is None else _bytes(2, np.asarray(charsmap, dtype=np.uint8).tobytes())
    normalizer += _integer(3, int(metadata.get("tokenizer.ggml.add_space_prefix", True)))
    normalizer += _integer(4, int(metadata.get("tokenizer.ggml.remove_extra_whitespaces", True)))
    normalizer += _integer(5, 1)
    return _pieces(tokens, scores, kinds) + _bytes(2, trainer) + _bytes(3, normalizer)
