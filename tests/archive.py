"""What the Comfy Registry's archive of the pack holds: the repository's files without those that .comfyignore names.

.comfyignore is written in two of Git's forms only, a folder's path with a slash at its end and a file's path, both from
the root, so that nothing has to be interpreted here. Hidden folders hold caches and what CI needs.
"""

import os
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def ignored():
    """The patterns of .comfyignore."""
    lines = (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def archive_files():
    """Paths of the archive's files, relative to the root."""
    patterns = ignored()
    files = []
    for parent, folders, names in os.walk(ROOT):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        for name in names:
            file = (Path(parent) / name).relative_to(ROOT)
            path = file.as_posix()
            if not any(path == pattern or (pattern.endswith("/") and path.startswith(pattern)) for pattern in patterns):
                files.append(file)
    return sorted(files)


def unpack_archive(folder):
    """Copy the archive's files into a folder, as ComfyUI Manager unpacks them."""
    for file in archive_files():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / file, folder / file)
