"""ruff and mypy find nothing: part of the tests, so that scripts/test.sh and CI report them like any failure."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TYPED = ("__init__.py", "prestartup_script.py", "nodes", "quantization", "memory", "video", "mps_patches")
COMMANDS = ("scripts", "benchmarks")  # whose files import each other by their own names


def run(command, **options):
    result = subprocess.run(command, capture_output=True, text=True, **options)
    if result.returncode:
        pytest.fail(f"{result.stdout}\n{result.stderr}", pytrace=False)


def test_ruff():
    run([sys.executable, "-m", "ruff", "check", "--no-fix", "--output-format", "concise", "."], cwd=ROOT)


@pytest.mark.slow
def test_mypy():
    """The repository's folder may have any name, so mypy sees it through a link that has the package's name."""
    parent = ROOT / ".cache" / "mypy"
    package = parent / "apple_silicon_video"
    parent.mkdir(parents=True, exist_ok=True)
    package.unlink(missing_ok=True)
    package.symlink_to(ROOT, target_is_directory=True)
    files = [path for name in (*TYPED, *COMMANDS) for path in sources(package / name)]
    search_path = os.pathsep.join(map(str, (*(package / name for name in COMMANDS), parent)))
    command = [sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml", "--cache-dir", parent / "cache"]
    run([*command, *files], cwd=parent, env=os.environ | {"MYPYPATH": search_path})


def sources(path):
    return sorted(path.rglob("*.py")) if path.is_dir() else [path] * path.exists()
