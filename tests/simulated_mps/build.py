"""Builds the simulated device's C++ side once per torch version, Python version and source hash, and loads it.

The library lies in the repository's ignored .cache/simulated_mps/. A file lock keeps parallel test processes from
building the same thing twice; a finished library is loaded without a compiler, ninja or torch's build helper.
"""

import fcntl
import hashlib
import importlib.util
import os
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch

SOURCES = Path(__file__).resolve().parent / "csrc"
CACHE = Path(__file__).resolve().parents[2] / ".cache" / "simulated_mps"
NAME = "simulated_mps_extension"
FLAGS = ["-O1", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-unknown-pragmas", "-Wno-attributes"]


class BuildError(RuntimeError):
    """The device's C++ side could not be built; the message is one sentence."""


def build_folder() -> Path:
    """Where the library of this torch, this Python and these sources lies or will lie."""
    digest = hashlib.sha256(f"{sys.version_info[:2]} {FLAGS}".encode())
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return CACHE / f"{torch.__version__}-{digest.hexdigest()[:12]}"


def load() -> ModuleType:
    """Return the extension module, compiling it if nobody has yet (about a minute). Raises BuildError."""
    folder = build_folder()
    library = folder / f"{NAME}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / "building"):
            if not library.exists():
                _compile(folder, library)
    spec = importlib.util.spec_from_file_location(NAME, library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def _locked(path: Path):
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(folder: Path, library: Path) -> None:
    """Compile into a scratch folder, then put the library at its place in one step."""
    if not shutil.which(os.environ.get("CXX", "g++")):
        raise BuildError("The simulated MPS device needs a C++ compiler: install g++ (Debian: apt-get install g++).")
    from torch.utils import cpp_extension

    scratch = folder / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    sources = [str(path) for path in sorted(SOURCES.glob("*.cpp"))]
    path = os.environ["PATH"]
    os.environ["PATH"] = os.pathsep.join([*_ninja_folder(), path])
    try:
        cpp_extension.load(
            NAME, sources, build_directory=str(scratch), extra_cflags=FLAGS, is_python_module=False, is_standalone=False
        )
    except (RuntimeError, OSError) as error:
        raise BuildError(f"The simulated MPS device's C++ side in {SOURCES} does not build: {error}") from error
    finally:
        os.environ["PATH"] = path
    os.replace(scratch / library.name, library)
    shutil.rmtree(scratch, ignore_errors=True)


def _ninja_folder() -> list[str]:
    """Folder of the ninja that PyPI's package brings, which is not on PATH unless the environment is activated."""
    found = Path(sys.executable).with_name("ninja")
    return [str(found.parent)] if found.exists() else []
