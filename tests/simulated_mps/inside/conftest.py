"""These tests run inside a process that has installed the simulated device (see ../test_inside.py).

SIMULATED_TORCH chooses the op table; the other variables of ../environment.py work too.
"""

import sys
from pathlib import Path

import pytest
import torch

INSIDE = Path(__file__).resolve().parent
TESTS = INSIDE.parents[1]
sys.path += [str(folder) for folder in (TESTS, TESTS.parent / "scripts", INSIDE) if str(folder) not in sys.path]

from simulated_mps import disable_all, dry, limits, reset  # noqa: E402
from simulated_mps.environment import install_from_environment  # noqa: E402

install_from_environment()
torch.set_num_threads(1)

from _pack import load_pack  # noqa: E402

load_pack()


@pytest.fixture(autouse=True)
def fresh_device():
    """Every test begins with no rule, no limit, dry mode off, empty caches and counters at zero."""
    disable_all()
    dry(0)
    limits()
    torch.mps.empty_cache()
    reset()
    yield
    disable_all()
    dry(0)
    limits()
