"""A simulated Apple GPU for tests: an `mps:0` device with MPS's limits, errors and, on request, its defects.

    import simulated_mps as sim
    sim.install("2.13.0")
    with sim.rule("pad-rank-5"): ...
    sim.stats().peak

Children of tests/simulated_mps/test_inside.py use it; a process that installed it keeps it to its end.
"""

from .counters import OpCount, Stats, reset, stats
from .device import SimulationError, dry, install, installed, limits, mac, op_tables
from .rules import (
    RULES,
    Rule,
    Violation,
    disable,
    disable_all,
    enable,
    enable_text,
    enabled,
    rule,
    violations,
)
from .timeline import Timeline, modules, record, timeline

__all__ = [
    "RULES",
    "OpCount",
    "Rule",
    "SimulationError",
    "Stats",
    "Timeline",
    "Violation",
    "disable",
    "disable_all",
    "dry",
    "enable",
    "enable_text",
    "enabled",
    "install",
    "installed",
    "limits",
    "mac",
    "modules",
    "op_tables",
    "record",
    "reset",
    "rule",
    "stats",
    "timeline",
    "violations",
]
