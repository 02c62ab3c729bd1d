"""The tokenizer rebuilt from GGUF metadata, token for token against the original SentencePiece model."""

import io

import numpy as np
import pytest
import sentencepiece
from apple_silicon_video.quantization.tokenizer import sentencepiece_model
from sentencepiece import sentencepiece_model_pb2 as proto

SENTENCES = [
    "A red fox walks through fresh snow at sunrise, low camera, soft light.",
    "一只红狐在清晨的新雪中行走，低角度镜头，柔和的光线。",
    "Ein roter Fuchs läuft durch frischen Schnee; Straße, Größe, Äpfel!",
    "Рыжая лиса идёт по свежему снегу на рассвете.",
    "赤い狐が朝の新雪の中を歩く。カメラは低い。",
    "ثعلب أحمر يمشي عبر الثلج الطازج عند شروق الشمس",
    "12,345.67 metres — 50% (approx.) <extra_id_0> #tag @user https://example.org/a?b=c",
]
PROBES = [
    *SENTENCES,
    "",
    " ",
    "   leading, trailing   and    inner   spaces   ",
    "tabs\tand\nnewlines\r\n",
    "ＦＵＬＬＷＩＤＴＨ ｔｅｘｔ, ligature ﬁ, circled ①②, superscript x²",
    "combining e\u0301 and precomposed é, Å vs Å",
    "emoji 🦊❄️👨‍👩‍👧 and rare 𠜎𡃁 characters",
    "zero\u200bwidth and no-break\u00a0space",
    "<pad> </s> <unk> <s> literally",
    "sun" * 50,
]


def train(**options):
    """A unigram model trained on the spot; returns its proto."""
    model = io.BytesIO()
    settings = {
        "vocab_size": 420,
        "model_type": "unigram",
        "character_coverage": 0.98,
        "pad_id": 0,
        "eos_id": 1,
        "unk_id": 2,
        "bos_id": -1,
        "hard_vocab_limit": False,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20), model_writer=model, **(settings | options)
    )
    return proto.ModelProto.FromString(model.getvalue())


def gguf_metadata(model, pad_to=0):
    """What llama.cpp's converter stores of a SentencePiece model."""
    tokens = [piece.piece for piece in model.pieces]
    padding = [f"[PAD{i}]" for i in range(len(tokens), pad_to)]
    metadata = {
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.tokens": tokens + padding,
        "tokenizer.ggml.scores": np.array([p.score for p in model.pieces] + [-10000.0] * len(padding), np.float32),
        "tokenizer.ggml.token_type": np.array([p.type for p in model.pieces] + [5] * len(padding), np.int32),
        "tokenizer.ggml.add_space_prefix": model.normalizer_spec.add_dummy_prefix,
        "tokenizer.ggml.remove_extra_whitespaces": model.normalizer_spec.remove_extra_whitespaces,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 2,
    }
    if model.normalizer_spec.precompiled_charsmap:
        charsmap = np.frombuffer(model.normalizer_spec.precompiled_charsmap, np.uint8)
        metadata["tokenizer.ggml.precompiled_charsmap"] = charsmap
    return metadata


def processor(serialized):
    return sentencepiece.SentencePieceProcessor(model_proto=serialized, add_eos=True)


@pytest.mark.parametrize(
    "options",
    [
        {"byte_fallback": True},
        {"byte_fallback": False},
        {"normalization_rule_name": "identity", "byte_fallback": True},
        {"normalization_rule_name": "nfkc_cf", "remove_extra_whitespaces": False},
        {"add_dummy_prefix": False, "byte_fallback": True},
        {"user_defined_symbols": ["<extra_id_0>", "fox"], "byte_fallback": True},
    ],
    ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items()),
)
def test_equals_sentencepiece_token_for_token(options):
    model = train(**options)
    original = processor(model.SerializeToString())
    rebuilt = processor(sentencepiece_model(gguf_metadata(model)))
    for text in PROBES:
        assert rebuilt.encode(text) == original.encode(text), text


def test_padding_rows_as_in_umt5_change_no_token():
    model = train(byte_fallback=True)
    original = processor(model.SerializeToString())
    rebuilt = processor(sentencepiece_model(gguf_metadata(model, pad_to=len(model.pieces) + 64)))
    assert rebuilt.get_piece_size() == len(model.pieces) + 64
    for text in [*PROBES, f"[PAD{len(model.pieces)}]"]:
        assert rebuilt.encode(text) == original.encode(text), text


def test_charsmap_matters():
    model = train(byte_fallback=True)
    metadata = gguf_metadata(model)
    del metadata["tokenizer.ggml.precompiled_charsmap"]
    text = "ＦＵＬＬＷＩＤＴＨ"
    original = processor(model.SerializeToString())
    assert processor(sentencepiece_model(metadata)).encode(text) != original.encode(text)


def test_other_vocabularies_are_refused():
    metadata = gguf_metadata(train())
    with pytest.raises(ValueError, match="'llama'"):
        sentencepiece_model(metadata | {"tokenizer.ggml.model": "llama"})
    with pytest.raises(ValueError, match="must agree"):
        sentencepiece_model(metadata | {"tokenizer.ggml.scores": np.zeros(3, np.float32)})
    del metadata["tokenizer.ggml.tokens"]
    with pytest.raises(KeyError, match=r"tokenizer\.ggml\.tokens"):
        sentencepiece_model(metadata)
