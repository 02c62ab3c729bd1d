"""What decoding with torch costs: launches and moved bytes, by the counter of benchmarks/decode.py."""

import sys
from pathlib import Path

import gguf
import pytest
import torch
from apple_silicon_video.quantization.formats import CPU_CHUNK, FORMATS, dequantize, random_blocks

BENCHMARKS = str(Path(__file__).resolve().parents[2] / "benchmarks")
if BENCHMARKS not in sys.path:
    sys.path.append(BENCHMARKS)

import decode  # noqa: E402
import plain_decode  # noqa: E402

MAX_LAUNCHES = 14
MAX_BYTES = 5.0

# Launches, and moved bytes over the necessary ones: the quantised bytes read once, the output written once.
# Operations count as decode.Traffic tells; a tensor of several chunks costs the sum of its chunks.
COSTS = {
    ("Q2_K", torch.float16): (6, 3.28),
    ("Q2_K", torch.bfloat16): (6, 3.28),
    ("Q2_K", torch.float32): (7, 4.08),
    ("Q3_K", torch.float16): (13, 4.91),
    ("Q3_K", torch.bfloat16): (13, 4.91),
    ("Q3_K", torch.float32): (13, 3.14),
    ("Q4_K", torch.float16): (10, 2.44),
    ("Q4_K", torch.bfloat16): (10, 2.44),
    ("Q4_K", torch.float32): (12, 3.56),
    ("Q5_K", torch.float16): (13, 4.51),
    ("Q5_K", torch.bfloat16): (13, 4.51),
    ("Q5_K", torch.float32): (14, 4.72),
    ("Q6_K", torch.float16): (9, 4.38),
    ("Q6_K", torch.bfloat16): (9, 4.38),
    ("Q6_K", torch.float32): (9, 2.98),
}


def costs(name: str, dtype: torch.dtype, weights: int) -> tuple[int, float]:
    """Launches and bytes over the necessary ones."""
    fmt = FORMATS[name]
    raw = random_blocks(fmt, weights // fmt.block_size, seed=0)
    counted = decode.traffic(lambda: dequantize(raw, fmt, (weights,), dtype))
    return counted.launches, counted.bytes / decode.ideal_bytes(raw, weights, dtype)


@pytest.mark.parametrize("name, dtype", COSTS, ids=str)
def test_costs(name, dtype):
    launches, over_ideal = costs(name, dtype, 1 << 18)
    assert (launches, pytest.approx(over_ideal, abs=0.005)) == COSTS[name, dtype]
    assert launches <= MAX_LAUNCHES and over_ideal <= MAX_BYTES


def test_chunks_add_up():
    launches, over_ideal = COSTS["Q3_K", torch.float16]
    found = costs("Q3_K", torch.float16, 2 * CPU_CHUNK + (1 << 18))
    assert found == (3 * launches, pytest.approx(over_ideal, abs=0.005))


def test_unaligned_blocks_take_one_copy_more_for_their_scales():
    fmt = FORMATS["Q4_K"]
    storage = torch.zeros(1 + 64 * fmt.block_bytes, dtype=torch.uint8)
    counted = decode.traffic(lambda: dequantize(storage[1:], fmt, (64 * 256,), torch.float16))
    assert counted.launches == COSTS["Q4_K", torch.float16][0] + 1


def test_counter_counts_what_is_read_and_written():
    a, b = torch.ones(8, 16), torch.ones(16, dtype=torch.float16)
    out = torch.empty(8, 16, dtype=torch.float16)
    full, row = 8 * 16 * 4, 16 * 2
    for function, launches, moved in (
        (lambda: a[1:].t().view(torch.int32).unsqueeze(0), 0, 0),
        (lambda: torch.empty(5), 0, 0),
        (lambda: a * b, 1, full + row + full),
        (lambda: a + a, 1, 3 * full),
        (lambda: a.mul_(b), 1, full + row + full),
        (lambda: torch.mul(a, b, out=out), 1, full + row + full // 2),
        (lambda: out.copy_(a), 1, full + full // 2),
        (lambda: a.t().contiguous(), 1, 2 * full),
        (lambda: a.clone().unsqueeze(1).sum(0), 2, 2 * full + full + 16 * 4),
    ):
        counted = decode.traffic(function)
        assert (counted.launches, counted.bytes) == (launches, moved), counted.names


@pytest.mark.parametrize("name", plain_decode.DECODERS)
def test_what_the_benchmark_compares_with_is_right(name):
    blocks = random_blocks(FORMATS[name], 64, seed=1)
    expected = torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[name]))
    assert torch.equal(plain_decode.decode(name, blocks, torch.float32), expected)
    half = plain_decode.decode(name, blocks, torch.float16)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), expected, rtol=0, atol=0.01 * expected.abs().max().item())


def test_benchmark_runs():
    threads = torch.get_num_threads()
    rows = decode.run(small=True)
    assert [row["type"] for row in rows if row["path"] == "torch"] == list(decode.TYPES)
    assert all(value > 0 for row in rows for value in row.values() if not isinstance(value, str))
    q3_k = next(row for row in rows if row["type"] == "Q3_K")
    assert (q3_k["launches"], round(q3_k["bytes_over_ideal"], 2)) == COSTS["Q3_K", torch.float16]
    assert torch.get_num_threads() == threads
