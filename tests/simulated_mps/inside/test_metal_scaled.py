"""fp8, int8 and MXFP8 weights through the Metal kernels on the simulated device, bit for bit what the CPU decodes."""

import logging

import metal_on_cpu
import pytest
import simulated_mps.device as device
import torch
from apple_silicon_video.quantization import metal_kernels
from apple_silicon_video.quantization.scaled_formats import (
    SCALED_FORMATS,
    dequantize_scaled,
    dequantize_scaled_rows,
    read_scales,
)

MPS = torch.device("mps")
SHAPE = (48, 128)
GRIDS = {"none": None, "tensor": (), "row": (48, 1), "tile": (3, 4)}


@pytest.mark.parametrize("name", SCALED_FORMATS)
@pytest.mark.parametrize("grid", GRIDS)
def test_weights_and_rows(name, grid, monkeypatch, caplog):
    monkeypatch.setattr(device, "shader_compiler", metal_on_cpu.compile_shader)
    monkeypatch.delenv(metal_kernels.SWITCH, raising=False)
    metal_kernels.forget()
    caplog.set_level(logging.INFO)
    fmt = SCALED_FORMATS[name]
    codes = (torch.arange(48 * 128) * 7).to(torch.uint8)
    scales = None if GRIDS[grid] is None else read_scales(torch.rand(GRIDS[grid]) + 0.5, SHAPE)
    moved = None if scales is None else scales.to(MPS)
    for _ in range(2):
        result = dequantize_scaled(codes.to(MPS), fmt, SHAPE, moved, torch.bfloat16).cpu()
        assert metal_kernels.equal(result, dequantize_scaled(codes, fmt, SHAPE, scales, torch.bfloat16))
    rows = torch.tensor([[0, 47], [17, 17]])
    result = dequantize_scaled_rows(codes.to(MPS), fmt, SHAPE, rows.to(MPS), moved, torch.float16).cpu()
    assert metal_kernels.equal(result, dequantize_scaled_rows(codes, fmt, SHAPE, rows, scales, torch.float16))
    messages = [record.getMessage() for record in caplog.records if record.name == metal_kernels.__name__]
    assert len(messages) == 2 and all("in use" in message for message in messages)
    metal_kernels.forget()
