"""Keeps the Mac awake while work runs, through macOS's own ``caffeinate``.

The assertion is PreventUserIdleSystemSleep (``-i``): the display may sleep, the machine does not. ``-w`` ties it to
this process, so that it ends with the process even after a crash.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)

COMMAND = ("/usr/bin/caffeinate", "-i", "-w")


class _Assertion:
    """One caffeinate for all work that runs at the same time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._process: subprocess.Popen[bytes] | None = None

    def acquire(self) -> None:
        with self._lock:
            self._users += 1
            if self._users > 1 or sys.platform != "darwin":
                return
            try:
                self._process = subprocess.Popen(
                    [*COMMAND, str(os.getpid())], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
                )
            except OSError as error:
                log.info("The Mac may fall asleep during the run: %s cannot be started (%s).", COMMAND[0], error)

    def release(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users or self._process is None:
                return
            self._process.terminate()
            self._process.wait()
            self._process = None


_assertion = _Assertion()


@contextmanager
def awake() -> Iterator[None]:
    """Prevent idle sleep inside the block, also when it fails; nested and parallel blocks share one assertion."""
    _assertion.acquire()
    try:
        yield
    finally:
        _assertion.release()
