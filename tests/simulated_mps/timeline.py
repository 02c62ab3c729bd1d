"""What was live at the allocation peak, by operation and by module: recorded in dry mode, or on request.

Every buffer carries the name of the outermost torch operation that allocated it ("linear", "to", "cat") and of the
innermost module that was running, which `modules(model)` announces.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch

from .device import extension

GIB = 1 << 30


class Entry(NamedTuple):
    """Buffers of one origin that were live at the peak."""

    operation: str
    module: str
    bytes: int
    buffers: int


@dataclass(frozen=True)
class Timeline:
    """The recorded run; sizes in bytes. `curve` is what was live after each allocation or release, from `before` on."""

    before: int
    peak: int
    entries: list[Entry]
    curve: list[int]

    def by_operation(self) -> dict[str, int]:
        """Bytes live at the peak by operation, largest first."""
        return self._sums("operation")

    def by_module(self) -> dict[str, int]:
        """Bytes live at the peak by module, largest first; "" is outside of any announced module."""
        return self._sums("module")

    def _sums(self, field: str) -> dict[str, int]:
        sums: dict[str, int] = defaultdict(int)
        for entry in self.entries:
            sums[getattr(entry, field)] += entry.bytes
        return dict(sorted(sums.items(), key=lambda item: -item[1]))

    def table(self, rows: int = 12) -> str:
        """The largest entries as a Markdown table."""
        lines = [f"Peak {self.peak / GIB:.2f} GiB, {(self.peak - self.before) / GIB:.2f} GiB over the start.", ""]
        lines += ["| GiB | buffers | operation | module |", "|---:|---:|---|---|"]
        for entry in self.entries[:rows]:
            lines.append(f"| {entry.bytes / GIB:.3f} | {entry.buffers} | {entry.operation} | {entry.module} |")
        rest = self.entries[rows:]
        if rest:
            size, buffers = sum(entry.bytes for entry in rest), sum(entry.buffers for entry in rest)
            lines.append(f"| {size / GIB:.3f} | {buffers} | {len(rest)} more | |")
        return "\n".join(lines)


def record(on: bool = True) -> None:
    """Record the timeline outside of dry mode too; starting forgets the previous one."""
    extension().record(on)


def timeline() -> Timeline:
    """The timeline since recording began or reset()."""
    before, labels, events = extension().timeline()
    curve = list(accumulate((change for _, change in events), initial=before))
    end = max(range(len(curve)), key=curve.__getitem__)
    live: dict[int, list[int]] = defaultdict(lambda: [0, 0])
    live[0] = [before, 0]
    for label, change in events[:end]:
        live[label][0] += change
        live[label][1] += 1 if change > 0 else -1
    entries = []
    for label, (size, count) in live.items():
        operation, module = labels[label]
        if size > 0:
            entries.append(Entry(operation if label else "before the recording", module, size, count))
    return Timeline(before, curve[end], sorted(entries, key=lambda entry: -entry.bytes), curve)


@contextmanager
def modules(model: torch.nn.Module, name: str = "") -> Iterator[None]:
    """Announce the innermost running submodule of a model to the timeline, as "name.blocks.0.ffn"."""
    stack = [""]
    handles = []

    def enter(path: str):
        def hook(module, arguments):
            stack.append(path)
            extension().set_module(path)

        return hook

    def leave(module, arguments, output):
        stack.pop()
        extension().set_module(stack[-1])

    root = name or type(model).__name__
    for path, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(enter(f"{root}.{path}" if path else root)))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        extension().set_module("")
