"""The governor's escalation against given figures: trim, shrink, stop, each at its limit and not before."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from apple_silicon_video.memory.governor import LEAST_TEMPORARY, POLICIES, Governor, MemoryStop
from apple_silicon_video.memory.telemetry import MemorySnapshot

GIB = 1 << 30
CALM = MemorySnapshot(total=16 * GIB, swap=2 * GIB, live=5 * GIB, driver=6 * GIB, recommended=10 * GIB)


class Machine:
    """Figures that a test sets; trimming leaves the driver with the live tensors, and time passes with each look."""

    def __init__(self, setting, budget=256 << 20):
        self.figures, self.trims, self.time = CALM, 0, 0.0
        self.budget = SimpleNamespace(temporary_bytes=budget) if budget else None
        self.governor = Governor(POLICIES[setting], self.budget, lambda: self.figures, self.trim, lambda: self.time)

    def trim(self):
        self.trims += 1
        self.figures = replace(self.figures, driver=self.figures.live)

    def look(self, **figures):
        self.figures = replace(CALM, **figures)
        self.time += 1.0
        self.governor.look()


def gib(value):
    return int(value * GIB)


@pytest.mark.parametrize(("setting", "trim", "shrink"), [("careful", 9.0, 9.5), ("strict", 8.0, 8.5)])
def test_trims_first_and_shrinks_only_what_live_tensors_hold(setting, trim, shrink):
    machine = Machine(setting)
    machine.look()
    machine.look(driver=gib(trim - 0.01), live=gib(5))
    assert machine.trims == 0
    machine.look(driver=gib(trim + 0.01), live=gib(5))
    assert machine.trims == 1 and machine.budget.temporary_bytes == 256 << 20
    machine.look(driver=gib(trim + 0.01), live=gib(trim))  # nothing to gain
    assert machine.trims == 1
    machine.look(driver=gib(shrink + 0.4), live=gib(5))  # what trimming gives back suffices
    assert machine.trims == 2 and machine.budget.temporary_bytes == 256 << 20
    machine.look(driver=gib(shrink + 0.4), live=gib(shrink + 0.01))
    assert machine.trims == 3 and machine.budget.temporary_bytes == 128 << 20
    machine.governor.restore()
    assert machine.budget.temporary_bytes == 256 << 20


def test_strict_stops_at_the_working_set_when_nothing_is_left_to_shrink(caplog):
    caplog.set_level("INFO")
    machine = Machine("strict")
    sizes = []
    with pytest.raises(MemoryStop) as stop:
        for _ in range(10):
            machine.look(driver=gib(10.2), live=gib(10.2), swap=gib(2.4))
            sizes.append(machine.budget.temporary_bytes >> 20)
    assert sizes == [128, 64, 32] and machine.budget.temporary_bytes == LEAST_TEMPORARY
    assert [record.getMessage().split(", ")[1] for record in caplog.records] == [
        f"chunks are now {size} MiB." for size in sizes
    ]
    text = str(stop.value)
    assert text.startswith("Sampling was stopped because 10.2 GiB of the 10.0 GiB that this Mac's GPU should hold")
    assert "swap has grown by 0.4 GiB" in text and "queue it again to go on" in text


def test_the_working_set_itself_is_too_much_and_no_chunk_gets_too_small():
    machine = Machine("strict", budget=None)
    machine.look(driver=gib(9.99), live=gib(9.99))
    with pytest.raises(MemoryStop):
        machine.look(driver=gib(10), live=gib(10))
    machine = Machine("strict", budget=LEAST_TEMPORARY * 3 // 2)
    machine.look(driver=gib(10), live=gib(10))
    assert machine.budget.temporary_bytes == LEAST_TEMPORARY


def test_careful_tolerates_a_full_working_set():
    machine = Machine("careful")
    for _ in range(10):
        machine.look(driver=gib(11), live=gib(11))
    assert machine.budget.temporary_bytes == LEAST_TEMPORARY


@pytest.mark.parametrize(("setting", "tolerated", "stopped"), [("careful", 5.9, 6.1), ("strict", 2.7, 2.9)])
def test_swap_that_grows_during_the_run_stops_it(setting, tolerated, stopped):
    machine = Machine(setting, budget=None)
    machine.look(swap=gib(tolerated))
    with pytest.raises(MemoryStop):
        machine.look(swap=gib(stopped))


def test_the_first_look_is_at_once_and_the_next_a_second_later():
    machine = Machine("strict")
    machine.figures = replace(CALM, driver=gib(8.6), live=gib(8.6))
    for _ in range(2):
        machine.governor.look()
        assert machine.budget.temporary_bytes == 128 << 20
    machine.look(driver=gib(8.6), live=gib(8.6))
    assert machine.budget.temporary_bytes == 64 << 20


def test_nothing_happens_without_figures():
    machine = Machine("strict")
    machine.look(driver=None, recommended=None, swap=gib(16))
    machine.look(recommended=0)
    machine.look(swap=None)
    machine.look(total=None, swap=gib(16))
    assert machine.trims == 0 and machine.budget.temporary_bytes == 256 << 20
