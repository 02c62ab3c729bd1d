"""A real SentencePiece unigram vocabulary, trained on the spot on generated text in many scripts.

UMT5's has 256,000 pieces with pad 0, eos 1, bos 2, unk 3 and byte fallback, in a table of 256,384 rows; T5's has no
bos and unk 2, without byte fallback. The special ids matter: T5 models pad with 0, end every prompt with 1, and have
no use for bos. Text is generated because a vocabulary needs many different words and the repository holds no corpus.
"""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import sentencepiece
from apple_silicon_video.quantization.quantizer_vocabulary import protobuf_fields


@dataclass(frozen=True)
class VocabularyKind:
    """Special ids (-1 where absent) and byte fallback of a family's vocabularies."""

    pad: int = 0
    eos: int = 1
    bos: int = 2
    unknown: int = 3
    byte_fallback: bool = True


UMT5 = VocabularyKind()
T5 = VocabularyKind(bos=-1, unknown=2, byte_fallback=False)

# Words that prompts are made of, so that they come out as whole pieces, and syllables to build other words from.
_WORDS = {
    "en": "a the of in on with and over under at by video camera slow motion close up wide shot cat dog horse bird fox "
    "woman man child street city forest river mountain sea beach sunset morning night rain snow wind light shadow red "
    "blue green golden dark bright walking running flying dancing playing looking through across towards cinematic "
    "realistic detailed high quality style film grain colour sky cloud water fire smoke car train boat bridge window",
    "de": "ein eine der die das und mit über unter Straße Stadt Wald Fluss Meer Licht Schatten Hund Katze läuft tanzt",
    "fr": "un une le la les et avec sur sous rue ville forêt rivière mer lumière ombre chien chat qui marche été",
    "ru": "в на и с под над город лес река море свет тень собака кошка идёт танцует ночь утро снег дождь",
    "zh": "一 只 的 在 和 上 下 猫 狗 女人 男人 城市 森林 河流 大海 灯光 夜晚 早晨 下雪 雨 走 跑 跳舞 高清 镜头 慢动作",
    "ja": "の は が に を と 猫 犬 街 森 川 海 光 夜 朝 雪 雨 歩く 走る ゆっくり カメラ シネマ",
    "ko": "고양이 개 도시 숲 강 바다 빛 밤 아침 눈 비 걷는 달리는 천천히 카메라 영화",
    "ar": "قطة كلب مدينة غابة نهر بحر ضوء ليل صباح ثلج مطر يمشي يركض كاميرا",
    "hi": "बिल्ली कुत्ता शहर जंगल नदी समुद्र रोशनी रात सुबह बर्फ बारिश चलता दौड़ता कैमरा",
}
_SYLLABLES = (
    "ba be bi bo bu ka ke ki ko ku la le li lo lu ma me mi mo mu na ne ni no nu ra re ri ro ru sa se si so su ta te ti "
    "to tu va ve vi vo vu st tr pl gr ing er an en ar or al el",
    "ба бе би бо ка ко ку ла ле ли ма ме на не ни ра ро са ся та те ти ва ви по при ст ный ать",
    "αλ βε γα δι εκ ζω θα ιν κα λο με νο ξι πα ρο σε τι υπ φω χα ψυ ων",
    "あ い う え お か き く け こ さ し す せ そ た ち つ て と な に ぬ ね の ま み む め も ら り る れ ろ",
    "가 나 다 라 마 바 사 아 자 차 카 타 파 하 고 노 도 로 모 보 소 오 조 기 니 디 리 미 시 이 지",
    "天 地 人 日 月 星 山 水 火 木 金 土 花 鸟 鱼 虫 车 船 路 桥 门 窗 红 绿 蓝 白 黑 大 小 高 低 长 短",
)
_PUNCTUATION = (" ", " ", " ", " ", " ", ", ", ". ", "! ", "? ", ": ", "; ", " - ", "，", "。")


def training_text(seed: int, lines: int) -> Iterator[str]:
    """Lines of prompt-like text: real words of nine languages, made-up words of six scripts, numbers, punctuation."""
    chance = random.Random(seed)
    words = [text.split() for text in _WORDS.values()]
    syllables = [text.split() for text in _SYLLABLES]
    for _ in range(lines):
        parts = []
        for _ in range(chance.randint(6, 18)):
            if chance.random() < 0.5:
                parts.append(chance.choice(chance.choice(words)))
            elif chance.random() < 0.1:
                parts.append(str(chance.randint(0, 4096)))
            else:
                script = chance.choice(syllables)
                parts.append("".join(chance.choices(script, k=chance.randint(1, 4))))
            parts.append(chance.choice(_PUNCTUATION))
        line = "".join(parts).strip()
        yield line.title() if chance.random() < 0.1 else line[:1].upper() + line[1:]


@lru_cache(maxsize=4)
def train(pieces: int, kind: VocabularyKind = UMT5, seed: int = 0, lines: int = 4000) -> bytes:
    """Serialised SentencePiece model (ModelProto) of exactly ``pieces`` pieces, the same for the same arguments."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=training_text(seed, lines),
        model_writer=model,
        model_type="unigram",
        vocab_size=pieces,
        character_coverage=1.0,
        normalization_rule_name="nmt_nfkc",
        byte_fallback=kind.byte_fallback,
        pad_id=kind.pad,
        eos_id=kind.eos,
        bos_id=kind.bos,
        unk_id=kind.unknown,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


# SentencePiece's piece types, which GGUF's tokenizer.ggml.token_type takes over.
NORMAL, UNKNOWN, CONTROL, UNUSED, BYTE = 1, 2, 3, 5, 6
_PADDING_SCORE = -10000.0


@dataclass(frozen=True)
class Vocabulary:
    """Pieces, scores and types of ``rows`` tokens as llama.cpp stores them, and the normaliser's settings."""

    tokens: list[str]
    scores: list[float]
    types: list[int]
    charsmap: bytes
    add_space_prefix: bool
    remove_extra_whitespaces: bool
    kind: VocabularyKind


def vocabulary(proto: bytes, rows: int, kind: VocabularyKind = UMT5) -> Vocabulary:
    """Read a SentencePiece model the way llama.cpp's converter does; rows beyond the pieces are unused [PADn]."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
    pieces = processor.get_piece_size()
    checks = (
        (processor.is_unknown, UNKNOWN),
        (processor.is_control, CONTROL),
        (processor.is_unused, UNUSED),
        (processor.is_byte, BYTE),
    )
    charsmap, add_space_prefix, remove_extra_whitespaces = _normalizer(proto)
    padding = range(pieces, rows)
    return Vocabulary(
        tokens=[processor.id_to_piece(i) for i in range(pieces)] + [f"[PAD{i}]" for i in padding],
        scores=[processor.get_score(i) for i in range(pieces)] + [_PADDING_SCORE] * len(padding),
        types=[next((found for check, found in checks if check(i)), NORMAL) for i in range(pieces)]
        + [UNUSED] * len(padding),
        charsmap=charsmap,
        add_space_prefix=add_space_prefix,
        remove_extra_whitespaces=remove_extra_whitespaces,
        kind=kind,
    )


def synthetic_vocabulary(pieces: int, rows: int, kind: VocabularyKind = UMT5) -> Vocabulary:
    """A vocabulary of the real size without training: special pieces, bytes, then numbered words."""
    special = {kind.pad: "<pad>", kind.eos: "</s>", kind.bos: "<s>", kind.unknown: "<unk>"}
    tokens = [special[i] for i in range(max(special) + 1)]
    types = [UNKNOWN if token == "<unk>" else CONTROL for token in tokens]
    if kind.byte_fallback:
        tokens += [f"<0x{byte:02X}>" for byte in range(256)]
        types += [BYTE] * 256
    words = pieces - len(tokens)
    tokens += [f"▁word{i}" for i in range(words)] + [f"[PAD{i}]" for i in range(pieces, rows)]
    types += [NORMAL] * words + [UNUSED] * (rows - pieces)
    scores = [-float(i % 16384) / 1024 for i in range(pieces)] + [_PADDING_SCORE] * (rows - pieces)
    return Vocabulary(tokens, scores, types, b"", True, True, kind)


def _normalizer(proto: bytes) -> tuple[bytes, bool, bool]:
    """Character map, dummy prefix and whitespace removal from the ModelProto's normalizer_spec (its field 3)."""
    spec = dict(protobuf_fields(dict(protobuf_fields(proto))[3]))
    return bytes(spec.get(2, b"")), bool(spec.get(3, 1)), bool(spec.get(4, 1))
