"""Commands of scripts/ as a process, and inside the test's own, which saves the seconds of starting another one.

Both run the SCRIPT of the test's module.
"""

import importlib.util
import logging
import signal
import subprocess
import sys

import pytest
import torch


@pytest.fixture
def run(request):
    """A function that runs the script with arguments as people do."""

    def run_process(*arguments):
        command = [sys.executable, str(request.module.SCRIPT), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)

    return run_process


@pytest.fixture
def inside(request, capsys, caplog, monkeypatch):
    """A function that runs the script's ``main`` with arguments: (status, stdout, stderr with the log's warnings)."""
    script = request.module.SCRIPT
    spec = importlib.util.spec_from_file_location(f"{script.stem}_command", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)

    def run_inside(*arguments):
        try:
            status = module.main([*map(str, arguments)])
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        caplog.clear()
        return status, out, "".join(f"{line}\n" for line in lines) + err

    return run_inside
