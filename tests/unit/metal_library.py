"""The Metal kernels on the CPU: their compiler, and what surrounds every test of a file that imports ``metal``."""

import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from apple_silicon_video.quantization import metal_kernels, metal_matmul

sys.path.append(str(Path(__file__).resolve().parents[1]))

import metal_on_cpu

library = cache(metal_on_cpu.compile_shader)


@pytest.fixture(autouse=True)
def metal(monkeypatch):
    """Metal on the CPU in the place of torch's, and no verdicts from other tests."""
    monkeypatch.setattr(torch.mps, "compile_shader", library, raising=False)
    for switch in (metal_kernels.SWITCH, metal_matmul.ROWS_SWITCH):
        monkeypatch.delenv(switch, raising=False)
    metal_kernels.forget()
    yield
    metal_kernels.forget()
