"""A product added part by part: the same as at once, in place, whatever the parts."""

import pytest
import torch
from apple_silicon_video.quantization.low_rank import add_product

ROWS, RANK, COLUMNS = 37, 5, 24


@pytest.mark.parametrize("part_bytes", [1, 4 * COLUMNS * 7, 4 * COLUMNS * ROWS, 1 << 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_sums(part_bytes, dtype):
    generator = torch.Generator().manual_seed(0)
    weight, up, down = (
        torch.randn(shape, generator=generator) for shape in ((ROWS, COLUMNS), (ROWS, RANK), (RANK, COLUMNS))
    )
    up, down = up.to(dtype), down.to(dtype)
    exact = weight.double() - 0.7 * (up.double() @ down.double())
    given = weight.data_ptr()
    add_product(weight, up, down, -0.7, part_bytes)
    assert weight.data_ptr() == given
    assert (weight - exact).abs().max() < 2e-6


def test_a_part_is_all_that_is_made(monkeypatch):
    made = []
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *factors: made.append(mm(*factors)) or made[-1])
    add_product(torch.zeros(ROWS, COLUMNS), torch.ones(ROWS, RANK), torch.ones(RANK, COLUMNS), 1.0, 10 * 4 * COLUMNS)
    assert [part.shape[0] for part in made] == [10, 10, 10, 7]
