"""The import hook that declares torchvision's operators does so once, late, and only for torchvision."""

import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def run(code):
    prelude = f"import sys; sys.path.insert(0, {str(SCRIPTS)!r})\nimport torchvision_on_cpu_torch as shim\n"
    result = subprocess.run([sys.executable, "-I", "-S", "-c", prelude + code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_nothing_happens_before_torchvision_is_asked_for():
    assert run(
        "import json, email.message\nprint('torch' in sys.modules, sys.meta_path[0] is shim.DeclareOperators)"
    ) == ("False True\n")


def test_operators_are_declared_with_the_schemas_of_the_library():
    import site

    folders = [*site.getsitepackages(), *sys.path]
    code = f"""
sys.path.extend({folders!r})
import importlib.util
importlib.util.find_spec("torchvision")
import torch
print(torch.ops.torchvision.roi_pool.default._schema)
print(len(shim.OPERATORS), all(hasattr(torch.ops.torchvision, s.split("(")[0]) for s in shim.OPERATORS))
print(shim.DeclareOperators in sys.meta_path)
"""
    schema, count, hooked = run(code).splitlines()
    assert schema == (
        "torchvision::roi_pool(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, "
        "SymInt pooled_width) -> (Tensor, Tensor)"
    )
    assert (count, hooked) == ("13 True", "False")
