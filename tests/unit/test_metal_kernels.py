"""The Metal kernels, run on the CPU, against the torch decoders, bit for bit; and what happens to one that is wrong."""

import logging
import re

import pytest
import torch
from apple_silicon_video.quantization import metal_kernels
from apple_silicon_video.quantization.block_format import CodeField
from apple_silicon_video.quantization.formats import FORMATS, BlockFormat, random_blocks
from apple_silicon_video.quantization.metal_kernels import METAL_FORMATS, OUTPUT_TYPES, source
from apple_silicon_video.tests.unit.metal_library import library
from apple_silicon_video.tests.unit.metal_library import metal as metal

SPECIAL_SCALES = (2.0**-24, 1023 * 2.0**-24, 2.0**-14, 1.0, 65504.0, 0.0, 0.0123, float("inf"), float("nan"))

# Bytes of a block that more than one thread reads: scales, minimums, and the fifth bits of Q5_0 and Q5_1.
SHARED_BYTES = {
    "BF16": 0, "Q4_0": 2, "Q4_1": 4, "Q5_0": 6, "Q5_1": 8, "Q8_0": 2, "Q2_K": 20, "Q3_K": 14, "Q4_K": 16, "Q5_K": 16,
    "Q6_K": 18, "IQ4_NL": 2, "IQ4_XS": 8, "MXFP4": 1,
}  # fmt: skip

all_formats = pytest.mark.parametrize("name", METAL_FORMATS)
all_dtypes = pytest.mark.parametrize("dtype", OUTPUT_TYPES, ids=str)


def blocks_per_launch(name: str) -> int:
    """Table blocks that make one block of the kernel."""
    return METAL_FORMATS[name].weights // FORMATS[name].block_size


def special_blocks(fmt: BlockFormat, n_blocks: int, seed: int = 0) -> torch.Tensor:
    """Random bytes whose scales and minimums run through every pair of special values and signs."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (n_blocks, fmt.block_bytes), dtype=torch.uint8, generator=generator)
    if isinstance(fmt.scale, CodeField):
        blocks[:, fmt.scale.offset] = torch.arange(n_blocks).to(torch.uint8)
        return blocks
    signed = torch.tensor([sign * value for value in SPECIAL_SCALES for sign in (1, -1)])
    counter = torch.arange(n_blocks)
    fmt.scale.write(blocks, signed[counter % len(signed)], generator)
    if fmt.minimum is not None:
        fmt.minimum.write(blocks, signed[counter // len(signed) % len(signed)], generator)
    return blocks


def at_offset(blocks: torch.Tensor, offset: int) -> torch.Tensor:
    """The same bytes at a storage offset."""
    storage = torch.full((offset + blocks.numel(),), 0xA5, dtype=torch.uint8)
    storage[offset:] = blocks.reshape(-1)
    return storage[offset:]


def reference(blocks: torch.Tensor, fmt: BlockFormat, dtype: torch.dtype) -> torch.Tensor:
    return fmt.decode(blocks.reshape(-1, fmt.block_bytes)).to(dtype)


def assert_same_bits(actual: torch.Tensor | None, expected: torch.Tensor) -> None:
    assert actual is not None and actual.dtype == expected.dtype and actual.numel() == expected.numel()
    integer = torch.int32 if actual.dtype == torch.float32 else torch.int16
    actual, expected = actual.view(-1), expected.reshape(-1)
    assert torch.equal(actual.isnan(), expected.isnan())
    numbers = ~expected.isnan()
    assert torch.equal(actual.view(integer)[numbers], expected.view(integer)[numbers])


@all_formats
def test_table_agrees_with_the_source(name):
    text, metal, fmt = source(name), METAL_FORMATS[name], FORMATS[name]
    declared = f"enum {{ WEIGHTS = {metal.weights}, BLOCK_BYTES = {metal.block_bytes}, LANES = {metal.lanes} }};"
    assert declared in text
    alignments = [int(value) for value in re.findall(rf"^KERNELS\w*\({name}, (\d)", text, re.MULTILINE)]
    assert alignments == [metal.alignment]
    assert metal.block_bytes % metal.alignment == 0
    assert metal.weights * fmt.block_bytes == metal.block_bytes * fmt.block_size


@all_formats
@all_dtypes
@pytest.mark.parametrize("offset", (0, 1, 2, 3, 4))
def test_bit_exact_with_special_scales(name, dtype, offset):
    fmt = FORMATS[name]
    blocks = special_blocks(fmt, 512)
    result = metal_kernels.dequantize(at_offset(blocks, offset), fmt, 512 * fmt.block_size, dtype)
    assert_same_bits(result, reference(blocks, fmt, dtype))


@all_formats
@pytest.mark.parametrize("count", (1, 3, 9, 33, 67, 259))
def test_sizes_that_do_not_fill_groups(name, count):
    fmt = FORMATS[name]
    n_blocks = count * blocks_per_launch(name)
    blocks = random_blocks(fmt, n_blocks, seed=1)
    result = metal_kernels.dequantize(blocks, fmt, n_blocks * fmt.block_size, torch.float16)
    assert_same_bits(result, reference(blocks, fmt, torch.float16))


@all_formats
@all_dtypes
@pytest.mark.parametrize("index_type", (torch.int32, torch.int64), ids=str)
@pytest.mark.parametrize("offset", (0, 1))
def test_rows(name, dtype, index_type, offset):
    fmt = FORMATS[name]
    per_row = 3 * blocks_per_launch(name)
    shape = (11, per_row * fmt.block_size)
    blocks = special_blocks(fmt, 11 * per_row)
    rows = torch.tensor([[0, 10, 3], [3, 7, 0]], dtype=index_type)
    result = metal_kernels.dequantize_rows(at_offset(blocks, offset), fmt, shape, rows, dtype)
    assert_same_bits(result, reference(blocks, fmt, dtype).view(shape)[rows])


@all_formats
def test_rows_outside_the_matrix_are_zero(name):
    fmt = FORMATS[name]
    per_row = blocks_per_launch(name)
    shape = (4, per_row * fmt.block_size)
    blocks = random_blocks(fmt, 4 * per_row, seed=2)
    assert metal_kernels.dequantize_rows(blocks, fmt, shape, torch.tensor([1]), torch.float32) is not None
    result = metal_kernels.dequantize_rows(blocks, fmt, shape, torch.tensor([4, 2, -1, 1 << 32]), torch.float32)
    expected = reference(blocks, fmt, torch.float32).view(shape)[[0, 2, 0, 0]]
    expected[[0, 2, 3]] = 0
    assert_same_bits(result, expected)


@all_formats
def test_one_launch_for_a_tensor_of_any_size(name):
    fmt = FORMATS[name]
    widest = "" if METAL_FORMATS[name].alignment > 1 else "_unaligned"
    kernel = getattr(library(source(name)), f"dequantize_half{widest}")
    for n_blocks in (blocks_per_launch(name), 4096):
        blocks = random_blocks(fmt, n_blocks, seed=3)
        metal_kernels.dequantize(blocks, fmt, n_blocks * fmt.block_size, torch.float16)
        before = kernel.launches
        metal_kernels.dequantize(blocks, fmt, n_blocks * fmt.block_size, torch.float16)
        assert kernel.launches == before + 1


@all_formats
def test_each_weight_is_written_and_each_quant_read_by_one_thread(name):
    fmt, metal = FORMATS[name], METAL_FORMATS[name]
    kernel = library(source(name)).dequantize_float_unaligned
    blocks = random_blocks(fmt, 2 * blocks_per_launch(name), seed=4).view(-1)
    first = blocks[: metal.block_bytes]

    def decode(block, threads):
        out = torch.full((metal.weights + 8,), -12345.0)
        kernel(block, out, threads=threads, group_size=256)
        return out

    share = metal.weights // metal.lanes
    writer = torch.full((metal.weights + 8,), -1)
    for lane in range(metal.lanes):
        new = (decode(first, lane + 1) != -12345.0) & (writer < 0)
        assert new.sum() == share
        writer[new] = lane
    assert (writer[metal.weights :] == -1).all()

    whole, shared = decode(first, metal.lanes), 0
    for byte in range(metal.block_bytes):
        changed = first.clone()
        changed[byte] ^= 0xFF
        different = decode(changed, metal.lanes).view(torch.int32) != whole.view(torch.int32)
        readers = writer[different].unique().numel()
        assert readers >= 1
        shared += readers > 1
    assert shared <= SHARED_BYTES[name]


def lines(caplog):
    return [record for record in caplog.records if record.name == metal_kernels.__name__]


def q4_0(n_blocks=100):
    fmt = FORMATS["Q4_0"]
    return random_blocks(fmt, n_blocks, seed=5), fmt, n_blocks * fmt.block_size


def test_a_good_kernel_is_kept_with_one_line(caplog):
    caplog.set_level(logging.INFO)
    for _ in range(3):
        assert metal_kernels.dequantize(*q4_0(), torch.float16) is not None
    (line,) = lines(caplog)
    assert line.getMessage() == "Metal kernel dequantize_half for Q4_0 weights: equal to the reference, in use."


@pytest.mark.parametrize(
    "damage",
    [
        ("- 8.0f) * d);\n    write(out, 4 * lane + 16", "- 7.0f) * d);\n    write(out, 4 * lane + 16"),
        ("as_type<half>", "as_type<bfloat>"),
        ("index % FORMAT::LANES", "0"),
        ("(word >> 4)", "(word >> 3)"),
    ],
    ids=["offset", "scale", "lane", "shift"],
)
def test_a_wrong_kernel_is_dropped_with_one_line(monkeypatch, caplog, damage):
    original = source("Q4_0")
    assert damage[0] in original
    monkeypatch.setattr(metal_kernels, "source", lambda name: original.replace(*damage))
    for _ in range(3):
        assert metal_kernels.dequantize(*q4_0(), torch.float16) is None
    (line,) = lines(caplog)
    assert line.levelno == logging.WARNING
    assert "dequantize_half for Q4_0 weights is not used (its result differs from the reference)" in line.getMessage()


def test_a_wrong_row_kernel_is_dropped(monkeypatch, caplog):
    original = source("Q4_0")
    monkeypatch.setattr(metal_kernels, "source", lambda name: original.replace("ulong(row) *", "ulong(row + 1) *"))
    blocks, fmt, _ = q4_0()
    rows = torch.tensor([2, 5])
    assert metal_kernels.dequantize_rows(blocks, fmt, (25, 128), rows, torch.float16) is None
    assert len(lines(caplog)) == 1
    assert metal_kernels.dequantize(*q4_0(), torch.float16) is not None


def test_source_that_does_not_compile_is_dropped_with_one_line(monkeypatch, caplog):
    monkeypatch.setattr(metal_kernels, "source", lambda name: "kernel void broken(")
    for dtype in OUTPUT_TYPES:
        assert metal_kernels.dequantize(*q4_0(), dtype) is None
    assert len(lines(caplog)) == 1


def test_switched_off(monkeypatch, caplog):
    monkeypatch.setenv(metal_kernels.SWITCH, "off")
    assert metal_kernels.dequantize(*q4_0(), torch.float16) is None
    assert not lines(caplog)


def test_torch_without_compile_shader(monkeypatch, caplog):
    monkeypatch.delattr(torch.mps, "compile_shader")
    assert metal_kernels.dequantize(*q4_0(), torch.float16) is None
    assert not lines(caplog)


def test_what_kernels_cannot_decode_is_left_to_torch():
    assert metal_kernels.dequantize(torch.zeros(6, dtype=torch.uint8), FORMATS["BF16"], 3, torch.float32) is None
    blocks = random_blocks(FORMATS["IQ2_S"], 4, seed=6)
    assert metal_kernels.dequantize(blocks, FORMATS["IQ2_S"], 1024, torch.float32) is None
    assert metal_kernels.dequantize(blocks[:0], FORMATS["Q4_0"], 0, torch.float32) is None
