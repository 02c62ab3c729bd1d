"""The Metal kernels of fp8, int8 and MXFP8, run on the CPU, against scaled_formats.py, bit for bit."""

import logging

import pytest
import torch
from apple_silicon_video.quantization import metal_kernels, metal_scaled
from apple_silicon_video.quantization.metal_kernels import OUTPUT_TYPES, SCALED_FILES
from apple_silicon_video.quantization.scaled_formats import (
    SCALED_FORMATS,
    Scales,
    dequantize_scaled,
    dequantize_scaled_rows,
)
from apple_silicon_video.tests.unit.metal_library import library
from apple_silicon_video.tests.unit.metal_library import metal as metal

ROWS, COLUMNS = 37, 260
LAYOUTS = {
    "none": None,
    "tensor": (ROWS, COLUMNS),
    "row": (1, COLUMNS),
    "tile": (16, 32),
    "column tiles": (ROWS, 64),
}

all_formats = pytest.mark.parametrize("name", SCALED_FILES)
all_dtypes = pytest.mark.parametrize("dtype", OUTPUT_TYPES, ids=str)


def every_byte(offset: int = 0) -> torch.Tensor:
    """uint8 [ROWS, COLUMNS] at a storage offset, with every byte in many columns."""
    storage = torch.zeros(offset + ROWS * COLUMNS, dtype=torch.uint8)
    storage[offset:] = (torch.arange(ROWS * COLUMNS) * 7).to(torch.uint8)
    return storage[offset:].view(ROWS, COLUMNS)


def scales_of(sides: tuple[int, int] | None, kind: torch.dtype) -> Scales | None:
    if sides is None:
        return None
    grid = (-(-ROWS // sides[0]), -(-COLUMNS // sides[1]))
    generator = torch.Generator().manual_seed(0)
    if kind == torch.uint8:
        values = torch.randint(100, 140, grid, dtype=torch.uint8, generator=generator)
        values.view(-1)[0] = 255 if values.numel() > 1 else 127
    else:
        values = torch.randn(grid, generator=generator)
    return Scales(values, *sides)


def decode(codes, name, scales, dtype):
    def reference(count):
        part = None if scales is None else scales.cut(0, count)
        return dequantize_scaled(codes[:count].clone(), SCALED_FORMATS[name], (count, COLUMNS), part, dtype)

    values, sides = (None, (0, 0)) if scales is None else (scales.values, (scales.rows, scales.columns))
    return metal_scaled.dequantize(codes, name, values, sides, dtype, reference)


def assert_same(actual, expected):
    assert actual is not None and actual.shape == expected.shape and actual.dtype == expected.dtype
    assert metal_kernels.equal(actual.contiguous(), expected.contiguous())


@all_formats
@all_dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", (torch.float32, torch.uint8), ids=("float", "e8m0"))
@pytest.mark.parametrize("offset", (0, 1, 2))
def test_bit_exact(name, dtype, layout, kind, offset):
    codes, scales = every_byte(offset), scales_of(LAYOUTS[layout], kind)
    expected = dequantize_scaled(codes.clone(), SCALED_FORMATS[name], codes.shape, scales, dtype)
    assert_same(decode(codes, name, scales, dtype), expected)


@all_formats
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("index_type", (torch.int32, torch.int64), ids=str)
def test_rows(name, layout, index_type):
    codes, scales = every_byte(), scales_of(LAYOUTS[layout], torch.float32)

    def reference(wanted):
        return dequantize_scaled_rows(codes, SCALED_FORMATS[name], codes.shape, wanted, scales, torch.float16)

    values, sides = (None, (0, 0)) if scales is None else (scales.values, (scales.rows, scales.columns))
    arguments = (codes, name, values, sides)
    rows = torch.tensor([36, 0, 17, 17, 5], dtype=index_type)
    assert_same(metal_scaled.dequantize_rows(*arguments, rows, torch.float16, reference), reference(rows))
    outside = torch.tensor([37, 1, -1], dtype=index_type)
    result = metal_scaled.dequantize_rows(*arguments, outside, torch.float16, reference)
    assert result is not None and not result[[0, 2]].any()
    assert_same(result[1:2], reference(torch.tensor([1])))


@all_formats
def test_a_wrong_kernel_is_dropped_with_one_line(name, monkeypatch, caplog):
    original = metal_kernels.source(name)
    monkeypatch.setattr(metal_kernels, "source", lambda _: original.replace("values(word) * scale", "values(word)"))
    for _ in range(2):
        assert decode(every_byte(), name, scales_of((1, COLUMNS), torch.float32), torch.float16) is None
    (line,) = [record for record in caplog.records if record.name == metal_kernels.__name__]
    assert line.levelno == logging.WARNING and f"for {name} weights is not used" in line.getMessage()


def test_one_launch():
    codes, scales = every_byte(), scales_of((16, 32), torch.float32)
    kernel = library(metal_kernels.source("F8_E4M3")).scaled_float_half
    decode(codes, "F8_E4M3", scales, torch.float16)
    before = kernel.launches
    decode(codes, "F8_E4M3", scales, torch.float16)
    assert kernel.launches == before + 1


def test_what_kernels_cannot_decode_is_left_to_torch(monkeypatch):
    def reference(count):
        raise AssertionError

    def usable(columns, scales=None, sides=(0, 0), name="F8_E4M3"):
        codes = torch.zeros(4, columns, dtype=torch.uint8)
        return metal_scaled.dequantize(codes, name, scales, sides, torch.float16, reference)

    assert usable(6) is None
    assert usable(8, torch.ones(4, 4), (1, 2)) is None
    assert usable(8, name="F8_E8M0") is None
    monkeypatch.setenv(metal_kernels.SWITCH, "off")
    assert usable(8) is None
