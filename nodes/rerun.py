"""When ComfyUI runs a node again although its inputs are the same: always, or when a file has changed.

ComfyUI asks before anything has run: an input whose value comes from another node is None then.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from comfy_api.latest import io


class RunsAlways(io.ComfyNode):
    """A node whose stored result is never used: what it tells changes from run to run."""

    @classmethod
    def fingerprint_inputs(cls, **kwargs: Any) -> float:
        return always()


def always() -> float:
    """A fingerprint that equals no other."""
    return float("nan")  # a new one each time: core's cache compares identity first, and math.nan is one object


def file_fingerprint(path: Path) -> str:
    """Changes when the file does; without its name, since ComfyUI stores the value in what it saves."""
    try:
        stat = path.stat()
    except OSError:
        return "missing"
    return f"{stat.st_size} {stat.st_mtime_ns}"
