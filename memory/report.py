"""The memory report: a snapshot and the loaded models, as lines to read and as JSON for the front end's meter."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from .telemetry import MemorySnapshot

GIB = 1 << 30
ROWS = (
    ("MPS driver", "driver"),
    ("MPS tensors", "live"),
    ("Process", "process"),
    ("Available", "available"),
    ("Swap used", "swap"),
)
"""Label and the snapshot's field, as in the report of Free Memory."""


def memory_report(snapshot: MemorySnapshot, models: Iterable[tuple[str, str, int]]) -> str:
    """A line for each known figure in GiB, the share of the recommended working set, and a line for each model.

    models: (name, device, bytes on it).
    """
    lines = []
    for label, name in ROWS:
        value = getattr(snapshot, name)
        if value is not None:
            lines.append(f"{label}: {value / GIB:.2f} GiB")
    if snapshot.recommended is None:
        lines.append("No MPS device here")
    else:
        share = f" ({snapshot.driver / snapshot.recommended:.0%} in use)" if snapshot.driver is not None else ""
        lines.append(f"Recommended working set: {snapshot.recommended / GIB:.2f} GiB{share}")
    loaded = [f"Loaded: {name}, {size / GIB:.2f} GiB on {device}" for name, device, size in models]
    return "\n".join([*lines, *(loaded or ["Loaded: no models"])])


def meter_figures(snapshot: MemorySnapshot) -> dict[str, Any]:
    """The snapshot for the live meter: bytes by name, null where unknown."""
    return asdict(snapshot)
