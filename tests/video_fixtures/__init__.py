"""Generated video files with known frames: every codec, container and defect that the video tests read.

``FIXTURES[name]`` says what a file holds, ``make(name, folder)`` makes it, ``video_files`` is the pytest fixture that
keeps them for a session, ``read_number`` and ``read_time`` tell which frame a picture is and from which moment a
sound. Frames are drawn by numbered_picture.py, sound by sound.py, both encoded by PyAV.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from .numbered_picture import UnreadableNumber, read_number
from .sound import Sound, read_time
from .table import FIXTURES, Fixture

__all__ = ["FIXTURES", "Fixture", "Sound", "UnreadableNumber", "make", "read_number", "read_time", "video_files"]


def make(name: str, folder: Path) -> Path:
    """The file of FIXTURES[name] in a folder, made unless it is there already; several processes may ask at once."""
    fixture, path = FIXTURES[name], folder / name
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch, name)
        fixture.maker(made)
        if made.is_dir():
            path.mkdir(exist_ok=True)
        elif made.exists():
            os.replace(made, path)
    return path


@pytest.fixture(scope="session")
def video_files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the path of a fixture by name, made once in a session, for all of its workers."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    return lambda name: make(name, shared / "video_fixtures")
