"""The ComfyUI trees that tests run: the pinned versions, fetched once into the cache folder."""

import importlib.util
import sys
from functools import cache
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def _fetch_module():
    if "fetch_comfyui" not in sys.modules:
        spec = importlib.util.spec_from_file_location("fetch_comfyui", SCRIPTS / "fetch_comfyui.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["fetch_comfyui"] = module
        spec.loader.exec_module(module)
    return sys.modules["fetch_comfyui"]


VERSIONS = sorted(_fetch_module().DISTRIBUTIONS)


@cache
def tree(version):
    """Folder of the ComfyUI source tree of ``version``."""
    return _fetch_module().fetch(version)
