"""Installs the simulated device as the environment says: for servers and for test processes started by others.

SIMULATED_TORCH: the op table, "2.13" by default. SIMULATED_MACOS: "26.3" by default. SIMULATED_RULES: rules to switch
on, like "pad-rank-5,interpolate-half-5d,scores-2-31:elements=1000000". SIMULATED_RAM_GB: the Mac's memory, which sets
the working set, the largest buffer and what psutil tells. PYTORCH_ENABLE_MPS_FALLBACK has its usual meaning.
"""

import os
from typing import Any

from .counters import stats
from .device import install, mac
from .rules import enable_text


def install_from_environment() -> None:
    """Install the device; call it right after `import torch`."""
    install(
        os.environ.get("SIMULATED_TORCH", "2.13.0"),
        os.environ.get("SIMULATED_MACOS", "26.3"),
        os.environ.get("PYTORCH_ENABLE_MPS_FALLBACK") == "1",
    )
    enable_text(os.environ.get("SIMULATED_RULES", ""))
    ram = os.environ.get("SIMULATED_RAM_GB")
    if ram:
        mac(float(ram))
        _patch_psutil(int(float(ram) * (1 << 30)))


def _patch_psutil(total: int) -> None:
    """Let psutil report a machine with `total` bytes, of which the device's tensors alone take their part."""
    import psutil

    original = psutil.virtual_memory

    def virtual_memory() -> Any:
        available = max(total - stats().live, 0)
        percent = round(100 * (1 - available / total), 1)
        return original()._replace(total=total, available=available, free=available, percent=percent)

    psutil.virtual_memory = virtual_memory
