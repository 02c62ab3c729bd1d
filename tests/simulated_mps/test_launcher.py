"""The launcher that puts a script on the simulated device, and the build that it rests on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
SCRIPT = """
import json, platform, sys
import psutil, torch, simulated_mps
from beside import HERE
torch.ones(3, device="mps").sum().item()
held = torch.empty(1 << 30, dtype=torch.uint8, device="mps")
memory = psutil.virtual_memory()
print(json.dumps({"argv": sys.argv, "name": __name__, "beside": HERE, "rules": dict(simulated_mps.enabled()),
    "table": simulated_mps.installed()["torch"], "macos": platform.mac_ver()[0], "ram": memory.total,
    "available": memory.available, "working_set": torch.mps.recommended_max_memory()}))
"""


def run(command, **environment):
    result = subprocess.run(
        [sys.executable, *map(str, command)], env=os.environ | environment, capture_output=True, text=True, timeout=600
    )
    return result.returncode, result.stdout, result.stderr


@pytest.mark.slow
def test_script_runs_on_the_device(tmp_path):
    (tmp_path / "main.py").write_text(SCRIPT)
    (tmp_path / "beside.py").write_text("HERE = 'found'")
    stats = tmp_path / "stats.json"
    status, output, errors = run(
        [HERE / "launch_comfyui.py", tmp_path / "main.py", "--port", "1"],
        SIMULATED_TORCH="2.10",
        SIMULATED_MACOS="15.4",
        SIMULATED_RULES="pad-rank-5,scores-2-31:elements=1000",
        SIMULATED_RAM_GB="16",
        SIMULATED_STATS=str(stats),
    )
    assert status == 0, errors
    assert json.loads(output) == {
        "argv": [str(tmp_path / "main.py"), "--port", "1"],
        "name": "__main__",
        "beside": "found",
        "rules": {"pad-rank-5": {"inner": 65536}, "scores-2-31": {"elements": 1000}},
        "table": "2.10.0",
        "macos": "15.4",
        "ram": 16 << 30,
        "available": 15 << 30,
        "working_set": int(16 * (1 << 30) * 2 / 3),
    }
    assert json.loads(stats.read_text())["ops"]["sum"][0] == 1


WATERMARKS = """
import os, torch
import simulated_mps as sim
sim.install()
sim.limits(recommended_bytes=1 << 20)
first = torch.ones(1 << 17, device="mps")
torch.ones(1 << 18, device="mps")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "high, low, words",
    [
        ("1.0", "0.9", "MPS backend out of memory"),
        ("0.0", "0.0", ""),
        ("0.5", "0.6", "invalid low watermark ratio 0.6"),
        ("1.2", None, "invalid low watermark ratio 1.4"),
        ("2.5", "1.0", "invalid high watermark ratio 2.5"),
    ],
)
def test_watermarks_of_the_environment(high, low, words):
    """As in MPSAllocator: read at the first allocation, and a low ratio above the high one is refused."""
    names = {"PYTORCH_MPS_HIGH_WATERMARK_RATIO": high, "PYTORCH_MPS_LOW_WATERMARK_RATIO": low}
    code = f"import sys; sys.path.append({str(HERE.parent)!r})\n{WATERMARKS}"
    status, _, errors = run(["-c", code], **{name: value for name, value in names.items() if value})
    assert (status != 0) == bool(words)
    assert words in errors


def test_no_compiler_is_one_clear_sentence(tmp_path):
    code = f"""
import sys; sys.path.append({str(HERE.parent)!r})
from pathlib import Path
import simulated_mps.build as build
build.CACHE = Path({str(tmp_path)!r})
build.load()
"""
    status, _, errors = run(["-c", code], PATH=str(tmp_path), CXX="g++")
    assert status == 1
    assert errors.splitlines()[-1].endswith("needs a C++ compiler: install g++ (Debian: apt-get install g++).")


def test_an_interrupted_build_leaves_nothing_behind(tmp_path):
    """Two processes at once: one builds, the other waits and finds the library; a stale scratch folder is no matter."""
    code = f"""
import sys; sys.path.append({str(HERE.parent)!r})
from pathlib import Path
import simulated_mps.build as build
build.CACHE = Path({str(tmp_path)!r})

def compile_slowly(folder, library):
    import time
    assert not list(folder.glob("compiled*"))
    (folder / f"compiled").touch()
    time.sleep(1)
    library.write_bytes(b"no library")

build._compile = compile_slowly
try:
    build.load()
except ImportError:
    print("loaded")
"""
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [out for out, _ in outputs] == ["loaded\n", "loaded\n"], outputs
