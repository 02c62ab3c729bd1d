"""Runs the tests that load eva-decord in a process of their own (see inside/test_video_read_decord.py)."""

import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent / "inside" / "test_video_read_decord.py"


def test_with_eva_decord():
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", str(TESTS)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    print(result.stdout[-8000:], result.stderr[-2000:])
    assert result.returncode == 0
