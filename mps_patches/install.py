"""Switching the process-wide cures on and off: probe, replace, verify, and undo.

A replaced function is a thin stand-in that calls whatever is current, so a cure can be taken out again even where
others hold the stand-in, and every cure of one function is applied in the order of the table. Modules that took a
function by name before (``from torch.nn.functional import interpolate``) are given the stand-in too. Nothing here does
anything without an MPS device.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import sys
import threading
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from . import first_use, probing
from .registry import DEFECTS, Defect, Function, Maker, ProbeResult, environment_name

log = logging.getLogger(__name__)

Choice = Literal["auto", "on", "off"]
# "watching": gates are in place that decide at the first call of trigger size. "precaution": such a call came, and no
# evidence could be had, so that the cure stays.
State = Literal[
    "not needed", "patched", "watching", "precaution", "off", "left to another pack", "not applicable", "probe failed",
    "not cured",
]  # fmt: skip
# Attribute of every stand-in: the module that made it, so that two copies of this pack tell each other's apart.
STAND_IN = "_mps_patches_stand_in"
ACTIVE: tuple[State, ...] = ("patched", "precaution")
TOLD: tuple[State, ...] = (*ACTIVE, "left to another pack")
WARNED: tuple[State, ...] = ("not cured", "probe failed")


@dataclass(frozen=True)
class Entry:
    """What became of one patch, and the probe it was decided by (None where the choice was the user's)."""

    id: str
    state: State
    detail: str = ""
    probe: ProbeResult | None = None


@dataclass(frozen=True)
class Report:
    """The state of every process-wide patch, and the functions replaced, by dotted name."""

    entries: dict[str, Entry] = field(default_factory=dict)
    replaced: tuple[str, ...] = ()

    @property
    def active(self) -> tuple[str, ...]:
        """The ids of the patches that are on."""
        return tuple(entry.id for entry in self.entries.values() if entry.state in ACTIVE)

    @property
    def watching(self) -> tuple[str, ...]:
        """The ids of the patches that the first call of trigger size decides over."""
        return tuple(entry.id for entry in self.entries.values() if entry.state == "watching")


@dataclass
class _Slot:
    """One replaced attribute: what it was, the stand-in, and the cures that the stand-in applies."""

    owner: Any
    attribute: str
    original: Function
    inherited: bool
    cures: dict[str, Function] = field(default_factory=dict)
    stand_in: Function = field(init=False)
    call: Function = field(init=False)
    rebound: list[tuple[Any, str]] = field(default_factory=list)
    rebinding_done: bool = False

    def __post_init__(self) -> None:
        self.call = self.original
        self.stand_in = _stand_in(self)

    def rebuild(self) -> None:
        call = self.original
        for name in DEFECTS:
            if name in self.cures:
                call = functools.update_wrapper(self.cures[name](call), self.original)
        self.call = call


def _stand_in(slot: _Slot) -> Function:
    def patched(*args: Any, **kwargs: Any) -> Any:
        return slot.call(*args, **kwargs)

    # With the original's global names and these marks, torch.jit.script compiles the original: it cannot compile *args.
    names = getattr(slot.original, "__globals__", patched.__globals__)
    stand_in = types.FunctionType(patched.__code__, names, patched.__name__, None, patched.__closure__)
    functools.update_wrapper(stand_in, slot.original)
    setattr(stand_in, "__script_if_tracing_wrapper", True)
    setattr(stand_in, "__original_fn", slot.original)
    setattr(stand_in, STAND_IN, __name__)
    return stand_in


_lock = threading.RLock()
_slots: dict[tuple[str, str], _Slot] = {}
_entries: dict[str, Entry] = {}
_undecided: dict[str, set[str]] = {}  # defect -> attributes whose gates still watch


def choice_for(defect: Defect, choices: Mapping[str, str] | None = None) -> Choice:
    """Whether one patch is "on", "off" or "auto": by the environment first, then ``choices``, then the table."""
    for source, value in (
        (environment_name(defect.id), os.environ.get(environment_name(defect.id))),
        (defect.id, (choices or {}).get(defect.id)),
    ):
        if value is None:
            continue
        if value.lower() in ("auto", "on", "off"):
            return value.lower()  # type: ignore[return-value]
        log.warning("%s is %r: it must be auto, on or off and is ignored.", source, value)
    return "auto" if defect.switch else "off"


def run_probe(defect: Defect, device: torch.device, quick: bool) -> ProbeResult:
    """Run a defect's probe as things are now, if its footprint fits the device, and release what it held.

    A probe that stops with an error has failed, and says so: nothing is known then.
    """
    if defect.probe is None:
        return probing.not_applicable("no probe")
    if reason := probing.lacks_memory(device, defect.footprint(quick)):
        return probing.not_applicable(reason)
    try:
        return defect.probe(device, quick)
    except torch.OutOfMemoryError as error:
        return probing.not_applicable(f"not enough memory ({probing.first_line(error)})")
    except Exception as error:
        log.warning("The probe for %s failed: %s", defect.id, error)
        detail = f"{type(error).__name__}: {probing.first_line(error)}"
        return ProbeResult(True, 0.0, 0.0, detail, applicable=False, failed=True)
    finally:
        if device.type == "mps" and torch.backends.mps.is_available():
            torch.mps.empty_cache()


def apply(device: torch.device | str | None = None, choices: Mapping[str, str] | None = None) -> Report:
    """Probe (quick) and install the process-wide cures that this device needs.

    device: the MPS device, found if None; for any other, and on a machine without one, nothing is probed or replaced.
    choices: id -> "auto" (install if the probe shows the defect), "on" or "off".
    Calling it again changes only what a changed choice asks for; probes are not repeated until ``remove``.
    """
    device = torch.device("mps" if device is None else device)
    if device.type != "mps" or not torch.backends.mps.is_available():
        return Report()
    with _lock:
        for defect in DEFECTS.values():
            if defect.cure is not None:
                _settle(defect, device, choice_for(defect, choices))
        _rebind()
        return status()


def _settle(defect: Defect, device: torch.device, choice: Choice) -> None:
    entry = _entries.get(defect.id)
    if choice == "auto" and entry is not None and entry.probe is not None:
        return
    if choice == "on" and entry is not None and entry.state == "patched" and not _undecided.get(defect.id):
        return
    _drop(defect.id)
    if choice == "auto":
        with suspended():
            probe = run_probe(defect, device, quick=True)
        entry = _install_if_needed(defect, device, probe)
    elif choice == "on":
        entry = _install(defect, "patched", "switched on", None)
    else:
        entry = Entry(defect.id, "off", "switched off")
    _entries[defect.id] = entry
    if entry.state in (*TOLD, *WARNED):
        level = logging.WARNING if entry.state in WARNED else logging.INFO
        log.log(level, "MPS patch %s (%s): %s, %s", defect.id, defect.title, entry.state, entry.detail)


def _install_if_needed(defect: Defect, device: torch.device, probe: ProbeResult) -> Entry:
    assert defect.cure is not None
    if probe.failed:
        return Entry(defect.id, "probe failed", probe.detail, probe)
    if not probe.applicable and defect.cure.first_use is not None:
        return _install(defect, "watching", f"checked on first use ({probe.detail})", probe)
    if not probe.applicable:
        return Entry(defect.id, "not applicable", probe.detail, probe)
    if probe.ok:
        return Entry(defect.id, "not needed", probe.detail, probe)
    entry = _install(defect, "patched", probe.detail, probe)
    if entry.state != "patched" or entry.detail != probe.detail:
        return entry
    after = run_probe(replace(defect, probe=defect.cure.verify or defect.probe), device, quick=True)
    if after.ok and after.applicable:
        return entry
    _drop(defect.id)
    return Entry(defect.id, "not cured", f"with the patch: {after.detail}; it stays off", probe)


def _install(defect: Defect, state: State, detail: str, probe: ProbeResult | None) -> Entry:
    """Replace the targets of one cure, except those that another pack has replaced already."""
    assert defect.cure is not None
    found = [(path, name, owner) for path, name in defect.cure.targets if (owner := _owner(path, name)) is not None]
    if not found:
        return Entry(defect.id, "not applicable", "none of the functions it replaces is there", probe)
    free = []
    for path, name, owner in found:
        if (path, name) not in _slots and (pack := _foreign(getattr(owner, name), path)):
            detail += f"; {pack} has replaced {path}.{name}, which is left to it"
        else:
            free.append((path, name, owner))
    if not free:
        return Entry(defect.id, "left to another pack", detail, probe)
    for path, name, owner in free:
        if (path, name) not in _slots:
            slot = _slots[path, name] = _Slot(owner, name, getattr(owner, name), name not in vars(owner))
            _tell_torch_script(slot, True)
            setattr(owner, name, slot.stand_in)
        _slots[path, name].cures[defect.id] = _gate(defect, name) if state == "watching" else defect.cure.maker(name)
        _slots[path, name].rebuild()
    if state == "watching":
        _undecided[defect.id] = {name for _, name, _ in free}
    return Entry(defect.id, state, detail, probe)


def _gate(defect: Defect, attribute: str) -> Maker:
    assert defect.cure is not None and defect.cure.first_use is not None
    settle = functools.partial(_settle_first_use, defect, attribute)
    return first_use.gate(defect.cure.first_use[attribute], defect.cure.maker(attribute), settle)


def _settle_first_use(defect: Defect, attribute: str, found: ProbeResult) -> None:
    """Replace the gates of one function by its cure, or take them out, as the evidence says."""
    with _lock:
        entry, undecided = _entries.get(defect.id), _undecided.get(defect.id, set())
        if entry is None or defect.cure is None or attribute not in undecided:
            return
        right = found.ok and found.applicable
        slots = {key: slot for key, slot in _slots.items() if defect.id in slot.cures}
        # One function may stand under several names.
        same = {id(slot.original) for key, slot in slots.items() if key[1] == attribute}
        for key, slot in slots.items():
            if key[1] in undecided and (key[1] == attribute or id(slot.original) in same):
                if right:
                    _take_out(key, slot, defect.id)
                else:
                    slot.cures[defect.id] = defect.cure.maker(key[1])
                    slot.rebuild()
        undecided -= {attribute, *(key[1] for key, slot in slots.items() if id(slot.original) in same)}
        detail = f"at its first use, {attribute}: {found.detail}"
        if not right:
            state: State = "patched" if found.applicable else "precaution"
            entry = Entry(defect.id, state, detail, found)
        elif entry.state == "watching":
            entry = Entry(defect.id, "watching" if undecided else "not needed", detail, found)
        _entries[defect.id] = entry
        log.info("MPS patch %s (%s): %s, %s", defect.id, defect.title, entry.state, detail)


def _drop(defect_id: str) -> None:
    """Take one cure, or its gates, out; a function without cures goes back to what it was."""
    _undecided.pop(defect_id, None)
    for key, slot in list(_slots.items()):
        if defect_id in slot.cures:
            _take_out(key, slot, defect_id)


def _take_out(key: tuple[str, str], slot: _Slot, defect_id: str) -> None:
    del slot.cures[defect_id]
    slot.rebuild()
    if not slot.cures:
        _restore(slot)
        del _slots[key]


def _restore(slot: _Slot) -> None:
    """Undo the replacement where the stand-in is still in place; elsewhere it stays and only calls the original."""
    _tell_torch_script(slot, False)
    if getattr(slot.owner, slot.attribute) is slot.stand_in:
        if slot.inherited:
            delattr(slot.owner, slot.attribute)
        else:
            setattr(slot.owner, slot.attribute, slot.original)
    for module, name in slot.rebound:
        if vars(module).get(name) is slot.stand_in:
            setattr(module, name, slot.original)
    slot.rebound.clear()


def _tell_torch_script(slot: _Slot, installed: bool) -> None:
    """Keep torch.jit's table of built-in functions, which is by identity, in step."""
    table = torch.jit._builtins._get_builtin_table()  # type: ignore[attr-defined]
    if not installed:
        table.pop(id(slot.stand_in), None)
    elif id(slot.original) in table:
        table[id(slot.stand_in)] = table[id(slot.original)]


def _rebind() -> None:
    """Give the stand-ins to modules that imported the originals by name; torch's own modules are left alone."""
    slots = {id(slot.original): slot for slot in _slots.values() if not slot.rebinding_done}
    for slot in _slots.values():
        slot.rebinding_done = True
    for module_name, module in list(sys.modules.items()) if slots else ():
        if module_name.split(".")[0] == "torch" or module_name.startswith(f"{__package__}."):
            continue
        for name, value in list(getattr(module, "__dict__", {}).items()):
            known = slots.get(id(value))
            if known is not None and value is known.original:
                setattr(module, name, known.stand_in)
                known.rebound.append((module, name))


def _owner(path: str, attribute: str) -> Any:
    """The module or class at a dotted path, or None if it or its attribute is not there."""
    try:
        owner: Any = importlib.import_module(path)
    except ImportError:
        parent, _, name = path.rpartition(".")
        try:
            owner = getattr(importlib.import_module(parent), name, None) if parent else None
        except ImportError:
            owner = None
    return owner if hasattr(owner, attribute) else None


def _foreign(function: Function, path: str) -> str | None:
    """The module that has put its own function in this place, or None; ``functools.wraps`` hides nothing."""
    home = getattr(function, STAND_IN, None) or getattr(function, "__globals__", {}).get("__name__")
    home = home or getattr(function, "__module__", None) or type(function).__module__
    return None if home.split(".")[0] in (path.split(".")[0], "builtins") else home


def remove() -> None:
    """Put every function back and forget what the probes said."""
    with _lock:
        for defect_id in list(_entries):
            _drop(defect_id)
        _entries.clear()
        first_use.forget()


def status() -> Report:
    """What is on now."""
    with _lock:
        entries = {name: _entries[name] for name in DEFECTS if name in _entries} if _entries else {}
        return Report(entries, tuple(f"{path}.{name}" for path, name in _slots))


@contextmanager
def suspended() -> Iterator[None]:
    """The original functions, for all threads, while a probe looks at the bare device."""
    with _lock:
        for slot in _slots.values():
            slot.call = slot.original
        try:
            yield
        finally:
            for slot in _slots.values():
                slot.rebuild()


def examine(defect: Defect, device: torch.device, quick: bool) -> tuple[str, ProbeResult, ProbeResult | None]:
    """One line of the Doctor: a verdict, the probe on the bare device, and the probe with the patches as they are.

    The verdict is "pass", "defect, cured", "defect, not cured", "checked on first use" (the probe does not apply, and
    gates watch), "probe failed" or "not applicable". The second probe is made only for process-wide cures of a defect
    that is there.
    """
    with suspended():
        bare = run_probe(defect, device, quick)
    if not bare.applicable:
        return *_without_evidence(defect, bare), None
    if bare.ok:
        return "pass", bare, None
    if defect.kind != "process" or defect.cure is None:
        return "defect, not cured", bare, None
    cured = run_probe(defect, device, quick)
    return ("defect, cured" if cured.ok and cured.applicable else "defect, not cured"), bare, cured


def _without_evidence(defect: Defect, bare: ProbeResult) -> tuple[str, ProbeResult]:
    """Verdict and evidence where the probe says nothing: what the first call of trigger size said, or will say."""
    if bare.failed:
        return "probe failed", bare
    entry = _entries.get(defect.id)
    if entry is None or entry.probe is None or defect.cure is None or defect.cure.first_use is None:
        return "not applicable", bare
    if entry.state in ("watching", "precaution"):
        return "checked on first use", replace(bare, detail=entry.detail)
    found = {"patched": "defect, cured", "not needed": "pass"}.get(entry.state, "not applicable")
    return found, replace(entry.probe, detail=entry.detail)
