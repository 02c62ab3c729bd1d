"""ComfyUI's front end in the version that each pinned ComfyUI asks for, unpacked once into the cache folder.

The wheels of comfyui-frontend-package come through pip, which compares them with the SHA-256 written here; a server is
given one with ``--front-end-root``.
"""

import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from apple_silicon_video.tests.comfyui.trees import tree

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "frontends"
PACKAGE = "comfyui-frontend-package"
HASHES = {
    "1.39.19": "58343dd79eca371badbe354c12b9bc47c7dc58f7f92243be537e178dfbaf2036",
    "1.44.19": "4cb2ca292e76cc839ff231e3e3ffb5a7de0eb306924f15498ed0f7027b05c607",
    "1.47.12": "b2155c1afbf30afd06ed217307a1abd92955b329361353a1b68a5297fc00902e",
}


def wanted(comfyui_version: str) -> str:
    """The front end's version that a ComfyUI's requirements name."""
    requirements = (tree(comfyui_version) / "requirements.txt").read_text()
    found = re.search(rf"^{PACKAGE}==(\S+)", requirements, re.MULTILINE)
    assert found, f"ComfyUI {comfyui_version} names no front end"
    return found.group(1)


def frontend(comfyui_version: str) -> Path:
    """The folder with index.html that belongs to a ComfyUI version."""
    version = wanted(comfyui_version)
    folder = CACHE / version
    if not (folder / "index.html").is_file():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="fetch-", dir=CACHE) as scratch:
            static = unpack(download(version, Path(scratch)), Path(scratch))
            try:
                os.replace(static, folder)
            except OSError:
                if not (folder / "index.html").is_file():  # otherwise another worker was first
                    raise
    return folder


def download(version: str, folder: Path) -> Path:
    """Have pip put the wheel into a folder; return the file."""
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{PACKAGE}=={version} --hash=sha256:{HASHES[version]}\n")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download", "--quiet"]
    command += ["--no-deps", "--require-hashes", "--dest", str(folder), "--requirement", str(requirement)]
    subprocess.run(command, stdin=subprocess.DEVNULL, check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def unpack(wheel: Path, folder: Path) -> Path:
    """Unpack a wheel's static files below a folder; return their root."""
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if name.startswith("comfyui_frontend_package/static/")]
        archive.extractall(folder, members)
    return folder / "comfyui_frontend_package" / "static"
