"""Stores a SentencePiece model in GGUF metadata, as llama.cpp's converter does for T5 and UMT5 encoders.

The message layout (field numbers, piece types) is that of sentencepiece_model.proto. The few fields needed are
decoded here, so that neither protobuf nor sentencepiece is required.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from .gguf_writer import GGUFWriter
from .quantizer import QuantizeError

_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_SPECIAL = {"unknown": (40, 0), "bos": (41, 1), "eos": (42, 2), "padding": (43, -1)}
_NORMAL, _UNUSED = 1, 5
_PADDING_SCORE = -10000.0
_FIXED_SIZES = {1: 8, 5: 4}


def write_vocabulary(writer: GGUFWriter, model: bytes, rows: int, file_name: str) -> None:
    """Add the ``tokenizer.ggml`` entries for a SentencePiece model; ``rows`` of the embedding beyond it are unused.

    Raises:
        QuantizeError: ``model`` is no SentencePiece model or has more pieces than ``rows``.
    """
    try:
        tokens, scores, kinds, trainer, normalizer = _decoded(model)
    except (IndexError, KeyError, ValueError) as error:
        raise QuantizeError(f"{file_name} has a damaged vocabulary: download it again.") from error
    if not 0 < len(tokens) <= rows:
        raise QuantizeError(
            f"{file_name} has a vocabulary of {len(tokens)} pieces and an embedding of {rows} rows: "
            "use the vocabulary that belongs to the model."
        )
    padding = range(len(tokens), rows)
    tokens += [f"[PAD{index}]".encode() for index in padding]
    scores += [_PADDING_SCORE] * len(padding)
    kinds += [_UNUSED] * len(padding)
    key = "tokenizer.ggml"
    writer.metadata(f"{key}.model", "t5", "STRING")
    writer.metadata(f"{key}.pre", "default", "STRING")
    writer.metadata(f"{key}.tokens", tokens, "STRING[]")
    writer.metadata(f"{key}.scores", np.asarray(scores, np.float32), "FLOAT32[]")
    writer.metadata(f"{key}.token_type", np.asarray(kinds, np.int32), "INT32[]")
    writer.metadata(f"{key}.add_space_prefix", bool(normalizer.get(3, 1)), "BOOL")
    writer.metadata(f"{key}.remove_extra_whitespaces", bool(normalizer.get(4, 1)), "BOOL")
    if normalizer.get(2):
        writer.metadata(f"{key}.precompiled_charsmap", np.frombuffer(normalizer[2], np.uint8), "UINT8[]")
    for name, (number, default) in _SPECIAL.items():
        token = int(np.int64(np.uint64(trainer.get(number, default % 2**64))))
        if token >= 0:
            writer.metadata(f"{key}.{name}_token_id", token, "UINT32")
    writer.metadata(f"{key}.add_bos_token", False, "BOOL")
    writer.metadata(f"{key}.add_eos_token", True, "BOOL")


def _decoded(model: bytes) -> tuple[list[bytes], list[float], list[int], dict[int, Any], dict[int, Any]]:
    tokens: list[bytes] = []
    scores: list[float] = []
    kinds: list[int] = []
    parts: dict[int, dict[int, Any]] = {_TRAINER: {}, _NORMALIZER: {}}
    for number, value in protobuf_fields(model):
        if number == _PIECES:
            piece = dict(protobuf_fields(value))
            tokens.append(piece[1])
            scores.append(float(np.frombuffer(piece.get(2, b"\0\0\0\0"), "<f4")[0]))
            kinds.append(piece.get(3, _NORMAL))
        elif number in parts:
            parts[number] = dict(protobuf_fields(value))
    return tokens, scores, kinds, parts[_TRAINER], parts[_NORMALIZER]


def protobuf_fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a protobuf message: varints as int, everything else as bytes.

    Raises ValueError, IndexError or KeyError for a damaged one.
    """
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        if key & 7 == 0:
            value, position = _varint(message, position)
            yield key >> 3, value
            continue
        length, position = _varint(message, position) if key & 7 == 2 else (_FIXED_SIZES[key & 7], position)
        if position + length > len(message):
            raise ValueError("a field ends behind its message")
        yield key >> 3, message[position : position + length]
        position += length


def _varint(message: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[position]
        value |= (byte & 0x7F) << shift
        position += 1
        shift += 7
        if byte < 0x80:
            return value, position
