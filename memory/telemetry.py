"""What memory holds at this moment: the process, the machine, and the MPS allocator.

psutil (which ComfyUI requires) answers first. Where it is missing, or fails as on macOS versions that grew the
kernel's statistics (`host_statistics64 ... array not large enough`), the system's own tools are asked: vm_stat, sysctl
and ps on macOS, /proc on Linux. A figure that nobody can give is None.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

log = logging.getLogger(__name__)

UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
# Pages that macOS can hand out without writing to swap, as psutil counts `available`.
AVAILABLE_PAGES = ("Pages free", "Pages inactive")


@dataclass(frozen=True)
class MemorySnapshot:
    """Bytes, or None where unknown.

    process: resident in RAM; available, total: of the machine; swap: in use; live: tensors on MPS; driver: what the
    MPS allocator holds, cache included; recommended: the working set that Metal recommends.
    """

    process: int | None = None
    available: int | None = None
    total: int | None = None
    swap: int | None = None
    live: int | None = None
    driver: int | None = None
    recommended: int | None = None


def take_snapshot() -> MemorySnapshot:
    """The figures now. Never raises."""
    mps = torch.backends.mps.is_available()
    return MemorySnapshot(
        **{name: _first_answer(sources) for name, sources in SOURCES.items()},
        **{name: _first_answer([getattr(torch.mps, source)]) for name, source in MPS_SOURCES.items() if mps},
    )


def parse_vm_stat(text: str) -> int:
    """Available bytes from the output of macOS's vm_stat. Raises ValueError for another text."""
    page = re.search(r"page size of (\d+) bytes", text)
    pages = [re.search(rf"^{name}:\s+(\d+)\.", text, re.MULTILINE) for name in AVAILABLE_PAGES]
    if page is None or None in pages:
        raise ValueError("not the output of vm_stat")
    return int(page[1]) * sum(int(match[1]) for match in pages if match)


def parse_swapusage(text: str) -> int:
    """Used bytes from `sysctl vm.swapusage`, as in `total = 2048.00M  used = 1024.25M ...`. Raises ValueError."""
    used = re.search(r"used = ([\d.,]+)([KMGT])", text)
    if used is None:
        raise ValueError("not the output of sysctl vm.swapusage")
    return int(float(used[1].replace(",", ".")) * UNITS[used[2]])


def _first_answer(sources: list[Callable[[], int]]) -> int | None:
    for source in sources:
        try:
            return int(source())
        except Exception as error:  # psutil raises RuntimeError, OSError or its own errors, depending on the system
            log.debug("%s gave no figure: %s", source, error)
    return None


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout


def _meminfo(field: str) -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


def _psutil_process() -> int:
    import psutil

    return psutil.Process().memory_info().rss


def _proc_process() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _ps_process() -> int:
    return int(_run("ps", "-o", "rss=", "-p", str(os.getpid()))) << 10


def _psutil_available() -> int:
    import psutil

    return psutil.virtual_memory().available


def _vm_stat_available() -> int:
    return parse_vm_stat(_run("vm_stat"))


def _proc_available() -> int:
    return _meminfo("MemAvailable")


def _psutil_total() -> int:
    import psutil

    return psutil.virtual_memory().total


def _sysconf_total() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _psutil_swap() -> int:
    import psutil

    return psutil.swap_memory().used


def _sysctl_swap() -> int:
    return parse_swapusage(_run("sysctl", "-n", "vm.swapusage"))


def _proc_swap() -> int:
    return _meminfo("SwapTotal") - _meminfo("SwapFree")


SOURCES: dict[str, list[Callable[[], int]]] = {
    "process": [_psutil_process, _proc_process, _ps_process],
    "available": [_psutil_available, _vm_stat_available, _proc_available],
    "total": [_psutil_total, _sysconf_total],
    "swap": [_psutil_swap, _sysctl_swap, _proc_swap],
}
MPS_SOURCES = {
    "live": "current_allocated_memory",
    "driver": "driver_allocated_memory",
    "recommended": "recommended_max_memory",
}
