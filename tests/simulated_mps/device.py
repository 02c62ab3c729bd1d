"""An `mps:0` device on a CPU-only PyTorch: installation, limits, dry mode and the torch.mps functions.

A real C++ backend registered under torch's MPS dispatch key, so that plain tensors live on `mps:0` and unmodified
code (ComfyUI itself) runs on it and meets MPS's errors. It has no Metal: results are the CPU's, except where a rule
(rules/) is on; speed, and MPSGraph's aborts, are not reproduced. There is no autograd.
"""

import json
import platform
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from .build import load

OPS = Path(__file__).resolve().parent / "mps_ops.json"
"""Per torch version: `mps`, the ops with an MPS kernel; `none`, those without; `always_cpu_fallback`, those whose MPS
kernel is a copy to the CPU and back. Read from the operator registrations in the macOS arm64 wheels' binaries, which
agree with native_functions.yaml of the same version; what is in none of the lists works by decomposition."""

FLOAT8 = {"float8_e5m2": 23, "float8_e4m3fn": 24, "float8_e5m2fnuz": 25, "float8_e4m3fnuz": 26, "float8_e8m0fnu": 44}
"""c10::ScalarType's numbers."""

VERSIONED_KERNELS = {"_fused_rms_norm"}
"""Ops that are composites in a CPU build and one kernel in the MPS backends that list them."""

CHIP, GPU_CORES = "Apple M4 Max", 40

shader_compiler: Callable[[str], Any] | None = None
"""What torch.mps.compile_shader calls: takes Metal source, returns a library object. None: it raises RuntimeError."""

_installed: dict[str, Any] = {}


class SimulationError(RuntimeError):
    """The simulated device was used wrongly; the message is one sentence."""


@cache
def extension() -> ModuleType:
    """The C++ side, built when needed."""
    return load()


@cache
def op_tables() -> dict[str, dict[str, list[str]]]:
    """The op tables by torch version."""
    return json.loads(OPS.read_text())


def table_version(version: str) -> str:
    """The op table's full version of "2.13" or "2.13.0"; raises SimulationError for one that is not there."""
    wanted = version.split("+")[0].split(".")[:2]
    for known in op_tables():
        if known.split(".")[:2] == wanted:
            return known
    raise SimulationError(f"There is no op table for torch {version}: choose one of {', '.join(op_tables())}.")


def install(torch_version: str = "2.13.0", macos: str = "26.3", env_fallback: bool = False) -> None:
    """Put the device into this process, for good, behaving like the MPS backend of `torch_version` on `macos`.

    Call it right after `import torch`, before anything asks whether MPS is there. `env_fallback` stands for
    PYTORCH_ENABLE_MPS_FALLBACK=1. A second call with other arguments raises SimulationError.
    """
    version = table_version(torch_version)
    wanted = {"torch": version, "macos": macos, "env_fallback": env_fallback}
    if _installed and _installed != wanted:
        raise SimulationError(f"The simulated device already runs as {_installed}: use another process for {wanted}.")
    if _installed:
        return
    numbers = tuple(map(int, version.split(".")[:2]))
    table = op_tables()[version]
    castable = {"float8_e4m3fn"} if numbers >= (2, 15) else set()
    extension().configure(
        {
            "missing": set(table["none"]),
            "always_on_cpu": set(table["always_cpu_fallback"]),
            "uncastable": {number for name, number in FLOAT8.items() if name not in castable},
            "own_kernels": [*table["always_cpu_fallback"], *sorted(VERSIONED_KERNELS & set(table["mps"]))],
            "prefill_attention": numbers >= (2, 13),
            "vector_attention": numbers >= (2, 8),
            "cpu_fallback_allowed": env_fallback,
        }
    )
    major, minor = (*map(int, macos.split(".")), 0)[:2]
    extension().set_macos_version(major, minor)
    _installed.update(wanted)
    _patch_torch(numbers)
    platform.mac_ver = lambda *_: (macos, ("", "", ""), "arm64")  # type: ignore[assignment]
    platform.machine = lambda: "arm64"


def installed() -> dict[str, Any]:
    """What was installed: "torch", "macos", "env_fallback"; empty before install()."""
    return dict(_installed)


def limits(high_watermark_bytes: int = 0, max_buffer_bytes: int = 0, recommended_bytes: int = 48 << 30) -> None:
    """Set the Mac's limits in bytes: allocation ceiling (0 = none), largest buffer (0 = none), working set.

    The watermark ratios in the environment are read at the first allocation, as on a Mac, and set the ceiling if
    this function has not.
    """
    extension().set_limits(high_watermark_bytes, max_buffer_bytes, recommended_bytes)


def mac(ram_gb: float) -> None:
    """Set the limits of a Mac with this memory in GiB.

    The working set is 2/3 of it up to 36 GiB, 3/4 above; the largest buffer is 3/4 of the working set.
    """
    recommended = int(ram_gb * (1 << 30) * (2 / 3 if ram_gb <= 36 else 3 / 4))
    limits(0, recommended * 3 // 4, recommended)


def dry(above_elements: int = 0) -> None:
    """Dry mode for tensors above this many elements (0 = off): allocated and counted, never computed or touched.

    Smaller tensors (sigmas, indices, masks) are computed as usual. A 14B forward then gives its allocation peak in
    seconds. The rules report what they would have done, at their true thresholds; the timeline is recorded.
    """
    extension().set_dry(above_elements)
    extension().record(above_elements > 0)
    from .rules import refresh

    refresh()


def _patch_torch(version: tuple[int, ...]) -> None:
    """Give torch._C the functions that torch.mps and torch.backends.mps call and a CPU build lacks."""
    ext = extension()
    functions: dict[str, Callable[..., Any]] = {
        "_mps_is_available": lambda: True,
        "_mps_is_in_bad_fork": lambda: False,
        "_mps_is_on_macos_or_newer": lambda major, minor: macos_version() >= (major, minor),
        "_mps_get_default_generator": cache(ext.default_generator),
        "_mps_deviceSynchronize": ext.synchronize,
        "_mps_emptyCache": ext.empty_cache,
        "_mps_setMemoryFraction": ext.set_memory_fraction,
        "_mps_currentAllocatedMemory": lambda: ext.stats()["live"],
        "_mps_driverAllocatedMemory": ext.driver_allocated,
        "_mps_recommendedMaxMemory": ext.recommended,
        "_mps_get_name": lambda: CHIP,
        "_mps_get_core_count": lambda: GPU_CORES,
        "_mps_acquireEvent": lambda timing: 1,
        "_mps_releaseEvent": lambda event: None,
        "_mps_recordEvent": lambda event: None,
        "_mps_waitForEvent": lambda event: None,
        "_mps_synchronizeEvent": lambda event: ext.synchronize(),
        "_mps_queryEvent": lambda event: True,
        "_mps_elapsedTimeOfEvents": lambda start, end: 0.0,
        "_mps_compileShader": _compile_shader,
        "_accelerator_getAccelerator": lambda: torch.device("mps"),
        "_accelerator_getDeviceIndex": lambda: 0,
        "_accelerator_synchronizeDevice": lambda *_: ext.synchronize(),
        "_accelerator_emptyCache": ext.empty_cache,
    }
    for name, function in functions.items():
        setattr(torch._C, name, function)
    torch._C._has_mps = True  # type: ignore[misc]
    torch.mps._is_in_bad_fork = lambda: False
    for cached in (torch.backends.mps.is_available, torch.backends.mps.is_macos_or_newer):
        cached.cache_clear()
    if version < (2, 7):
        torch.mps._compile_shader = torch.mps.compile_shader  # type: ignore[attr-defined]
        del torch.mps.compile_shader


def macos_version() -> tuple[int, int]:
    """(major, minor) of the chosen macOS."""
    major, minor = (*map(int, _installed["macos"].split(".")), 0)[:2]
    return major, minor


def _compile_shader(source: str) -> Any:
    if shader_compiler is None:
        raise RuntimeError("The simulated MPS device runs no Metal: set simulated_mps.device.shader_compiler first.")
    return shader_compiler(source)
