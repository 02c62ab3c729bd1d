"""QuantizedWeight: the face of a dense tensor, the memory of its blocks."""

import copy

import pytest
import torch
from apple_silicon_video.quantization.formats import FORMATS, dequantize, random_blocks
from apple_silicon_video.quantization.tensor import QuantizedWeight

SHAPE = (12, 512)


@pytest.fixture(params=["Q3_K", "Q5_K", "Q8_0"])
def weight(request):
    block_format = FORMATS[request.param]
    count = SHAPE[0] * SHAPE[1] // block_format.block_size
    blocks = random_blocks(block_format, count, seed=1).reshape(-1)
    return QuantizedWeight(blocks, block_format, SHAPE, torch.bfloat16)


def dense(weight, dtype=torch.float32):
    return dequantize(weight.blocks, weight.block_format, SHAPE, dtype)


def test_reports_logical_shape_compute_dtype_and_quantised_bytes(weight):
    assert weight.shape == SHAPE
    assert weight.dtype == torch.bfloat16
    assert weight.is_floating_point()
    assert weight.nbytes == weight.blocks.numel() < weight.numel() * 2
    parameter = torch.nn.Parameter(weight, requires_grad=False)
    assert isinstance(parameter, QuantizedWeight) and isinstance(parameter, torch.nn.Parameter)
    assert parameter.detach().nbytes == weight.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dequantize_and_casts_equal_the_table(weight, dtype):
    assert torch.equal(weight.dequantize(dtype), dense(weight, dtype))
    cast = weight.to(dtype)
    assert torch.equal(cast, dense(weight, dtype)) if dtype != weight.dtype else cast is weight


def test_any_operation_sees_the_decoded_weight(weight):
    weight = weight.with_dtype(torch.float32)
    reference = dense(weight)
    inputs = torch.randn(5, SHAPE[1])
    assert torch.equal(torch.nn.functional.linear(inputs, weight), torch.nn.functional.linear(inputs, reference))
    assert torch.equal(weight + 1, reference + 1)
    assert torch.equal(weight.t(), reference.t())
    assert torch.equal(weight.reshape(-1)[:7], reference.reshape(-1)[:7])
    assert torch.equal(torch.cat([weight, weight]), torch.cat([reference, reference]))
    assert torch.equal(torch.zeros(SHAPE).copy_(weight), reference)
    assert torch.equal(torch.empty_like(weight).copy_(weight), reference)
    assert float(weight.abs().max()) == float(reference.abs().max())


def test_row_slices_and_splits_stay_quantised(weight):
    for part, rows in ((weight[2:5], slice(2, 5)), (weight.narrow(0, 4, 8), slice(4, 12)), (weight[7:], slice(7, 12))):
        assert isinstance(part, QuantizedWeight)
        assert torch.equal(part.dequantize(torch.float32), dense(weight)[rows])
    for parts in (weight.chunk(3), weight.split(4), weight.split([4, 4, 4])):
        assert all(isinstance(part, QuantizedWeight) for part in parts)
        joined = torch.cat([part.dequantize(torch.float32) for part in parts])
        assert torch.equal(joined, dense(weight))
    assert not isinstance(weight[:, 3:9], QuantizedWeight)
    assert torch.equal(weight[:, 3:9], dense(weight, torch.bfloat16)[:, 3:9])


def test_rows_are_decoded_one_by_one(weight):
    rows = torch.tensor([[3, 0], [11, 3]])
    expected = dense(weight, torch.bfloat16)[rows]
    assert torch.equal(weight.dequantize_rows(rows), expected)
    assert torch.equal(torch.nn.functional.embedding(rows, weight), expected)
    assert torch.equal(weight.index_select(0, rows[0]), expected[0])


def test_writing_is_refused_and_blocks_stay_as_they_are(weight):
    before = weight.blocks.clone()
    for write in (lambda: weight.add_(1), lambda: weight.mul_(2), lambda: weight.copy_(torch.zeros(SHAPE))):
        with pytest.raises(RuntimeError, match="read-only"):
            write()
    assert torch.equal(weight.blocks, before)


def test_copies_share_the_blocks(weight):
    for other in (weight.clone(), weight.detach(), copy.deepcopy(weight), weight.with_dtype(torch.float16)):
        assert isinstance(other, QuantizedWeight)
        assert other.blocks.data_ptr() == weight.blocks.data_ptr()


def test_return_to_the_cpu_uses_the_blocks_of_the_file(weight):
    elsewhere = weight.on_device(torch.device("meta"))
    assert elsewhere.device.type == "meta" and elsewhere.blocks.device.type == "meta"
    back = elsewhere.to("cpu")
    assert isinstance(back, QuantizedWeight)
    assert back.blocks.data_ptr() == weight.blocks.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_plain_tensors_are_wrapped_without_a_copy(dtype):
    source = torch.randn(6, 10).to(dtype)
    weight = QuantizedWeight.from_dense(source, torch.float16)
    assert weight.blocks.data_ptr() == source.data_ptr()
    assert weight.dtype == torch.float16
    assert torch.equal(weight.dequantize(dtype), source)
    assert weight.dequantize(dtype).data_ptr() == source.data_ptr()
    assert torch.equal(weight.to(torch.float32), source.float())
    assert weight.to(torch.float32).data_ptr() != source.data_ptr()
    rows = torch.tensor([5, 0, 2])
    assert torch.equal(weight.dequantize_rows(rows, torch.float32), source[rows].float())


def test_two_views_with_different_dtypes_do_not_affect_each_other(weight):
    other = weight.with_dtype(torch.float32)
    assert (weight.dtype, other.dtype) == (torch.bfloat16, torch.float32)
    assert weight.dequantize().dtype == torch.bfloat16 and other.dequantize().dtype == torch.float32


def test_rows_that_are_no_whole_blocks_are_decoded_as_a_whole():
    block_format = FORMATS["Q5_K"]
    blocks = random_blocks(block_format, 9, seed=2).reshape(-1)
    weight = QuantizedWeight(blocks, block_format, (16, 16, 3, 3))
    reference = dequantize(blocks, block_format, (9 * 256,)).view(16, 16, 3, 3)
    assert torch.equal(weight.dequantize(), reference)
    assert torch.equal(weight[3:7], reference[3:7]) and not isinstance(weight[3:7], QuantizedWeight)
    assert torch.equal(torch.empty(16, 16, 3, 3).copy_(weight), reference)
