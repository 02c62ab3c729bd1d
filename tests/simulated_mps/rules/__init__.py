"""Numerical and other defects of real MPS backends, switchable one by one; all are off at first.

A rule sits in the device's kernels, so unmodified code meets it. Its effect is deterministic. In dry mode nothing is
spoilt: every rule that the op table's torch version has is watched, and reported by violations().
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..device import SimulationError, extension, installed
from . import attention, elements, layers, matmul
from .model import Call, Rule, Thresholds

RULES: dict[str, Rule] = {rule.name: rule for rule in (*layers.RULES, *attention.RULES, *matmul.RULES, *elements.RULES)}

_enabled: dict[str, dict[str, float]] = {}
_found: dict[tuple[str, str, int], int] = {}


class Violation(NamedTuple):
    """A call that a rule would have spoilt: the size that triggered it, and how often it came."""

    rule: str
    operation: str
    size: int
    calls: int


def enable(name: str, **thresholds: float) -> None:
    """Switch a rule on, with its default thresholds or other ones; again to change them."""
    rule_ = _known(name)
    unknown = thresholds.keys() - rule_.thresholds.keys()
    if unknown:
        choices = ", ".join(rule_.thresholds) or "none"
        raise SimulationError(f"Rule {name} has no threshold {', '.join(sorted(unknown))}: it has {choices}.")
    _enabled[name] = {**rule_.thresholds, **thresholds}
    if rule_.switch:
        rule_.switch(_enabled[name])
    refresh()


def disable(name: str) -> None:
    """Switch a rule off; nothing happens if it is off."""
    rule_ = _known(name)
    if _enabled.pop(name, None) is not None and rule_.switch:
        rule_.switch(None)
    refresh()


def disable_all() -> None:
    """Switch every rule off."""
    for name in list(_enabled):
        disable(name)


@contextmanager
def rule(name: str, **thresholds: float) -> Iterator[Rule]:
    """Have a rule on for a while, and as it was before afterwards."""
    before = _enabled.get(name)
    enable(name, **thresholds)
    try:
        yield RULES[name]
    finally:
        disable(name)
        if before is not None:
            enable(name, **before)


def enabled() -> Mapping[str, Mapping[str, float]]:
    """The rules that are on, with their thresholds."""
    return {name: dict(thresholds) for name, thresholds in _enabled.items()}


def enable_text(text: str) -> None:
    """Switch on the rules of a text like "pad-rank-5,scores-2-31:elements=1000000"."""
    for entry in filter(None, map(str.strip, text.split(","))):
        name, *settings = entry.split(":")
        pairs = [setting.partition("=") for setting in settings if setting]
        enable(name, **{key: float(value) if "." in value else int(value) for key, _, value in pairs})


def violations() -> list[Violation]:
    """What dry mode and the report-only rules have found since the last reset()."""
    return [Violation(*key, calls) for key, calls in _found.items()]


def forget_violations() -> None:
    """Empty the list of violations()."""
    _found.clear()


def refresh() -> None:
    """Tell the device which operations the rules want to see now."""
    wanted = {name for rule_ in _watched().values() for name in rule_.operations}
    extension().intercept(wanted)
    extension().set_handler(_Intercepted.begin if wanted else None)


def _known(name: str) -> Rule:
    if name not in RULES:
        raise SimulationError(f"There is no rule {name}: choose one of {', '.join(RULES)}.")
    return RULES[name]


def _watched() -> dict[str, Rule]:
    if not _dry():
        return {name: RULES[name] for name in _enabled}
    table = tuple(map(int, installed()["torch"].split(".")[:2]))
    return {name: r for name, r in RULES.items() if r.versions[0] <= table < r.versions[1] or name in _enabled}


def _dry() -> bool:
    return extension().dry()


@dataclass
class _Intercepted:
    """One call on its way through the device, with what the rules that apply have kept for after it."""

    call: Call
    waiting: list[tuple[Rule, Thresholds, Any]]

    @classmethod
    def begin(cls, operation: str, arguments: dict[str, Any]) -> "_Intercepted":
        call = Call(operation, arguments)
        waiting: list[tuple[Rule, Thresholds, Any]] = []
        spoil = not _dry()
        for rule_ in _watched().values():
            if operation not in rule_.operations or rule_.trigger is None:
                continue
            thresholds = _enabled.get(rule_.name, rule_.thresholds)
            kept = None
            if spoil and rule_.before:
                if rule_.trigger(call, thresholds) is None:
                    continue
                with torch.no_grad():
                    kept = rule_.before(call, thresholds)
            waiting.append((rule_, thresholds, kept))
        return cls(call, waiting)

    def finish(self, results: list[torch.Tensor]) -> None:
        self.call.results = results
        for rule_, thresholds, kept in self.waiting:
            if rule_.before and not _dry():
                spoil = rule_.after
            else:
                assert rule_.trigger is not None
                size = rule_.trigger(self.call, thresholds)
                if size is None:
                    continue
                spoil = None if _dry() else rule_.after
                if spoil is None:
                    key = (rule_.name, self.call.operation, size)
                    _found[key] = _found.get(key, 0) + 1
            if spoil:
                with torch.no_grad():
                    spoil(self.call, thresholds, kept)
