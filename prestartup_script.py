"""Process environment for MPS, set before torch is imported: memory watermarks and the CPU fallback.

PyTorch reads PYTORCH_ENABLE_MPS_FALLBACK when it is imported and the watermark ratios at the first allocation. Its
default ceiling, 1.7 times the recommended working set, exceeds the memory of most Macs, which then swap for hours
instead of failing. ComfyUI runs this file first. Nothing is changed elsewhere than on Apple Silicon, and whatever the
user has set stays.
"""

import os
import platform
import sys
from collections.abc import Mapping

HIGH, LOW = "PYTORCH_MPS_HIGH_WATERMARK_RATIO", "PYTORCH_MPS_LOW_WATERMARK_RATIO"
FALLBACK = "PYTORCH_ENABLE_MPS_FALLBACK"

# Metal recommends two thirds of the memory as working set up to 36 GiB and three quarters above.
SMALL_MAC_BYTES = 36 << 30
RECOMMENDED_SMALL, RECOMMENDED_LARGE = 2 / 3, 3 / 4

# macOS, ComfyUI and a browser need the rest.
CEILING = 0.85
COLLECT_AT = 1.0


def is_apple_silicon() -> bool:
    """Whether this process runs natively on an Apple Silicon Mac."""
    return sys.platform == "darwin" and platform.machine() == "arm64"


def memory_bytes() -> int:
    """Physical memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def settings(memory: int, environ: Mapping[str, str]) -> dict[str, str]:
    """Variables to set on a Mac with ``memory`` bytes: a ceiling of 85 % of them, and collection from the recommended
    working set on. The low ratio must not exceed the high one, or PyTorch refuses to start.
    """
    recommended = RECOMMENDED_SMALL if memory <= SMALL_MAC_BYTES else RECOMMENDED_LARGE
    chosen = {HIGH: f"{CEILING / recommended:.3f}", LOW: f"{COLLECT_AT:.3f}", FALLBACK: "1"}
    if HIGH in environ and LOW not in environ:
        chosen[LOW] = f"{_low_for(environ[HIGH]):.3f}"
    if LOW in environ:
        chosen.pop(HIGH)
    return {name: value for name, value in chosen.items() if name not in environ}


def _low_for(high: str) -> float:
    """A low ratio that PyTorch accepts beside the user's high one (0 means no ceiling)."""
    try:
        ratio = float(high)
    except ValueError:
        return COLLECT_AT
    return min(COLLECT_AT, ratio) if ratio > 0 else COLLECT_AT


if is_apple_silicon():
    os.environ.update(settings(memory_bytes(), os.environ))
