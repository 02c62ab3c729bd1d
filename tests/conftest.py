"""Makes the pack importable as ``apple_silicon_video``, and what lies in scripts/ by its own name, in every test.

scripts/ goes to the end of the path: at its front, ``import gguf`` would find scripts/gguf.py instead of the PyPI
package that tests compare with.
"""

import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
sys.path.append(str(TESTS.parent / "scripts"))

from _pack import load_pack  # noqa: E402

load_pack()

# Parameters of the fixtures that start a server: its tests stay together, those of other servers may go elsewhere.
SERVER_FIXTURES = ("comfy", "guarded", "on_mps")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items):
    """Tell the workers of a parallel run what belongs together: a file, a server; children of inside/ are single."""
    for item in items:
        if item.path.name == "test_inside.py":
            continue
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        server = [str(parameters[name]) for name in SERVER_FIXTURES if name in parameters]
        item.add_marker(pytest.mark.xdist_group("-".join([str(item.path.relative_to(TESTS)), *server])))
