"""Loads the repository root as the package ``apple_silicon_video``.

ComfyUI imports the pack under the name of whatever folder it was cloned into. Scripts and tests have no ComfyUI
to do that, so they register the same root under one fixed name; relative imports inside the pack then work alike.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

PACKAGE = "apple_silicon_video"
ROOT = Path(__file__).resolve().parents[1]


def load_pack() -> ModuleType:
    """Return the pack's root module, importing it on the first call."""
    if PACKAGE in sys.modules:
        return sys.modules[PACKAGE]
    spec = importlib.util.spec_from_file_location(PACKAGE, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = module
    spec.loader.exec_module(module)
    return module
