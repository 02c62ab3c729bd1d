"""Counters of the simulated device: memory, operations, copies, CPU fallbacks, float64 attempts, waits."""

import json
from dataclasses import asdict, dataclass
from typing import NamedTuple

from .device import extension


class OpCount(NamedTuple):
    """One operation's calls, the bytes of all tensors it was given and returned, the elements of the largest one."""

    calls: int
    bytes: int
    largest: int


@dataclass(frozen=True)
class Stats:
    """What happened since the last reset(); sizes in bytes.

    `live` and `peak` count tensors' buffers, `driver` also what the allocator keeps for reuse. `ops` and `fell_back`
    have the operations' names without variant ("mm", "add", "copy", "conv3d", "sdpa.prefill"); a 1-D convolution is
    a conv2d to torch. `syncs` counts every wait of the host: torch.mps.synchronize, reading a number, a copy to the
    host, an op with a data-dependent shape, a CPU fallback. `float64_ops` tells which torch operations the attempts
    came from. `dry_computed` counts large ops that dry mode had to run since they have no meta kernel.
    """

    live: int
    peak: int
    driver: int
    allocations: int
    ops: dict[str, OpCount]
    host_to_device: int
    host_to_device_copies: int
    device_to_host: int
    device_to_host_copies: int
    device_to_device: int
    fell_back: dict[str, int]
    float64_attempts: int
    float64_ops: dict[str, int]
    syncs: int
    dry_computed: int

    def json(self) -> str:
        """The same as one JSON object."""
        return json.dumps(asdict(self))


def stats() -> Stats:
    """The counters now."""
    raw = extension().stats()
    return Stats(
        live=raw["live"],
        peak=raw["peak"],
        driver=extension().driver_allocated(),
        allocations=raw["allocations"],
        ops={name: OpCount(*count) for name, count in sorted(raw["ops"].items())},
        host_to_device=raw["host_to_device"][1],
        host_to_device_copies=raw["host_to_device"][0],
        device_to_host=raw["device_to_host"][1],
        device_to_host_copies=raw["device_to_host"][0],
        device_to_device=raw["device_to_device"][1],
        fell_back=raw["fell_back"],
        float64_attempts=sum(raw["float64_ops"].values()),
        float64_ops=raw["float64_ops"],
        syncs=raw["syncs"],
        dry_computed=raw["dry_computed"],
    )


def reset() -> None:
    """Set every counter to zero, the peak to what is live, and forget the timeline and the rules' reports."""
    extension().reset()
    from .rules import forget_violations

    forget_violations()
