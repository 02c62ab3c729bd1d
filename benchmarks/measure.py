"""What the benchmarks share: the machine they run on, processes of their own for measurements, and resident memory.

Resident memory is sampled in the process itself (psutil's rss), the same on Linux and macOS: pages of mapped files
that were read count as resident until they are dropped.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = str(ROOT / "scripts")
SAMPLING_SECONDS = 0.005

if SCRIPTS not in sys.path:
    sys.path.append(SCRIPTS)  # at the end: scripts/gguf.py must not hide the PyPI package of that name

Row = dict[str, Any]
PASSING_FACTS = ("date", "load_average")  # of machine(): not the same in two runs


def machine() -> Row:
    """What a figure depends on: processor, cores, memory, system, versions, device; the day, and the load by others."""
    import torch

    return {
        "processor": _processor(),
        "cores": os.cpu_count() or 1,
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "os": f"macOS {platform.mac_ver()[0]}" if sys.platform == "darwin" else platform.system(),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": "MPS" if torch.backends.mps.is_available() else "CPU",
        "date": datetime.date.today().isoformat(),
        "load_average": round(os.getloadavg()[0], 1),
    }


def machine_slug(facts: Row) -> str:
    """A file name for results of this machine: processor, cores and device."""
    text = f"{facts['processor']} {facts['cores']} cores {facts['device']}"
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _processor() -> str:
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    else:
        cpuinfo = Path("/proc/cpuinfo")
        text = cpuinfo.read_text(encoding="utf-8", errors="replace") if cpuinfo.exists() else ""
        match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
        found = match[1].strip() if match else ""
    return found or platform.processor() or platform.machine()


class PeakMemory:
    """Most resident bytes while a ``with`` block runs, and what was resident before it."""

    def __enter__(self) -> PeakMemory:
        self._process, self._done = psutil.Process(), threading.Event()
        self.before = self.peak = self._process.memory_info().rss
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(SAMPLING_SECONDS):
            self.peak = max(self.peak, self._process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._watcher.join()
        self.after = self._process.memory_info().rss
        self.peak = max(self.peak, self.after)


def in_own_process(script: str, *arguments: object, runs: int = 1) -> Row:
    """Run ``script --measure ARGUMENTS`` in fresh processes.

    Returns:
        what they print as JSON: the least of every value that ends in ``seconds``, the largest of the others.

    Raises:
        RuntimeError: one of them failed; with the last line of its messages.
    """
    rows = []
    for _ in range(runs):
        command = [sys.executable, script, "--measure", *map(str, arguments)]
        result = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
        if result.returncode:
            lines = result.stderr.strip().splitlines() or ["no message"]
            raise RuntimeError(f"{Path(script).name} {' '.join(command[3:])} failed: {lines[-1]}")
        rows.append(json.loads(result.stdout.strip().splitlines()[-1]))
    return {key: (min if key.endswith("seconds") else max)(row[key] for row in rows) for key in rows[0]}


def main(measure: Callable[..., Row], run: Callable[[], list[Row]]) -> None:
    """What a benchmark's file does as a script: ``--measure ARGUMENTS`` for ``in_own_process``, else all as JSON."""
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(*sys.argv[2:])))
    else:
        print(json.dumps(run(), indent=1))
