"""The fused decode-and-multiply kernels, run on the CPU, against float64 and decoding first; and their limits."""

import logging

import pytest
import torch
from apple_silicon_video.quantization import metal_kernels, metal_matmul
from apple_silicon_video.quantization.formats import FORMATS, random_blocks
from apple_silicon_video.quantization.metal_kernels import METAL_FORMATS, OUTPUT_TYPES, SCALED_FILES
from apple_silicon_video.quantization.metal_matmul import bytes_moved, within_rounding
from apple_silicon_video.quantization.scaled_formats import SCALED_FORMATS, Scales
from apple_silicon_video.quantization.tensor import PLAIN_FORMATS, QuantizedWeight
from apple_silicon_video.tests.unit.metal_library import library
from apple_silicon_video.tests.unit.metal_library import metal as metal

ROWS = (1, 3, 8, 31, 33, 64)
FEATURES = 45
TYPES = (*METAL_FORMATS, *SCALED_FILES)
# For each type of input all ways that tiles are filled: super-blocks, small blocks, bytes.
OTHER_INPUTS = {torch.float32: ("Q5_K", "Q8_0", "F8_E4M3"), torch.bfloat16: ("Q4_K", "MXFP4", "I8")}


def columns_of(name):
    """Columns that fill no whole number of tiles where the format permits it."""
    return 2 * METAL_FORMATS[name].weights if name in METAL_FORMATS and METAL_FORMATS[name].weights == 256 else 224


def quantised(name, dtype=torch.float16, features=FEATURES, columns=0, offset=0, scales=None):
    """A weight of random blocks or bytes, ``offset`` bytes into its storage."""
    columns = columns or columns_of(name)
    if name in FORMATS:
        fmt = FORMATS[name]
        data = random_blocks(fmt, features * columns // fmt.block_size, seed=1).view(-1)
    else:
        fmt = SCALED_FORMATS[name]
        data = torch.randint(0, 0x78, (features * columns,), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
        scales = scales or Scales(torch.linspace(0.5, 2, features)[:, None] / 256, 1, columns)
    storage = torch.full((offset + data.numel(),), 0xA5, dtype=torch.uint8)
    storage[offset:] = data
    return QuantizedWeight(storage[offset:], fmt, (features, columns), dtype, scales=scales)


def inputs(rows, columns, dtype=torch.float16, seed=2):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def bias_of(dtype=torch.float16, features=FEATURES):
    return torch.randn(features, generator=torch.Generator().manual_seed(3)).to(dtype)


def assert_right(y, x, weight, bias):
    """Within rounding of float64, and so as near to decoding first as two roundings are."""
    dense = weight.dequantize(x.dtype)
    assert y is not None and y.dtype == x.dtype
    assert within_rounding(y, x, dense, bias)
    separately = torch.nn.functional.linear(x.float(), dense.float(), None if bias is None else bias.float())
    limits = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
    assert (y.float() - separately).abs().max() <= limits[x.dtype] * separately.abs().max()


@pytest.mark.parametrize("name", TYPES)
def test_products_of_every_type(name):
    weight = quantised(name)
    for rows in ROWS:
        x, bias = inputs(rows, columns_of(name)), bias_of() if rows % 2 else None
        assert_right(metal_matmul.linear(x, weight, bias), x, weight, bias)


@pytest.mark.parametrize("dtype, name", [(dtype, name) for dtype, names in OTHER_INPUTS.items() for name in names])
def test_other_inputs(dtype, name):
    weight = quantised(name, dtype)
    for rows in ROWS:
        x = inputs(rows, columns_of(name), dtype)
        assert_right(metal_matmul.linear(x, weight, bias_of(dtype)), x, weight, bias_of(dtype))


@pytest.mark.parametrize("name", TYPES)
def test_weights_are_those_of_the_decoding_kernels(name):
    """A row of zeros with a single one gives a column of the decoded matrix, to the last bit."""
    weight = quantised(name)
    ones = torch.eye(columns_of(name)).half()
    y = [metal_matmul.linear(part, weight, None) for part in (ones[:1], ones[1:5], *ones[5:].split(64))]
    decoded = weight.dequantize(torch.float16).T
    assert torch.equal(torch.cat(y), decoded + 0.0)


@pytest.mark.parametrize("name", TYPES)
def test_any_storage_offset(name):
    for offset, rows in ((1, 1), (2, 3), (3, 9), (6, 33), (8, 9)):
        weight, x = quantised(name, offset=offset), inputs(rows, columns_of(name))
        assert_right(metal_matmul.linear(x, weight, None), x, weight, None)


@pytest.mark.parametrize("features", (1, 7, 32, 65))
@pytest.mark.parametrize("name", ("Q6_K", "Q4_0"))
def test_few_and_many_rows_of_the_weight(name, features):
    weight = quantised(name, features=features)
    for rows in (2, 40):
        x, bias = inputs(rows, columns_of(name)), bias_of(features=features)
        assert_right(metal_matmul.linear(x, weight, bias), x, weight, bias)


@pytest.mark.parametrize("columns", (32, 96, 288))
def test_rows_of_few_blocks(columns):
    weight = quantised("Q5_1", columns=columns)
    for rows in (1, 4, 5, 32):
        x = inputs(rows, columns)
        assert_right(metal_matmul.linear(x, weight, None), x, weight, None)


@pytest.mark.parametrize("sides", ((FEATURES, 224), (1, 224), (16, 32), (FEATURES, 64), None), ids=str)
@pytest.mark.parametrize("kind", (torch.float32, torch.uint8), ids=("float", "e8m0"))
def test_scales_of_every_layout(sides, kind):
    scales = None
    if sides is not None:
        grid, generator = (-(-FEATURES // sides[0]), -(-224 // sides[1])), torch.Generator().manual_seed(0)
        codes = torch.randint(112, 120, grid, dtype=torch.uint8, generator=generator)
        scales = Scales(codes if kind == torch.uint8 else torch.rand(grid, generator=generator) / 64, *sides)
    weight = quantised("F8_E4M3", scales=scales)
    weight._scales = scales
    for rows in (2, 19):
        x = inputs(rows, 224) / 16
        assert_right(metal_matmul.linear(x, weight, bias_of()), x, weight, bias_of())


def test_shapes_and_strides_of_the_input():
    weight = quantised("Q4_K")
    storage = inputs(40, 1026).view(-1)
    for x in (storage[1 : 1 + 5 * 512].view(5, 512), inputs(2 * 512, 3).T, inputs(6, 1024)[:, ::2]):
        assert x.shape[1] in (512, 1024)
        x = x[:, :512]
        assert_right(metal_matmul.linear(x, weight, None), x, weight, None)
    deep = inputs(12, 512).view(2, 3, 2, 512)
    y = metal_matmul.linear(deep, weight, bias_of())
    assert y is not None and y.shape == (2, 3, 2, FEATURES)
    assert torch.equal(y.view(12, -1), metal_matmul.linear(deep.view(12, 512), weight, bias_of()))


def test_rows_do_not_depend_on_their_neighbours():
    """An input that is not a number spoils its own row only, in tiles that are not full as well."""
    weight = quantised("Q4_K")
    for rows in (4, 13):
        x = inputs(rows, 512)
        clean = metal_matmul.linear(x, weight, None)
        x[rows - 1] = float("nan")
        y = metal_matmul.linear(x, weight, None)
        assert y is not None and clean is not None
        assert y[-1].isnan().all() and torch.equal(y[:-1], clean[:-1])


@pytest.mark.parametrize("rows, kernel", ((1, "matmul_1"), (2, "matmul_4"), (4, "matmul_4"), (5, "matmul_tiles")))
def test_one_launch(rows, kernel):
    weight, x = quantised("Q4_K"), inputs(rows, 512)
    counted = getattr(library(metal_matmul.source("Q4_K", torch.float16)), kernel)
    metal_matmul.linear(x, weight, None)
    before = counted.launches
    metal_matmul.linear(x, weight, None)
    assert counted.launches == before + 1


def lines(caplog):
    return [record for record in caplog.records if record.name == metal_kernels.__name__]


def test_a_good_kernel_is_kept_with_one_line(caplog):
    caplog.set_level(logging.INFO)
    for _ in range(3):
        assert metal_matmul.linear(inputs(1, 512), quantised("Q4_K"), None) is not None
    (line,) = lines(caplog)
    assert line.getMessage() == (
        "Metal kernel matmul_1 for half inputs and Q4_K weights: within rounding of the reference, in use."
    )


# What is broken, in which kernel that shows, and what the log says.
DAMAGES = {
    "one weight in 64": (9, "- minimum);", "- minimum * (i == 3 && lane == 9 ? 1.02f : 1.0f));", "differs"),
    "few: a part": (1, "part += 32", "part += 33", "differs"),
    "few: bias": (1, "bias[feature]", "bias[feature + 1]", "outside its buffers"),
    "tiles: not transposed": (9, "ulong2(0), true", "ulong2(0), false", "differs"),
    "tiles: barrier after decoding": (
        9, "      threadgroup_barrier(mem_flags::mem_threadgroup);\n      for", "      for", "without a barrier"
    ),
    "tiles: barrier before the next": (
        9, "      threadgroup_barrier(mem_flags::mem_threadgroup);\n    }\n", "    }\n", "without a barrier"
    ),
    "tiles: barrier of the results": (
        9, "    simdgroup_barrier(mem_flags::mem_threadgroup);\n    for", "    for", "without a barrier"
    ),
    "tiles: last row": (9, "min(first_row + row, last_row)", "(first_row + row)", "outside its buffers"),
    "tiles: last weight": (9, "min(first_feature + feature, last_feature)", "(first_feature + feature)", "outside"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_wrong_kernel_is_dropped_with_one_line(damage, monkeypatch, caplog):
    rows, old, new, words = DAMAGES[damage]
    original = metal_matmul.source("Q4_K", torch.float16)
    assert original.count(old) == 1
    monkeypatch.setattr(metal_matmul, "source", lambda *_: original.replace(old, new))
    for _ in range(2):
        assert metal_matmul.linear(inputs(rows, 512), quantised("Q4_K"), bias_of()) is None
    (line,) = lines(caplog)
    assert line.levelno == logging.WARNING and words in line.getMessage()
    assert line.getMessage().endswith("they are decoded first and multiplied by torch.")


def test_a_source_that_does_not_compile_is_dropped_with_one_line(monkeypatch, caplog):
    monkeypatch.setattr(metal_matmul, "source", lambda *_: "kernel void broken(")
    for rows in ROWS:
        assert metal_matmul.linear(inputs(rows, 512), quantised("Q4_K"), None) is None
    assert len(lines(caplog)) == 1
    assert metal_kernels.dequantize(quantised("Q4_K").blocks, FORMATS["Q4_K"], FEATURES * 512, torch.half) is not None


def test_what_is_left_to_the_caller(monkeypatch):
    weight, x = quantised("Q4_K"), inputs(1, 512)
    assert metal_matmul.linear(inputs(65, 512), weight, None) is None
    assert metal_matmul.linear(x[:0], weight, None) is None
    assert metal_matmul.linear(x[:, :256], weight, None) is None
    assert metal_matmul.linear(x.double(), weight, None) is None
    assert metal_matmul.linear(x.clone().requires_grad_(), weight, None) is None
    assert metal_matmul.linear(x, quantised("IQ2_S"), None) is None
    assert metal_matmul.linear(x, QuantizedWeight.from_dense(inputs(4, 512), torch.float16), None) is None
    assert metal_matmul.linear(inputs(1, 20), quantised("BF16", columns=20), None) is None
    assert set(PLAIN_FORMATS) == set(OUTPUT_TYPES)
    monkeypatch.setenv(metal_kernels.SWITCH, "off")
    assert metal_matmul.linear(x, weight, None) is None
    monkeypatch.delenv(metal_kernels.SWITCH)
    monkeypatch.delattr(torch.mps, "compile_shader")
    assert metal_matmul.linear(x, weight, None) is None


def test_the_row_limit_can_be_set(monkeypatch, caplog):
    weight = quantised("Q4_K")
    for setting, largest in (("3", 3), ("0", 0), ("-5", 0), ("70", 70), ("", 64), ("many", 64)):
        monkeypatch.setenv(metal_matmul.ROWS_SWITCH, setting)
        assert metal_matmul.row_limit() == largest
        assert metal_matmul.linear(inputs(largest + 1, 512), weight, None) is None
        assert largest == 0 or metal_matmul.linear(inputs(largest, 512), weight, None) is not None
    (line,) = [record for record in caplog.records if record.name == metal_matmul.__name__]
    assert line.getMessage() == "ASV_METAL_MATMUL_ROWS is 'many', not a number of rows: 64 is used."


def test_the_tolerance_is_that_of_float32_sums():
    x, weights = inputs(5, 4096, torch.float32), inputs(9, 4096, torch.float32, seed=4)
    exact = x.double() @ weights.double().T
    assert within_rounding(exact.float(), x, weights, None)
    assert within_rounding((x @ weights.T), x, weights, None)
    sparse = x * (torch.arange(4096) % 64 == 0)
    assert not within_rounding((sparse.half().double() @ weights.double().T).float(), sparse, weights, None)
    wrong = weights.clone()
    wrong[4, 64] *= 1.001
    assert not within_rounding((sparse.double() @ wrong.double().T).float(), sparse, weights, None)
    assert not within_rounding(exact.float().clone().fill_(float("nan")), x, weights, None)
    weights[3, 7] = float("inf")
    spoiled = (x.double() @ weights.double().T).float()
    assert within_rounding(spoiled, x, weights, None)
    assert not within_rounding(torch.where(spoiled.isfinite(), spoiled, 0), x, weights, None)


def test_bytes_moved():
    """Wan 14B's modulation (one row, 30,720 x 5,120) and UMT5-XXL's feed-forward for 64 tokens, at Q4_K in float16."""
    wan, umt5 = 30720 * 5120, 10240 * 4096
    assert bytes_moved(1, 30720, 5120, wan * 9 // 16, 2) == {
        "decoded first": wan * 9 // 16 + 4 * wan + 71680,
        "fused": wan * 9 // 16 + 71680,
    }
    assert bytes_moved(64, 10240, 4096, umt5 * 9 // 16, 2) == {
        "decoded first": umt5 * 9 // 16 + 4 * umt5 + 1835008,
        "fused": umt5 * 9 // 8 + 1835008,
    }
