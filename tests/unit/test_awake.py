"""The Mac is kept awake exactly as long as work runs, by one assertion; and the time left comes from measured steps."""

import os
import subprocess
import sys
import time

import pytest
from apple_silicon_video.memory import awake as module
from apple_silicon_video.memory.awake import awake
from apple_silicon_video.memory.step_times import StepTimes, duration


@pytest.fixture
def caffeinate(tmp_path, monkeypatch):
    """A program in caffeinate's place that writes its process id and arguments, and runs until it is ended."""
    program, log = tmp_path / "caffeinate", tmp_path / "log"
    program.write_text(f'#!/bin/sh\necho "$$ $@" >> {log}\nexec sleep 1000\n')
    program.chmod(0o755)
    monkeypatch.setattr(module, "COMMAND", (str(program), *module.COMMAND[1:]))
    monkeypatch.setattr(sys, "platform", "darwin")
    return log


def started(log, count):
    for _ in range(500):
        lines = log.read_text().splitlines() if log.exists() else []
        if len(lines) >= count:
            return lines
        time.sleep(0.01)
    raise AssertionError("caffeinate was not started")


def running(process):
    return subprocess.run(["ps", "-o", "pid=", "-p", process], capture_output=True).stdout.strip() != b""


def test_one_assertion_for_nested_work(caffeinate):
    with awake():
        with awake():
            (line,) = started(caffeinate, 1)
        process, *arguments = line.split()
        assert arguments == ["-i", "-w", str(os.getpid())] and running(process)
    assert not running(process)
    with awake():
        started(caffeinate, 2)


def test_assertion_ends_when_the_work_fails(caffeinate):
    with pytest.raises(ValueError), awake():
        (line,) = started(caffeinate, 1)
        raise ValueError
    assert not running(line.split()[0])


def test_missing_program_is_no_error(monkeypatch, caplog):
    monkeypatch.setattr(module, "COMMAND", ("/nowhere/caffeinate",))
    monkeypatch.setattr(sys, "platform", "darwin")
    caplog.set_level("INFO")
    with awake():
        pass
    assert "may fall asleep" in caplog.text


def test_nothing_is_started_elsewhere(caffeinate, monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    with awake():
        pass
    assert not caffeinate.exists()


def test_time_left():
    now = [100.0]
    times = StepTimes(25, lambda: now[0])
    assert times.step(0) == "step 0 of 25"
    now[0] += 200
    assert times.step(1) == "step 1 of 25, 3 min a step, 1 h 20 min left"
    for done in range(2, 20):
        now[0] += 40
        text = times.step(done)
        assert times.step(done) == text
    assert text == "step 19 of 25, 40 s a step, 4 min left"
    now[0] += 40
    assert times.step(25).endswith("0.0 s left")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (89, "89 s"), (90, "2 min"), (3600, "1 h 0 min")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text
