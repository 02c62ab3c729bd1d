"""Telemetry and release on any machine: parsers against recorded texts, the order of the steps against a fake MPS."""

import gc
import mmap
import os
import sys
import types
import weakref

import psutil
import pytest
import torch
from apple_silicon_video.memory import telemetry
from apple_silicon_video.memory.comfy_models import unload_models
from apple_silicon_video.memory.release import ReleaseReport, release_memory
from apple_silicon_video.memory.report import memory_report, meter_figures
from apple_silicon_video.memory.telemetry import MemorySnapshot, parse_swapusage, parse_vm_stat, take_snapshot
from apple_silicon_video.quantization import mapped_pages
from apple_silicon_video.quantization.safetensors_file import SafetensorsFile
from safetensors.torch import save_file

GIB = 1 << 30
VM_STAT = """Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                               23432.
Pages active:                            412345.
Pages inactive:                          401234.
Pages speculative:                         3210.
Pages wired down:                        123456.
Pages purgeable:                           1234.
"""
SWAPUSAGE = "total = 2048.00M  used = 1024.25M  free = 1023.75M  (encrypted)\n"
SYSCTL_ERROR = "host_statistics64(HOST_VM_INFO64) syscall failed: (ipc/mig) array not large enough"


class FakeMPS:
    """Records what is called; 3 GiB live of 5 GiB held until the cache is emptied."""

    def __init__(self, monkeypatch, on_synchronize=lambda: None):
        self.calls: list[str] = []
        self.held = 5 * GIB
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
        monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 3 * GIB)
        monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: self.held)
        monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 11 * GIB)
        monkeypatch.setattr(torch.mps, "synchronize", lambda: (self.calls.append("synchronize"), on_synchronize()))
        monkeypatch.setattr(torch.mps, "empty_cache", self.empty_cache)

    def empty_cache(self) -> None:
        self.calls.append("empty_cache")
        self.held = 3 * GIB


def test_vm_stat():
    assert parse_vm_stat(VM_STAT) == (23432 + 401234) * 16384
    for text in ("", VM_STAT.replace("Pages inactive", "Pages"), VM_STAT.replace("page size", "size")):
        with pytest.raises(ValueError, match="vm_stat"):
            parse_vm_stat(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [(SWAPUSAGE, 1024.25 * (1 << 20)), ("used = 1,50G", 1.5 * GIB), ("used = 0.00M", 0)],
)
def test_swapusage(text, size):
    assert parse_swapusage(text) == size


def test_swapusage_refuses_another_text():
    with pytest.raises(ValueError, match="swapusage"):
        parse_swapusage("total = 1")


def test_snapshot_of_this_machine(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    snapshot = take_snapshot()
    assert (snapshot.live, snapshot.driver, snapshot.recommended) == (None, None, None)
    assert snapshot.process and snapshot.available and snapshot.total and snapshot.swap is not None
    assert 10 << 20 < snapshot.process < snapshot.total
    assert snapshot.available < snapshot.total


def test_snapshot_counts_fresh_pages():
    """Pages of a new mapping, since an allocator may hand out what an earlier test gave back."""
    before = take_snapshot().process
    with mmap.mmap(-1, 64 << 20) as pages:
        pages.write(b"\1" * len(pages))
        grown = take_snapshot().process - before
    assert 48 << 20 < grown < 96 << 20


def without_psutil(monkeypatch, kind):
    if kind == "missing":
        monkeypatch.setitem(sys.modules, "psutil", None)
        return

    def fail(*_):
        raise RuntimeError(SYSCTL_ERROR)

    for name in ("Process", "virtual_memory", "swap_memory"):
        monkeypatch.setattr(psutil, name, fail)


@pytest.mark.parametrize("kind", ["missing", "failing"])
def test_without_psutil_the_system_answers(monkeypatch, kind):
    wanted = take_snapshot()
    without_psutil(monkeypatch, kind)
    snapshot = take_snapshot()
    assert abs(snapshot.process - wanted.process) < 32 << 20
    assert abs(snapshot.total - wanted.total) < wanted.total / 20
    assert snapshot.available < snapshot.total and snapshot.swap is not None


@pytest.mark.parametrize("kind", ["missing", "failing"])
def test_without_psutil_macos_is_asked(monkeypatch, kind):
    answers = {"vm_stat": VM_STAT, "sysctl": SWAPUSAGE, "ps": " 123456\n"}
    monkeypatch.setattr(telemetry, "_run", lambda *command: answers[command[0]])
    monkeypatch.setitem(telemetry.SOURCES, "process", [telemetry._psutil_process, telemetry._ps_process])
    without_psutil(monkeypatch, kind)
    snapshot = take_snapshot()
    assert snapshot.available == parse_vm_stat(VM_STAT)
    assert snapshot.swap == parse_swapusage(SWAPUSAGE)
    assert snapshot.process == 123456 << 10


def test_nobody_knows(monkeypatch):
    def fail(*_):
        raise OSError("no such tool")

    for name in telemetry.SOURCES:
        monkeypatch.setitem(telemetry.SOURCES, name, [fail, fail])
    FakeMPS(monkeypatch)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", fail)
    assert take_snapshot() == MemorySnapshot(live=3 * GIB, driver=5 * GIB)


class Cycle:
    def __init__(self):
        self.self = self


def test_order_of_release(monkeypatch):
    """Unloaded first; what lay in a reference cycle is dead before the GPU is waited for; the cache goes last."""
    gc.disable()
    try:
        holder = [Cycle()]
        dead = weakref.ref(holder[0])
        alive_at: dict[str, bool] = {}
        mps = FakeMPS(monkeypatch, on_synchronize=lambda: alive_at.update(synchronize=dead() is not None))

        def unload() -> list[str]:
            mps.calls.append("unload")
            alive_at["unload"] = dead() is not None
            holder.clear()
            return ["WAN21"]

        def drop() -> list[str]:
            mps.calls.append("drop")
            return ["Something: dropped"]

        report = release_memory(unload, drop=drop)
    finally:
        gc.enable()
    assert mps.calls == ["unload", "drop", "synchronize", "empty_cache"]
    assert report.text().splitlines()[:2] == ["Unloaded: WAN21", "Something: dropped"]
    assert alive_at == {"unload": True, "synchronize": False}
    assert report.unloaded == ("WAN21",)
    assert (report.before.driver, report.after.driver) == (5 * GIB, 3 * GIB)


def test_options(monkeypatch):
    mps = FakeMPS(monkeypatch)
    report = release_memory(None, empty_cache=False)
    assert mps.calls == ["synchronize"] and report.unloaded == () and report.after.driver == 5 * GIB


def test_without_a_device(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    report = release_memory(lambda: [])
    assert "No MPS device here" in report.text() and "Process: " in report.text()


def test_report_text():
    before = MemorySnapshot(process=4 * GIB, swap=0, live=3 * GIB, driver=5 * GIB)
    after = MemorySnapshot(process=GIB, swap=None, live=0, driver=GIB // 2, recommended=11 * GIB)
    assert ReleaseReport(before, after, ("WAN21", "T5")).text() == (
        "Unloaded: WAN21, T5\n"
        "MPS driver: 5.00 GiB before, 0.50 GiB after (-4.50)\n"
        "MPS tensors: 3.00 GiB before, 0.00 GiB after (-3.00)\n"
        "Process: 4.00 GiB before, 1.00 GiB after (-3.00)\n"
        "Recommended working set: 11.00 GiB"
    )


def test_every_device_is_unloaded(monkeypatch):
    """Core's free_memory handles one device; models on the CPU and dead entries must not be forgotten."""

    def entry(device: str, model: object) -> types.SimpleNamespace:
        patcher = None if model is None else types.SimpleNamespace(model=model)
        return types.SimpleNamespace(device=torch.device(device), model=patcher)

    management = types.ModuleType("comfy.model_management")
    management.current_loaded_models = [entry("cpu", torch.nn.Linear(1, 1)), entry("mps", Cycle()), entry("mps", None)]
    freed: list[tuple[float, str]] = []

    def free_memory(size: float, device: torch.device, keep_loaded: list[object]) -> None:
        assert keep_loaded == []
        freed.append((size, device.type))
        loaded = management.current_loaded_models
        loaded[:] = [entry for entry in loaded if entry.device != device]

    management.free_memory = free_memory
    management.cleanup_models = lambda: freed.append((0, "cleanup"))
    package = types.ModuleType("comfy")
    package.model_management = management
    monkeypatch.setitem(sys.modules, "comfy", package)
    monkeypatch.setitem(sys.modules, "comfy.model_management", management)
    assert unload_models() == ["Linear", "Cycle"]
    assert sorted(freed[:-1]) == [(1e30, "cpu"), (1e30, "mps")] and freed[-1] == (0, "cleanup")
    assert management.current_loaded_models == []


def test_pages_of_model_files_are_dropped(tmp_path):
    """What was read from a file that is still mapped leaves the process; its numbers stay."""
    size = 64 << 20
    save_file({"weight": torch.arange(size, dtype=torch.int32).to(torch.uint8)}, tmp_path / "big.safetensors")
    file = SafetensorsFile(tmp_path / "big.safetensors")
    weight = file.raw("weight")
    total = int(weight.sum())
    before = take_snapshot().process
    assert mapped_pages.release_all() >= 1
    assert before - take_snapshot().process > size * 3 // 4
    assert int(weight.sum()) == total


def test_process_id_is_ours(monkeypatch):
    asked = []
    monkeypatch.setattr(telemetry, "_run", lambda *command: asked.append(command) or "1")
    telemetry._ps_process()
    assert asked == [("ps", "-o", "rss=", "-p", str(os.getpid()))]


def test_report_lists_figures_and_models():
    snapshot = MemorySnapshot(process=3 * GIB, swap=0, live=2 * GIB, driver=4 * GIB, recommended=8 * GIB)
    report = memory_report(snapshot, [("WAN21", "mps", GIB)])
    assert report.splitlines() == [
        "MPS driver: 4.00 GiB",
        "MPS tensors: 2.00 GiB",
        "Process: 3.00 GiB",
        "Swap used: 0.00 GiB",
        "Recommended working set: 8.00 GiB (50% in use)",
        "Loaded: WAN21, 1.00 GiB on mps",
    ]
    assert memory_report(MemorySnapshot(), []) == "No MPS device here\nLoaded: no models"
    assert meter_figures(snapshot)["driver"] == 4 * GIB and meter_figures(snapshot)["total"] is None
