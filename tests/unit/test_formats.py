"""The table of block formats against gguf-py's dequantisation, bit for bit, and what decoding promises besides."""

import gguf
import numpy as np
import pytest
import torch
from apple_silicon_video.quantization import formats as formats_module
from apple_silicon_video.quantization.block_format import BFloat16Field, CodeField, HalfField, SplitHalfField
from apple_silicon_video.quantization.formats import (
    FORMATS,
    FORMATS_BY_ID,
    BlockFormat,
    dequantize,
    dequantize_rows,
    packed_size,
    random_blocks,
)
from gguf.quants import _type_traits
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HALF_DTYPES = (torch.float16, torch.bfloat16)

# Smallest and largest subnormal, smallest normal, one, largest, both zeros, an ordinary scale.
SPECIAL_HALVES = (2.0**-24, 1023 * 2.0**-24, 2.0**-14, 1.0, 65504.0, 0.0, 0.0123)

all_formats = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS.keys())


def special_blocks(fmt: BlockFormat, n_blocks: int = 512, seed: int = 0) -> torch.Tensor:
    """Random bytes whose scales and minimums run through every pair of special values and signs."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (n_blocks, fmt.block_bytes), dtype=torch.uint8, generator=generator)
    if isinstance(fmt.scale, CodeField):
        first, count = fmt.scale.offset, fmt.scale.count
        blocks[:, first : first + count] = torch.arange(n_blocks * count).view(-1, count).to(torch.uint8)
        return blocks
    signed = torch.tensor([sign * value for value in SPECIAL_HALVES for sign in (1, -1)])
    counter = torch.arange(n_blocks)
    fmt.scale.write(blocks, signed[counter % len(signed)], generator)
    if fmt.minimum is not None:
        fmt.minimum.write(blocks, signed[counter // len(signed) % len(signed)], generator)
    return blocks


def reference(fmt: BlockFormat, blocks: torch.Tensor) -> torch.Tensor:
    """gguf-py's float32 weights [n_blocks, block_size]."""
    with np.errstate(all="ignore"):
        weights = gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[fmt.name])
    return torch.from_numpy(weights).view(-1, fmt.block_size)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    assert torch.equal(bits(actual), bits(expected))


def test_table_is_what_gguf_py_can_dequantise():
    assert set(FORMATS) == {quant_type.name for quant_type in _type_traits}
    assert set(FORMATS_BY_ID.values()) == set(FORMATS.values())


@all_formats
def test_layout(fmt):
    quant_type = gguf.GGMLQuantizationType[fmt.name]
    assert fmt.type_id == quant_type.value
    assert (fmt.block_size, fmt.block_bytes) == gguf.GGML_QUANT_SIZES[quant_type]
    assert FORMATS_BY_ID[fmt.type_id] is fmt


@all_formats
def test_bit_exact_in_float32(fmt):
    blocks = special_blocks(fmt)
    expected = reference(fmt, blocks)
    assert not expected.isnan().any()
    assert_same_bits(fmt.decode(blocks), expected)
    assert_same_bits(dequantize(blocks, fmt, expected.shape), expected)


@all_formats
def test_infinite_and_nan_scales_agree(fmt):
    blocks = torch.randint(0, 256, (256, fmt.block_bytes), dtype=torch.uint8)
    if not isinstance(fmt.scale, CodeField):
        values = torch.tensor([float("inf"), float("-inf"), float("nan"), 1.0]).repeat(64)
        fmt.scale.write(blocks, values, torch.Generator())
    expected = reference(fmt, blocks)
    actual = fmt.decode(blocks)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert_same_bits(actual.nan_to_num(0.0, 1.0, -1.0), expected.nan_to_num(0.0, 1.0, -1.0))


@all_formats
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_halves_are_rounded_from_float32(fmt, dtype):
    blocks = torch.cat((special_blocks(fmt), random_blocks(fmt, 512, seed=1)))
    expected = reference(fmt, blocks)
    assert_same_bits(dequantize(blocks, fmt, expected.shape, dtype), expected.to(dtype))


@all_formats
@pytest.mark.parametrize("offset", (1, 2, 3))
@pytest.mark.parametrize("n_blocks", (1, 5))
def test_any_storage_offset(fmt, offset, n_blocks):
    blocks = random_blocks(fmt, n_blocks, seed=2)
    storage = torch.zeros(offset + blocks.numel(), dtype=torch.uint8)
    storage[offset:] = blocks.view(-1)
    shape = (n_blocks * fmt.block_size,)
    assert_same_bits(dequantize(storage[offset:], fmt, shape), reference(fmt, blocks).view(shape))


@all_formats
def test_memory_at_an_odd_address(fmt):
    blocks = random_blocks(fmt, 7, seed=3)
    raw = torch.frombuffer(bytearray(b"\0" + blocks.numpy().tobytes()), dtype=torch.uint8, offset=1)
    assert_same_bits(dequantize(raw, fmt, (7, fmt.block_size)), reference(fmt, blocks))


@all_formats
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
def test_chunk_boundaries(fmt, dtype, monkeypatch):
    monkeypatch.setattr(formats_module, "CPU_CHUNK", 3 * fmt.block_size)
    for n_blocks in (0, 1, 3, 4, 8):
        blocks = random_blocks(fmt, n_blocks, seed=4)
        shape = (n_blocks, fmt.block_size)
        expected = reference(fmt, blocks) if n_blocks else torch.empty(shape)
        assert_same_bits(dequantize(blocks, fmt, shape, dtype), expected.to(dtype))


@all_formats
def test_rows_equal_slices(fmt):
    shape = (11, 3 * fmt.block_size)
    raw = random_blocks(fmt, 33, seed=5).view(-1)
    rows = torch.tensor([[0, 10, 3], [3, 7, 0]])
    whole = dequantize(raw, fmt, shape, torch.float16)
    assert_same_bits(dequantize_rows(raw, fmt, shape, rows, torch.float16), whole[rows])
    assert_same_bits(dequantize_rows(raw, fmt, shape, rows.int()[0, 1], torch.float16), whole[10])
    assert dequantize_rows(raw, fmt, shape, rows[:0]).shape == (0, 3, shape[1])


class Launches(TorchDispatchMode):
    """Records what every operation that is not a view produces."""

    def __init__(self):
        super().__init__()
        self.outputs: list[tuple[str, list[torch.Tensor]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        # A schema tells a view by an alias annotation without a write
        is_view = any(ret.alias_info is not None and not ret.alias_info.is_write for ret in func._schema.returns)
        if not is_view and not func._schema.name.startswith("aten::empty"):
            self.outputs.append(
                (func._schema.name, [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)])
            )
        return result


@all_formats
def test_no_wide_arithmetic(fmt):
    n_blocks = 4096
    blocks = random_blocks(fmt, n_blocks, seed=6)
    dequantize(blocks, fmt, (n_blocks, fmt.block_size))  # fills the caches of constants
    with Launches() as mode:
        dequantize(blocks, fmt, (n_blocks, fmt.block_size), torch.float16)
    for name, outputs in mode.outputs:
        for output in outputs:
            wide = output.dtype in (torch.float64, torch.int64, torch.complex64)
            assert not (wide and output.numel() >= n_blocks), f"{name} makes {output.dtype} {tuple(output.shape)}"


@all_formats
def test_temporaries_are_bounded(fmt, monkeypatch):
    chunk = 4 * fmt.block_size
    monkeypatch.setattr(formats_module, "CPU_CHUNK", chunk)
    blocks = random_blocks(fmt, 64, seed=7)
    dequantize(blocks, fmt, (64, fmt.block_size))
    with Launches() as mode:
        out = dequantize(blocks, fmt, (64, fmt.block_size))
    largest = max(output.numel() for _, outputs in mode.outputs for output in outputs)
    assert largest <= 2 * chunk < out.numel()


@all_formats
def test_random_blocks(fmt):
    blocks = random_blocks(fmt, 8192, seed=8, std=0.02)
    assert blocks.dtype == torch.uint8 and blocks.shape == (8192, fmt.block_bytes)
    weights = fmt.decode(blocks)
    assert weights.isfinite().all()
    assert abs(weights.mean().item()) < 0.02 * 0.05
    assert weights.std().item() == pytest.approx(0.02, rel=0.05)
    assert fmt.decode(random_blocks(fmt, 8192, seed=8, std=0.1)).std().item() == pytest.approx(0.1, rel=0.05)


@all_formats
def test_random_blocks_are_seeded(fmt):
    assert torch.equal(random_blocks(fmt, 64, seed=9), random_blocks(fmt, 64, seed=9))
    assert not torch.equal(random_blocks(fmt, 64, seed=9), random_blocks(fmt, 64, seed=10))
    assert random_blocks(fmt, 0, seed=9).shape == (0, fmt.block_bytes)


def test_scale_fields_keep_the_other_bits():
    generator = torch.Generator().manual_seed(11)
    blocks = torch.randint(0, 256, (64, 56), dtype=torch.uint8, generator=generator)
    before = blocks.clone()
    SplitHalfField(48).write(blocks, torch.full((64,), -0.123), generator)
    assert torch.equal(blocks[:, :48], before[:, :48])
    assert torch.equal(blocks[:, 48::2], before[:, 48::2])
    assert torch.equal(blocks[:, 49::2] & 0x0F, before[:, 49::2] & 0x0F)
    HalfField(4).write(blocks, torch.full((64,), 1.5), generator)
    assert torch.equal(blocks[:, 4:6].contiguous().view(torch.float16), torch.full((64, 1), 1.5).half())
    one = torch.zeros(1, 2, dtype=torch.uint8)
    BFloat16Field().write(one, torch.tensor([-2.0]), generator)
    assert one.view(torch.bfloat16).item() == -2.0


def test_packed_size():
    assert packed_size(FORMATS["Q3_K"], (3, 512)) == 3 * 2 * 110
    assert packed_size(FORMATS["BF16"], ()) == 2
    with pytest.raises(ValueError, match=r"Rows of 100 weights cannot be Q3_K, which stores blocks of 256"):
        packed_size(FORMATS["Q3_K"], (256, 100))


def test_refusals():
    fmt = FORMATS["Q8_0"]
    raw = random_blocks(fmt, 4, seed=12)
    with pytest.raises(ValueError, match="takes 68 bytes, but 136 were given"):
        dequantize(raw, fmt, (2, 32))
    with pytest.raises(ValueError, match="Rows of 16 weights"):
        dequantize(raw, fmt, (8, 16))
    with pytest.raises(ValueError, match=r"not to torch\.float64"):
        dequantize(raw, fmt, (4, 32), torch.float64)
    with pytest.raises(ValueError, match=r"must come as uint8, not as torch\.int8"):
        dequantize(raw.view(torch.int8), fmt, (4, 32))
    with pytest.raises(ValueError, match="Rows can only be taken from a matrix"):
        dequantize_rows(raw, fmt, (2, 2, 32), torch.tensor([0]))
    with pytest.raises(IndexError):
        dequantize_rows(raw, fmt, (4, 32), torch.tensor([4]))
