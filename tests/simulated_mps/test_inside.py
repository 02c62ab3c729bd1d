"""Runs the tests of inside/ per op table, each in a process of its own, since a process cannot leave the simulation."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

INSIDE = Path(__file__).parent / "inside"
FILES = sorted(path.name for path in INSIDE.glob("test_*.py"))
TABLES = ("2.8", "2.10", "2.13", "2.15")
OLDEST = [("2.6", "test_device.py"), ("2.6", "test_errors.py")]


@pytest.mark.slow
@pytest.mark.parametrize("table, name", [(table, name) for table in TABLES for name in FILES] + OLDEST)
def test_inside(table, name):
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("SIMULATED_", "PYTORCH_"))}
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", f"--confcutdir={INSIDE}"]
    result = subprocess.run(
        [*command, str(INSIDE / name)],
        env=environment | {"SIMULATED_TORCH": table},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    print(result.stdout[-8000:], result.stderr[-4000:])
    assert result.returncode == 0, f"{name} fails with the op table of torch {table}"
