"""Makes the virtual environment ``.venv`` in the repository and keeps it up to date.

It holds torch, what ComfyUI needs to start, the pack's requirements and, if asked, the tests'. A stamp in it
remembers what was asked for, so that a second run only compares hashes. Standard library only, since it runs
before anything is installed.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import fetch_comfyui
from fetch_comfyui import ROOT, FetchError, last_error

VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "apple-silicon-video.json"
CACHE = ROOT / ".cache"
LOG = CACHE / "logs" / "environment.log"
SHIM = ROOT / "scripts" / "torchvision_on_cpu_torch.py"

Version = tuple[int, int]

PYTHONS: tuple[Version, ...] = ((3, 13), (3, 12), (3, 11), (3, 10))
"""Versions the pack is made for; a newer one is used only where none of these exists."""

MINIMUM_TORCH: Version = (2, 6)


class SetupError(RuntimeError):
    """The environment could not be made; the message is one sentence for the user."""


class Attempt(NamedTuple):
    """One pip install to try: what to install, and options of its own."""

    requirements: tuple[str, ...]
    options: tuple[str, ...] = ()


IMPATIENT = ("--retries", "1", "--timeout", "15")
CPU_INDEX = ("--index-url", "https://download.pytorch.org/whl/cpu", *IMPATIENT)
TORCH: dict[str, tuple[Attempt, ...]] = {
    "Darwin": (
        Attempt(("torch>=2.13", "torchvision", "torchaudio")),
        Attempt((f"torch>={MINIMUM_TORCH[0]}.{MINIMUM_TORCH[1]}", "torchvision", "torchaudio")),
    ),
    "Linux": (
        Attempt(("torch==2.13.0+cpu",), IMPATIENT),
        Attempt(("torch==2.13.0", "torchvision", "torchaudio"), CPU_INDEX),
        Attempt(("torch==2.13.0",)),
    ),
}
"""Where torch comes from, by system: the first that works. For Linux, PyPI itself has only CUDA's build."""

SKIPPED = {
    "torch": "installed before, see TORCH",
    "torchvision": "installed before, see companions",
    "torchaudio": "installed before, see companions",
    "comfyui-workflow-templates": "over 1 GB of example pictures and videos",
    "comfyui-embedded-docs": "help pages of core nodes",
    "pyopengl": "shader nodes, which ComfyUI leaves out without it",
    "glfw": "as pyopengl",
    "comfy-angle": "as pyopengl",
}
"""ComfyUI's requirements that it starts without, and why they are left out here."""


class Program(NamedTuple):
    """A program of the system that the tests run: what it goes by, and what has it on Debian and in Homebrew."""

    names: tuple[str, ...]
    debian: str
    homebrew: str


PROGRAMS = (
    Program(("ffmpeg",), "ffmpeg", "ffmpeg"),
    Program(("ffprobe",), "ffmpeg", "ffmpeg"),
    Program(
        (
            "chromium",
            "chromium-browser",
            "google-chrome",
            "google-chrome-stable",
            "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
            "/Applications/Chromium.app/Contents/MacOS/Chromium",
        ),
        "chromium",
        "--cask chromium",
    ),
)


def say(message: str) -> None:
    """Tell the user what is going on; standard output is kept for the result."""
    print(message, file=sys.stderr, flush=True)


def run(command: Sequence[str | Path]) -> subprocess.CompletedProcess[str]:
    """Run a command to its end without input, keeping its output."""
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")


def output_of(command: Sequence[str | Path]) -> str | None:
    """Return a command's standard output, or None if it cannot run or fails."""
    try:
        result = run(command)
    except OSError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def version_of(text: str) -> Version:
    """Return the leading major and minor number of a version: "2.13.0+cpu" gives (2, 13)."""
    match = re.match(r"(\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def probe_python(python: str, modules: str = "venv, ensurepip") -> Version | None:
    """Return an interpreter's version if it runs and has these modules, by default those that make environments."""
    output = output_of([python, "-c", f"import sys, {modules}; print('%d.%d' % sys.version_info[:2])"])
    return version_of(output) if output else None


def candidate_pythons() -> list[str]:
    """Return the running interpreter, then the names that supported versions go by."""
    return [sys.executable, *(f"python{major}.{minor}" for major, minor in PYTHONS), "python3"]


def select_python(candidates: Iterable[str], probe: Callable[[str], Version | None] = probe_python) -> str:
    """Return the first candidate of a supported version, else the first newer one, else raise SetupError."""
    newer = None
    for candidate in candidates:
        version = probe(candidate)
        if version in PYTHONS:
            return candidate
        if version and version > max(PYTHONS):
            newer = newer or candidate
    if newer is None:
        raise SetupError(
            "No Python 3.10 or later with the venv and ensurepip modules was found: install Python 3.12 "
            "(on Debian and Ubuntu with python3-venv), or name one in the variable PYTHON."
        )
    return newer


def installed_torch(python: str | Path) -> str | None:
    """Return the version of the torch that an interpreter imports, None without one or below the minimum."""
    output = output_of([python, "-c", "import torch; print(torch.__version__)"])
    return output if output and version_of(output) >= MINIMUM_TORCH else None


def torch_attempts(system: str) -> tuple[Attempt, ...]:
    """Return the installs of torch to try on an operating system (platform.system()'s name for it)."""
    if system not in TORCH:
        raise SetupError(f"This runs on {' and '.join(TORCH)} only, and not on {system}.")
    return TORCH[system]


def companions(torch: str) -> dict[str, str]:
    """Return the torchvision and torchaudio requirement that belong to a torch version.

    torchvision's minor number runs 15 ahead of torch's; torchaudio's is torch's up to its last release, 2.11.
    """
    minor = version_of(torch)[1]
    return {
        "torchvision": f"torchvision==0.{minor + 15}.*",
        "torchaudio": f"torchaudio==2.{min(minor, 11)}.*",
    }


def requirement_name(line: str) -> str:
    """Return the normalised package name of a requirements line, "" for a blank one or a comment."""
    match = re.match(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)", line)
    return re.sub(r"[-_.]+", "-", match[1]).lower() if match else ""


def needed_requirements(text: str) -> list[str]:
    """Return the lines of ComfyUI's requirements.txt that name a package which it needs to start."""
    return [line.strip() for line in text.splitlines() if requirement_name(line) not in {"", *SKIPPED}]


def digest(*inputs: object) -> str:
    """Return a short hash of texts and of other values' representation."""
    return hashlib.sha256("\0".join(map(str, inputs)).encode()).hexdigest()[:16]


def read_stamp() -> dict[str, str]:
    """Return the digest of each group that is installed; empty for no environment or an unfinished one."""
    try:
        stamp = json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def write_stamp(stamp: dict[str, str]) -> None:
    """Store the digests."""
    part = STAMP.with_suffix(".part")
    part.write_text(json.dumps(stamp, indent=2))
    os.replace(part, STAMP)


@contextlib.contextmanager
def locked() -> Iterator[None]:
    """Let one run at a time change the environment."""
    CACHE.mkdir(exist_ok=True)
    with open(CACHE / "environment.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("Waiting for another run to finish the environment ...")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_log(command: Sequence[str], result: subprocess.CompletedProcess[str]) -> None:
    """Append a command and its output to the log."""
    LOG.parent.mkdir(parents=True, exist_ok=True)
    with open(LOG, "a") as log:
        log.write(f"$ {' '.join(command)}\n{result.stdout}{result.stderr}\n")


def pip_install(*arguments: str) -> str | None:
    """Install with the environment's pip, all output to the log; return None, or what pip said was wrong."""
    command = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "--no-input", "install", *arguments]
    result = run(command)
    write_log(command, result)
    return last_error(result.stdout + result.stderr) if result.returncode else None


def first_success(what: str, attempts: Iterable[Attempt]) -> None:
    """Install from the first attempt that works, else raise SetupError."""
    reason = "no source is known"
    for attempt in attempts:
        failure = pip_install(*attempt.options, *attempt.requirements)
        if failure is None:
            return
        reason = failure
    raise SetupError(f"pip could not install {what} ({reason}): check network and disk space, details in {LOG}.")


def make_venv() -> None:
    """Make ``.venv``, unless there is one that runs; its parent's torch stays in sight if new enough."""
    if (probe_python(str(PYTHON), "site") or (0, 0)) >= min(PYTHONS):
        if probe_python(str(PYTHON), "pip") is None:
            run([PYTHON, "-m", "ensurepip"])
        return
    if VENV.exists() and not (VENV / "pyvenv.cfg").is_file():
        raise SetupError(f"{VENV} is no virtual environment: move it away and run again.")
    parent = select_python(candidate_pythons())
    torch = installed_torch(parent)
    say(f"Making {VENV} with {shutil.which(parent)}{f' and its torch {torch}' if torch else ''} ...")
    folders = environment_folders(parent) if torch else ""
    options = ["--clear", *(["--system-site-packages"] if torch and not folders else [])]
    result = run([parent, "-m", "venv", *options, VENV])
    if result.returncode:
        reason = last_error(result.stdout + result.stderr)
        raise SetupError(f"{parent} could not make {VENV} ({reason}): check disk space and permissions.")
    if folders:
        (site_packages() / "parent_environment.pth").write_text(folders)


def environment_folders(python: str) -> str:
    """Return the package folders of an interpreter that is a virtual environment's, one to a line, else "".

    Named in a .pth file they can be seen from an environment made with that interpreter; Python's own switch for
    that (system-site-packages) passes over them, to the interpreter that both are based on.
    """
    listing = "import site, sys; sys.prefix != sys.base_prefix and print(*site.getsitepackages(), sep='\\n')"
    return output_of([python, "-c", listing]) or ""


def site_packages() -> Path:
    """Return the environment's folder of pure Python packages."""
    output = output_of([PYTHON, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"])
    if not output:
        raise SetupError(f"{PYTHON} does not run: remove {VENV} and run again.")
    return Path(output)


def import_failure(module: str) -> str | None:
    """Return None if the environment imports a module, else the exception's last line."""
    result = run([PYTHON, "-c", f"import {module}"])
    return last_error(result.stderr) if result.returncode else None


def install_torch() -> None:
    """Install torch, torchvision and torchaudio as far as they are missing, and see that each imports."""
    if installed_torch(PYTHON) is None:
        say("Installing torch (a few minutes, once) ...")
        first_success("torch", torch_attempts(platform.system()))
    torch = installed_torch(PYTHON)
    if torch is None:
        reason = import_failure("torch") or "too old"
        raise SetupError(f"torch is installed but of no use ({reason}): remove {VENV} and run again.")
    first_success("numpy and Pillow", [Attempt(("numpy", "pillow"))])
    for module, requirement in companions(torch).items():
        if output_of([PYTHON, "-c", f"import importlib.metadata as m; m.version({module!r})"]) is None:
            say(f"Installing {module} ...")
            sources = [CPU_INDEX, ()] if "+cpu" in torch else [()]
            first_success(module, [Attempt((requirement,), ("--no-deps", *options)) for options in sources])
        if import_failure(module):
            UNLINK_FROM_CUDA[module]()
        failure = import_failure(module)
        if failure:
            raise SetupError(f"{module} does not work with torch {torch} ({failure}): remove {VENV} and run again.")


def declare_torchvision_operators() -> None:
    """Put the import hook of torchvision_on_cpu_torch.py into the environment."""
    folder = site_packages()
    shutil.copyfile(SHIM, folder / SHIM.name)
    (folder / f"{SHIM.stem}.pth").write_text(f"import {SHIM.stem}\n")


def remove_torchaudio_extension() -> None:
    """Remove torchaudio's C++ extension, which it does without where the file is absent."""
    for extension in (site_packages() / "torchaudio" / "lib").glob("_torchaudio*.so"):
        extension.unlink()


UNLINK_FROM_CUDA: dict[str, Callable[[], None]] = {
    "torchvision": declare_torchvision_operators,
    "torchaudio": remove_torchaudio_extension,
}
"""What makes a wheel that is linked to CUDA import beside a CPU build of torch."""


def install_requirements(what: str, requirements: Sequence[str]) -> None:
    """Install requirement lines; torch and its companions keep the versions that they have."""
    say(f"Installing {what} ...")
    names = ("torch", "torchvision", "torchaudio")
    listing = f"import importlib.metadata as m\nfor n in {names}: print(n, m.version(n), sep='==')"
    present = output_of([PYTHON, "-c", listing]) or ""
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        wanted, kept = Path(scratch, "requirements.txt"), Path(scratch, "constraints.txt")
        wanted.write_text("\n".join(requirements) + "\n")
        kept.write_text(present + "\n")
        first_success(what, [Attempt(("--requirement", str(wanted)), ("--constraint", str(kept)))])


def missing_programs() -> list[Program]:
    """Return the system's programs that the tests need and that are not on the search path."""
    return [program for program in PROGRAMS if not any(map(shutil.which, program.names))]


def install_programs() -> None:
    """Install the system's programs that the tests need: with apt-get where that may be done, else say how.

    Without them most tests run all the same, so that nothing here is an error.
    """
    missing = missing_programs()
    if not missing:
        return
    names = " and ".join(program.names[0] for program in missing)
    packages = sorted({program.debian for program in missing})
    if shutil.which("apt-get") is None:
        commands = " and ".join(f'"brew install {name}"' for name in sorted({p.homebrew for p in missing}))
        say(f"{names} not found, so that the tests that use it will fail: install it, on a Mac with {commands}.")
    elif os.geteuid():
        say(
            f"{names} not found, so that the tests that use it will fail: install it with "
            f'"sudo apt-get install {" ".join(packages)}".'
        )
    else:
        say(f"Installing {' and '.join(packages)} with apt-get ...")
        failure = apt_install(packages)
        if failure:
            say(f"apt-get could not install {names} ({failure}): check the network, details in {LOG}.")


def apt_install(packages: Sequence[str]) -> str | None:
    """Install Debian packages, all output to the log; return None, or what apt-get said was wrong."""
    install = ["apt-get", "install", "--yes", "--no-install-recommends", *packages]
    failure: str | None = None
    for command in (install, ["apt-get", "update"], install):
        result = run(["env", "DEBIAN_FRONTEND=noninteractive", *command])
        write_log(command, result)
        failure = last_error(result.stdout + result.stderr) if result.returncode else None
        if failure is None and command is install:
            return None
    return failure


def wanted_stamp(comfyui: Path, tests: bool) -> dict[str, str]:
    """Return the digest that each group must have; a ComfyUI that is not there yet gives "" for its group."""
    python = text_or_empty(VENV / "pyvenv.cfg")
    comfyui_lines = needed_requirements(text_or_empty(comfyui / "requirements.txt"))
    pack_lines = text_or_empty(ROOT / "requirements.txt")
    stamp = {
        "torch": digest(python, TORCH.get(platform.system()), companions("0.0"), text_or_empty(SHIM)),
        "comfyui": digest(python, comfyui_lines, pack_lines) if comfyui_lines else "",
    }
    return stamp | ({"tests": digest(python, text_or_empty(ROOT / "requirements-test.txt"))} if tests else {})


def text_or_empty(path: Path) -> str:
    """Return a file's text, "" where there is no such file."""
    try:
        return path.read_text()
    except OSError:
        return ""


def up_to_date(stamp: dict[str, str], wanted: dict[str, str]) -> bool:
    """Whether every wanted group is installed as wanted."""
    same = all(value and stamp.get(group) == value for group, value in wanted.items())
    return same and os.access(PYTHON, os.X_OK)


def ensure(tests: bool = False, comfyui_version: str | None = None) -> Path:
    """Make the environment what this checkout needs and return its interpreter.

    With ``tests`` it also holds the tests' requirements, and the system gets the programs that they run.
    ComfyUI's requirements are those of the user's own ComfyUI; for tests, or when a pinned version is named, those
    of the newest pinned one, with which the older ones run too. Raises SetupError or FetchError.
    """
    if tests and missing_programs():
        with locked():
            install_programs()
    pinned = tests or comfyui_version is not None
    comfyui = fetch_comfyui.find(fetch_comfyui.DEFAULT_VERSION if pinned else None)
    if up_to_date(read_stamp(), wanted_stamp(comfyui, tests)):
        return PYTHON
    with locked():
        make_venv()
        if not fetch_comfyui.is_comfyui(comfyui):
            say(f"Fetching ComfyUI {comfyui.name} ...")
            fetch_comfyui.fetch(comfyui.name, python=str(PYTHON))
        lines = needed_requirements(text_or_empty(comfyui / "requirements.txt"))
        lines += text_or_empty(ROOT / "requirements.txt").splitlines()
        installers: dict[str, Callable[[], None]] = {
            "torch": install_torch,
            "comfyui": lambda: install_requirements("what ComfyUI needs", lines),
            "tests": lambda: install_requirements(
                "what the tests need", text_or_empty(ROOT / "requirements-test.txt").splitlines()
            ),
        }
        stamp = read_stamp()
        for group, value in wanted_stamp(comfyui, tests).items():
            if stamp.get(group) != value:
                installers[group]()
                stamp[group] = value
                write_stamp(stamp)
    return PYTHON


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: make the environment and print its interpreter."""
    parser = argparse.ArgumentParser(
        description=f"Make the virtual environment {VENV} and print its interpreter. pip keeps downloads in "
        f"its own cache; ComfyUI, logs and the lock go to {CACHE}."
    )
    parser.add_argument("--tests", action="store_true", help="also install requirements-test.txt, ffmpeg and Chromium")
    parser.add_argument(
        "--comfyui-version", choices=fetch_comfyui.DISTRIBUTIONS, help="for this pinned copy of ComfyUI"
    )
    options = parser.parse_args(arguments)
    try:
        print(ensure(options.tests, options.comfyui_version))
    except (SetupError, FetchError) as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        say("Stopped; run it again to go on.")
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
