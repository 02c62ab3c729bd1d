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
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from .registry import DEFECTS, Defect, Function, ProbeResult

log = logging.getLogger(__name__)

Choice = Literal["auto", "on", "off"]
State = Literal["not needed", "patched", "preventive", "off", "left to another pack", "not applicable", "not cured"]
# Attribute of every stand-in: the module that made it, so that two copies of this pack tell each other's apart.
STAND_IN = "_mps_patches_stand_in"
ACTIVE: tuple[State, ...] = ("patched", "preventive")


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


def environment_name(defect_id: str) -> str:
    """The environment variable that switches one patch: ``ASV_PATCH_PAD_RANK_5`` for "pad-rank-5"."""
    return "ASV_PATCH_" + defect_id.upper().replace("-", "_")


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
    """Run a defect's probe as things are now; a probe that cannot run counts as not applicable."""
    if defect.probe is None:
        return ProbeResult(True, 0.0, 0.0, "no probe", applicable=False)
    try:
        return defect.probe(device, quick)
    except Exception as error:
        log.warning("The probe for %s could not run: %s", defect.id, error)
        return ProbeResult(True, 0.0, 0.0, f"the probe could not run: {error}", applicable=False)
    finally:
        if not quick and device.type == "mps":
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
            if defect.kind == "process" and defect.cure is not None:
                _settle(defect, device, choice_for(defect, choices))
        _rebind()
        return status()


def _settle(defect: Defect, device: torch.device, choice: Choice) -> None:
    entry = _entries.get(defect.id)
    if choice == "auto" and entry is not None and entry.probe is not None:
        return
    if choice == "on" and entry is not None and entry.state == "patched":
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
    if entry.state in (*ACTIVE, "left to another pack"):
        log.info("MPS patch %s (%s): %s, %s", defect.id, defect.title, entry.state, entry.detail)
    elif entry.state == "not cured":
        log.warning("MPS patch %s (%s): %s, %s", defect.id, defect.title, entry.state, entry.detail)


def _install_if_needed(defect: Defect, device: torch.device, probe: ProbeResult) -> Entry:
    assert defect.cure is not None
    if not probe.applicable and defect.cure.preventive:
        return _install(defect, "preventive", probe.detail, probe)
    if not probe.applicable:
        return Entry(defect.id, "not applicable", probe.detail, probe)
    if probe.ok:
        return Entry(defect.id, "not needed", probe.detail, probe)
    entry = _install(defect, "patched", probe.detail, probe)
    if entry.state != "patched" or entry.detail != probe.detail:
        return entry
    after = run_probe(defect, device, quick=True)
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
        _slots[path, name].cures[defect.id] = defect.cure.maker(name)
        _slots[path, name].rebuild()
    return Entry(defect.id, state, detail, probe)


def _drop(defect_id: str) -> None:
    """Take one cure out; a function without cures goes back to what it was."""
    for key, slot in list(_slots.items()):
        if slot.cures.pop(defect_id, None) is None:
            continue
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
    for slot in slots.values():
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

    The verdict is "pass", "defect, cured", "defect, not cured" or "not applicable". The second probe is made only for
    process-wide cures of a defect that is there.
    """
    with suspended():
        bare = run_probe(defect, device, quick)
    if not bare.applicable:
        return "not applicable", bare, None
    if bare.ok:
        return "pass", bare, None
    if defect.kind != "process" or defect.cure is None:
        return "defect, not cured", bare, None
    cured = run_probe(defect, device, quick)
    return ("defect, cured" if cured.ok and cured.applicable else "defect, not cured"), bare, cured
