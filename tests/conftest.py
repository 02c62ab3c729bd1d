"""Makes the pack importable as ``apple_silicon_video``, and what lies in scripts/ by its own name, in every test.

scripts/ goes to the end of the path: at its front, ``import gguf`` would find scripts/gguf.py instead of the PyPI
package that tests compare with.
"""

import signal
import sys
import threading
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "scripts"))

from _pack import load_pack

load_pack()

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    # A shell starts what it puts into the background so, and the commands that tests interrupt would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file's tests stay on one worker, which keeps its servers; those of test_inside.py share nothing and spread."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid):
            return nodeid if "/test_inside.py::" in nodeid else super()._split_scope(nodeid)

    return Scheduling(config, log) if config.getvalue("dist") == "loadfile" else None
