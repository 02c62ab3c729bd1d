"""The quantiser's errors against llama.cpp's, hard rows, refusals, and independence of threads and piece sizes."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from apple_silicon_video.quantization import quantizer
from apple_silicon_video.quantization.formats import FORMATS
from apple_silicon_video.quantization.quantizer import QuantizeError, decoded, quantize, quantized_pieces
from apple_silicon_video.quantization.quantizer_blocks import ENCODERS
from apple_silicon_video.tests.unit.quantizer_rows import KINDS, importance, rows

LLAMA = json.loads(
    (Path(__file__).resolve().parents[1] / "data" / "llama_quantize_rmse.json").read_text(encoding="utf-8")
)["rmse"]
TYPES = tuple(ENCODERS)


def rmse(values, data, type_name, weights=None):
    squares = np.square(decoded(data, type_name).reshape(values.shape) - values, dtype=np.float64)
    return np.sqrt(np.average(squares.reshape(-1, values.shape[-1]).mean(axis=0), weights=weights))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("type_name", TYPES)
def test_error_is_at_most_one_percent_above_llama_cpps(type_name, kind):
    values, weights = rows(kind), importance()
    theirs = LLAMA[type_name][kind]
    assert rmse(values, quantize(values, type_name), type_name) <= 1.01 * theirs["plain"]
    weighted = quantize(values, type_name, weights)
    assert rmse(values, weighted, type_name, weights) <= 1.01 * theirs["weighted"]


@pytest.mark.parametrize("type_name", TYPES)
def test_importance_lowers_the_error_where_it_says(type_name):
    values, weights = rows("gaussian"), importance()
    plain, weighted = quantize(values, type_name), quantize(values, type_name, weights)
    assert rmse(values, weighted, type_name, weights) < rmse(values, plain, type_name, weights)


@pytest.mark.parametrize("type_name", TYPES)
def test_gguf_py_decodes_the_blocks_to_the_same_weights(type_name):
    data = quantize(rows("heavy-tailed"), type_name)
    theirs = gguf.dequantize(data, gguf.GGMLQuantizationType[type_name])
    assert np.array_equal(theirs.reshape(-1), decoded(data, type_name))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("type_name", TYPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_hard_rows_never_give_undefined_weights(type_name, weighted):
    random = np.random.default_rng(0)
    values = np.zeros((14, 512), np.float32)
    values[1], values[2] = 1.0, -3.5
    values[3, 7] = 1000
    values[4, ::2], values[4, 1::2] = 1, -1
    values[5] = random.standard_normal(512) * 1e-8
    values[6] = random.standard_normal(512) * 1e-30
    values[7] = random.standard_normal(512) * 1e30
    values[8, 3], values[8, 4] = 3.4e38, -3.4e38
    values[9] = np.linspace(5, 5.001, 512)
    values[10] = np.linspace(-5, -5.001, 512)
    values[11] = 1e-40
    values[12, 100] = -65504.0
    values[13] = random.standard_normal(512)
    weights = None
    if weighted:
        weights = random.random(512).astype(np.float32)
        weights[:300] = 0
        weights[400] = 1e20
    result = decoded(quantize(values, type_name, weights), type_name).reshape(values.shape)
    assert np.isfinite(result).all()
    assert not result[0].any()
    if not weighted:
        assert result[8, 3] > 65000 and result[8, 4] < -65000
        for row in (1, 2, 9, 10):
            assert np.abs(result[row] - values[row]).max() < 0.04 * np.abs(values[row]).max()


@pytest.mark.parametrize("type_name", quantizer.TYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_undefined_weights_are_refused_with_the_tensors_name(type_name, bad):
    values = np.ones((2, 512), np.float32)
    values[1, 200] = bad
    with pytest.raises(QuantizeError, match=r"'blocks\.3\.ffn\.0\.weight'.*NaN"):
        quantize(values, type_name, name="blocks.3.ffn.0.weight")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (np.ones(100), "has 100 columns"),
        (np.full(512, -1.0), "negative or undefined"),
        (np.full(512, np.nan), "negative or undefined"),
    ],
)
def test_importance_that_does_not_fit_is_refused(weights, message):
    with pytest.raises(QuantizeError, match=message):
        quantize(np.ones((2, 512), np.float32), "Q4_K", weights)


def test_rows_that_are_not_whole_blocks_are_refused():
    with pytest.raises(QuantizeError, match="rows of 300"):
        quantize(np.ones((2, 300), np.float32), "Q4_K", name="odd")


def test_zero_importance_is_as_good_as_none():
    values = rows("gaussian")
    assert np.array_equal(quantize(values, "Q4_K", np.zeros(1024)), quantize(values, "Q4_K"))


@pytest.mark.parametrize("type_name", ["Q5_K", "Q3_K", "IQ4_XS", "Q4_1"])
def test_threads_change_nothing(type_name, monkeypatch):
    monkeypatch.setattr(quantizer, "PIECE", 1 << 14)
    values = torch.from_numpy(rows("outliers").reshape(64, 512))
    weights = importance()[:512]
    flat = values.reshape(-1)

    def data(threads):
        pieces = quantized_pieces(lambda a, b: flat[a:b], (64, 512), type_name, weights, threads)
        return np.concatenate([piece.data for piece in pieces])

    one = data(1)
    assert np.array_equal(data(2), one) and np.array_equal(data(5), one)
    assert np.array_equal(quantize(values.numpy(), type_name, weights).reshape(-1), one)


def test_pieces_report_their_errors():
    values = torch.from_numpy(rows("gaussian"))
    flat = values.reshape(-1)
    (piece,) = quantized_pieces(lambda a, b: flat[a:b], tuple(values.shape), "Q4_K")
    expected = np.square(decoded(piece.data, "Q4_K") - flat.numpy(), dtype=np.float64).sum()
    assert piece.squared_error == pytest.approx(expected, rel=1e-5)
    assert piece.squared_weights == pytest.approx(flat.double().square().sum().item(), rel=1e-5)
    assert piece.weights == flat.numel()


@pytest.mark.parametrize(("type_name", "dtype"), [("F16", torch.float16), ("BF16", torch.bfloat16)])
def test_plain_types_are_rounded_to_nearest(type_name, dtype):
    values = (
        torch.randn(4096, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-20, 21).repeat(100)[:4096]
    )
    values = values.clamp(-60000, 60000)
    data = torch.from_numpy(quantize(values.numpy(), type_name)).reshape(-1)
    assert torch.equal(data.view(dtype), values.to(dtype))


def test_too_large_for_float16_becomes_its_largest():
    assert decoded(quantize(np.array([1e6, -1e6], np.float32), "F16"), "F16").tolist() == [65504, -65504]


@pytest.mark.parametrize("type_name", TYPES)
def test_blocks_have_the_formats_size(type_name):
    assert quantize(rows("gaussian"), type_name).shape == (
        32 * 1024 // FORMATS[type_name].block_size,
        FORMATS[type_name].block_bytes,
    )
