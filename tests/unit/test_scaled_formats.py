"""One-byte formats: every byte value, every kind of scale, rounding, rows, and QuantizedWeight on top of them."""

import itertools
import math

import pytest
import torch
from apple_silicon_video.quantization import scaled_formats
from apple_silicon_video.quantization.scaled_formats import (
    SCALED_FORMATS,
    Scales,
    dequantize_scaled,
    dequantize_scaled_rows,
    read_mx_scales,
    read_scales,
)
from apple_silicon_video.quantization.tensor import QuantizedWeight
from small_models.scaled import swizzled

HALVES = (torch.float16, torch.bfloat16)
DTYPES = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I8": torch.int8}
# Exponent bits, mantissa bits, bias; e4m3fn has no infinities, and only its highest code is no number.
LAYOUTS = {"F8_E4M3": (4, 3, 7), "F8_E5M2": (5, 2, 15)}
ALL_BYTES = torch.arange(256, dtype=torch.uint8)


def equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def codes(rows=96, columns=160, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (rows, columns), dtype=torch.uint8, generator=generator)


def numbers(*shape, seed=1):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.01


def by_definition(code, name):
    """Value of one byte by the OCP specification, in Python's floating point."""
    exponent_bits, mantissa_bits, bias = LAYOUTS[name]
    sign = -1.0 if code & 0x80 else 1.0
    exponent = code >> mantissa_bits & (1 << exponent_bits) - 1
    mantissa = code & (1 << mantissa_bits) - 1
    if name == "F8_E4M3" and code & 0x7F == 0x7F:
        return math.nan
    if name == "F8_E5M2" and exponent == 31:
        return sign * math.inf if mantissa == 0 else math.nan
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias - mantissa_bits)
    return sign * (1 + mantissa / (1 << mantissa_bits)) * 2.0 ** (exponent - bias)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_byte_is_what_the_specification_says(name):
    found = dequantize_scaled(ALL_BYTES, SCALED_FORMATS[name], (2, 128), None).view(-1)
    equal(found, torch.tensor([by_definition(code, name) for code in range(256)]))
    assert int(found.isnan().sum()) == {"F8_E4M3": 2, "F8_E5M2": 6}[name]
    assert math.copysign(1, found[0x80].item()) == -1


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_every_byte_equals_the_cast_on_the_cpu(name, dtype):
    found = dequantize_scaled(ALL_BYTES, SCALED_FORMATS[name], (4, 64), None, dtype)
    equal(found, ALL_BYTES.view(DTYPES[name]).float().to(dtype).view(4, 64))


SCALE_CASES = {
    "scalar": (numbers(), lambda s, r, c: s.expand(r, c)),
    "one element": (numbers(1), lambda s, r, c: s.view(1, 1).expand(r, c)),
    "rows": (numbers(96), lambda s, r, c: s[:, None].expand(r, c)),
    "rows as a column": (numbers(96, 1), lambda s, r, c: s.expand(r, c)),
    "columns": (numbers(1, 160), lambda s, r, c: s.expand(r, c)),
    "blocks": (numbers(3, 5), lambda s, r, c: s.repeat_interleave(32, 0).repeat_interleave(32, 1)),
    "blocks of a row": (numbers(96, 5), lambda s, r, c: s.repeat_interleave(32, 1)),
    "blocks of a row, three dimensions": (numbers(96, 5, 1), lambda s, r, c: s[..., 0].repeat_interleave(32, 1)),
    "blocks, four dimensions": (
        numbers(3, 1, 5, 1),
        lambda s, r, c: s[:, 0, :, 0].repeat_interleave(32, 0).repeat_interleave(32, 1),
    ),
    "blocks cut off at the edges": (
        numbers(1, 2),
        lambda s, r, c: s.repeat_interleave(128, 0).repeat_interleave(128, 1)[:r, :c],
    ),
    "half precision": (numbers(96, 1).half(), lambda s, r, c: s.float().expand(r, c)),
    "bfloat16": (numbers(3, 5).bfloat16(), lambda s, r, c: s.float().repeat_interleave(32, 0).repeat_interleave(32, 1)),
}


@pytest.mark.parametrize("case", SCALE_CASES)
@pytest.mark.parametrize("name", DTYPES)
def test_scales(case, name, monkeypatch):
    stored, expanded = SCALE_CASES[case]
    raw, fmt = codes(), SCALED_FORMATS[name]
    expected = raw.view(DTYPES[name]).float() * expanded(stored, 96, 160)
    scales = read_scales(stored, (96, 160))
    for chunk in (1 << 19, 160 * 7, 1):
        monkeypatch.setattr(scaled_formats, "CPU_CHUNK", chunk)
        equal(dequantize_scaled(raw, fmt, (96, 160), scales), expected)
    for dtype in HALVES:
        equal(dequantize_scaled(raw, fmt, (96, 160), scales, dtype), expected.to(dtype))
    rows = torch.tensor([[95, 0, 31], [32, 33, 95]])
    equal(dequantize_scaled_rows(raw, fmt, (96, 160), rows, scales), expected[rows])
    equal(dequantize_scaled_rows(raw, fmt, (96, 160), rows.int(), scales, torch.bfloat16), expected[rows].bfloat16())


def test_halves_are_rounded_once():
    """A product between two halves' neighbours: rounding the scale or the value first would give the other one."""
    scale = torch.tensor(1 + 2**-9 + 2**-12)
    raw = ALL_BYTES.view(2, 128)
    scales = read_scales(scale, raw.shape)
    value = raw.view(torch.float8_e4m3fn).float()
    found = dequantize_scaled(raw, SCALED_FORMATS["F8_E4M3"], raw.shape, scales, torch.bfloat16)
    equal(found, (value.double() * scale.double()).to(torch.bfloat16))
    twice = value.bfloat16() * scale.bfloat16()
    assert not torch.equal(found.nan_to_num(), twice.nan_to_num())


@pytest.mark.parametrize(("rows", "columns"), [(96, 160), (128, 128), (256, 512), (300, 96)])
@pytest.mark.parametrize("in_tiles", [False, True])
def test_mxfp8(rows, columns, in_tiles):
    raw = codes(rows, columns)
    exponents = codes(rows, columns // 32, seed=3).clamp(90, 160)
    stored = swizzled(exponents) if in_tiles else exponents
    scales = read_mx_scales(stored, (rows, columns), in_tiles)
    factors = torch.exp2(exponents.float() - 127).repeat_interleave(32, 1)
    expected = raw.view(torch.float8_e4m3fn).float() * factors
    equal(dequantize_scaled(raw, SCALED_FORMATS["F8_E4M3"], (rows, columns), scales), expected)
    equal(
        dequantize_scaled_rows(raw, SCALED_FORMATS["F8_E4M3"], (rows, columns), torch.tensor([7, 90]), scales),
        expected[[7, 90]],
    )
    assert scales.nbytes == rows * columns // 32


def test_every_e8m0_code():
    found = Scales(ALL_BYTES.view(256, 1), 1, 1)
    dense = torch.ones(256, 1)
    found.multiply(dense)
    expected = torch.tensor([2.0 ** (code - 127) for code in range(255)] + [math.nan])
    equal(dense[:, 0], expected)
    equal(dense[:, 0], ALL_BYTES.view(torch.float8_e8m0fnu).float())


@pytest.mark.parametrize(
    ("shape", "weight"),
    [((3, 7), (96, 160)), ((95,), (96, 160)), ((97, 1), (96, 160)), ((2, 2, 2), (96, 160)), ((0,), (96, 160))],
)
def test_scales_that_do_not_fit(shape, weight):
    with pytest.raises(ValueError, match="do not fit"):
        read_scales(torch.ones(shape), weight)
    with pytest.raises(ValueError, match="do not fit"):
        read_mx_scales(torch.ones(shape, dtype=torch.uint8), weight, swizzled=False)


def test_stated_block_sides_are_used():
    scales = read_scales(numbers(4, 3), (200, 160), 64)
    assert (scales.rows, scales.columns) == (64, 64)
    with pytest.raises(ValueError, match="do not fit"):
        read_scales(numbers(4, 3), (200, 160), 32)


def test_refusals():
    fmt = SCALED_FORMATS["F8_E4M3"]
    with pytest.raises(ValueError, match="float64"):
        dequantize_scaled(codes(), fmt, (96, 160), None, torch.float64)
    with pytest.raises(ValueError, match="takes 15361 bytes"):
        dequantize_scaled(codes(), fmt, (1, 15361), None)
    with pytest.raises(ValueError, match="float64"):
        dequantize_scaled_rows(codes(), fmt, (96, 160), torch.tensor([0]), None, torch.float64)
    with pytest.raises(ValueError, match="Rows"):
        dequantize_scaled_rows(codes(), fmt, (2, 48, 160), torch.tensor([0]), None)


# ---- QuantizedWeight

WEIGHT_SCALES = {
    "none": None,
    "scalar": torch.tensor(0.25),
    "rows": numbers(96, 1),
    "blocks": numbers(3, 5),
    "codes": codes(96, 5, seed=5).clamp(100, 150),
}


def weight_of(kind, dtype=torch.float32):
    raw, stored = codes().clamp(0, 0x7E), WEIGHT_SCALES[kind]
    scales = None if stored is None else read_scales(stored, raw.shape)
    weight = QuantizedWeight(raw, SCALED_FORMATS["F8_E4M3"], raw.shape, dtype, scales=scales)
    return weight, dequantize_scaled(raw, SCALED_FORMATS["F8_E4M3"], raw.shape, scales)


@pytest.mark.parametrize("kind", WEIGHT_SCALES)
def test_a_weight_behaves_like_its_decoded_tensor(kind):
    weight, dense = weight_of(kind)
    x = numbers(2, 160)
    equal(torch.nn.functional.linear(x, weight), torch.nn.functional.linear(x, dense))
    indices = torch.tensor([[0, 95], [33, 5]])
    equal(torch.nn.functional.embedding(indices, weight), dense[indices])
    equal(weight.to(torch.bfloat16), dense.bfloat16())
    equal(weight.with_dtype(torch.float16).dequantize(), dense.half())
    equal(torch.empty_like(dense).copy_(weight), dense)


@pytest.mark.parametrize("kind", WEIGHT_SCALES)
def test_rows_stay_quantised(kind):
    weight, dense = weight_of(kind)
    for start, stop in itertools.pairwise([0, 1, 31, 70, 96]):
        part = weight[start:stop]
        assert isinstance(part, QuantizedWeight)
        equal(part.dequantize(), dense[start:stop])
        equal(part[1:].dequantize(), dense[start + 1 : stop])
    for part, expected in zip(weight.chunk(5), dense.chunk(5), strict=True):
        assert isinstance(part, QuantizedWeight)
        equal(part.dequantize(), expected)


@pytest.mark.parametrize("kind", WEIGHT_SCALES)
def test_moving_away_and_back_returns_to_the_file(kind):
    weight, dense = weight_of(kind)
    away = weight.on_device(torch.device("meta"))
    assert away.device.type == "meta"
    assert away.scales is None or away.scales.values.device.type == "meta"
    back = away.on_device(torch.device("cpu"))
    assert back.blocks.data_ptr() == weight.blocks.data_ptr()
    if weight.scales is not None:
        assert back.scales.values.data_ptr() == weight.scales.values.data_ptr()
    equal(back.dequantize(), dense)
    equal(away[3:40].on_device(torch.device("cpu")).dequantize(), dense[3:40])


def test_nbytes_counts_the_scales():
    weight, _ = weight_of("rows")
    assert weight.nbytes == 96 * 160 + 96 * 4
    assert weight_of("none")[0].nbytes == 96 * 160
    assert weight_of("codes")[0].nbytes == 96 * 160 + 96 * 5
