"""A module named ``decord`` for packs that import it where no eva-decord wheel exists: its readers, on PyAV.

Offers what those packs use (VideoReader, AudioReader, cpu, gpu, bridge, logging) with the same arguments and
shapes. A finder placed last on ``sys.meta_path`` gives it, so that an installed decord always comes first, and nothing
is imported before somebody asks. Pixels are the pack's own: chroma is interpolated, rotation and colour tags are
obeyed, where decord repeats chroma.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any

NAME = "decord"
VERSION = "0.6.0"


class DecordFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds ``decord`` and ``decord.bridge`` when nothing before it on sys.meta_path does."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name == NAME:
            return importlib.machinery.ModuleSpec(name, self, origin=__name__, is_package=True)
        parent = sys.modules.get(NAME)
        if name in SUBMODULES and getattr(parent, "REPLACEMENT", False):
            return importlib.machinery.ModuleSpec(name, self, origin=__name__)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        return None

    def exec_module(self, module: types.ModuleType) -> None:
        vars(module).update(SUBMODULES.get(module.__name__, _package)())


def register() -> bool:
    """Offer the module unless something else provides it; whether it is offered."""
    present = sys.modules.get(NAME)
    if present is not None:
        return bool(getattr(present, "REPLACEMENT", False))
    if any(isinstance(finder, DecordFinder) for finder in sys.meta_path):
        return True
    try:
        provided = importlib.util.find_spec(NAME) is not None
    except (ImportError, ValueError):
        provided = False
    if not provided:
        sys.meta_path.append(DecordFinder())
    return not provided


def _package() -> dict[str, Any]:
    """What ``import decord`` gives."""
    from . import decord_readers as readers

    return {
        "REPLACEMENT": True,
        "__version__": VERSION,
        "__path__": [],
        "VideoReader": readers.VideoReader,
        "AudioReader": readers.AudioReader,
        "DECORDError": readers.DECORDError,
        "cpu": readers.cpu,
        "gpu": readers.gpu,
        "bridge": _submodule("decord.bridge"),
        "logging": _submodule("decord.logging"),
    }


def _bridge() -> dict[str, Any]:
    from . import decord_readers as readers

    return {"set_bridge": readers.set_bridge, "reset_bridge": readers.reset_bridge, "use_torch": readers.use_torch}


def _logging() -> dict[str, Any]:
    return {"set_level": lambda level=16: None, **LOG_LEVELS}


# FFmpeg's levels, as decord names them.
LOG_LEVELS = {
    "QUIET": -8, "PANIC": 0, "FATAL": 8, "ERROR": 16, "WARNING": 24, "INFO": 32, "VERBOSE": 40, "DEBUG": 48,
}  # fmt: skip
SUBMODULES: dict[str, Callable[[], dict[str, Any]]] = {"decord.bridge": _bridge, "decord.logging": _logging}


def _submodule(name: str) -> types.ModuleType:
    module = types.ModuleType(name)
    vars(module).update(SUBMODULES[name]())
    return sys.modules.setdefault(name, module)
