"""Files that appear complete or not at all: written under a hidden name in the same folder, synced, moved into place.

The hidden name follows from the final one and is locked while in use, so a fragment left by a killed process is
recognised and removed by the next save of that name, and two processes never write the same file. Folders of images
are made in the same way, as a whole.
"""

from __future__ import annotations

import errno
import itertools
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import av

from .errors import VideoError

try:
    import fcntl
except ImportError:  # Windows: a fragment there cannot be told from a file in use, and its name is passed over
    fcntl = None  # type: ignore[assignment]

Output = TypeVar("Output", bound="_Output")

WRITE_ERRORS = {
    errno.ENOSPC: "the disk is full; free some space and run again",
    errno.EDQUOT: "the disk quota is used up; free some space and run again",
    errno.EFBIG: "it grew larger than the disk or the system allows; choose a smaller quality or another folder",
    errno.ENOENT: "its folder does not exist or has been removed; create the folder or choose another",
    errno.ENOTDIR: "a part of its folder's path is a file; choose another folder",
    errno.EACCES: "its folder may not be written to; change the permissions or choose another folder",
    errno.EPERM: "its folder may not be written to; change the permissions or choose another folder",
    errno.EROFS: "its disk is read-only; choose another folder",
    errno.ENAMETOOLONG: "its name is too long; shorten it",
}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an error of the system or of FFmpeg into a VideoError that names `path`."""
    try:
        yield
    except (OSError, av.FFmpegError) as error:
        reason = WRITE_ERRORS.get(error.errno or 0, f"{error.strerror or error}; see the log")
        raise VideoError(f"Cannot save {path}: {reason}.") from error


def numbered_names(folder: Path, stem: str, counter: int, suffix: str) -> Iterator[Path]:
    """ComfyUI's numbered names, stem_00001_.mp4 and so on, from `counter` upwards without end."""
    for number in itertools.count(counter):
        yield folder / f"{stem}_{number:05}_{suffix}"


class _Output:
    """Takes the first name that is free and creates what will have it, hidden, for this process alone."""

    in_use: str
    _replace = False

    def __init__(self, names: Iterable[Path]) -> None:
        self._names = iter(names)
        self._lock: int | None = None
        self.path = Path()
        self.partial = Path()

    def __enter__(self: Output) -> Output:
        for path in self._names:
            self.path, self.partial = path, path.with_name(f".{path.name}.partial")
            with writing(path):
                if (self._replace or not path.exists()) and self._claim():
                    return self
        raise VideoError(f"Cannot save {self.path}: {self.in_use}.")

    def _claim(self) -> bool:
        for _ in range(2):
            try:
                descriptor = self._create()
            except FileExistsError:
                if not _remove_if_abandoned(self.partial):
                    return False
                continue
            if descriptor is None:
                return True
            if _lock(descriptor, self.partial) is not False:
                self._lock = descriptor
                return True
            os.close(descriptor)
            return False
        return False

    def _create(self) -> int | None:
        """Create ``partial`` and open it for the lock, None where there are none; FileExistsError if it is there."""
        raise NotImplementedError


class OutputFile(_Output):
    """Context manager for one new file: fill `partial`, then call `publish`; without that nothing stays behind.

    names: candidates for the final name, in order of preference. A name that exists or that another process is
    writing is passed over; with `replace` an existing file is replaced when the new one is complete.
    Raises VideoError, one sentence, when no name can be used or the folder refuses.
    """

    in_use = "the name is in use; choose another one"

    def __init__(self, names: Iterable[Path], replace: bool = False) -> None:
        super().__init__(names)
        self._replace = replace

    def publish(self) -> Path:
        """Sync the finished file and move it into place; returns its final name."""
        with writing(self.path):
            descriptor = os.open(self.partial, os.O_RDWR) if self._lock is None else self._lock
            os.fsync(descriptor)
            if self._lock is None:
                os.close(descriptor)
            self._move()
            _sync_folder(self.path.parent)
        return self.path

    def __exit__(self, *exception: object) -> None:
        with suppress(OSError):
            self.partial.unlink(missing_ok=True)
        if self._lock is not None:
            os.close(self._lock)

    def _create(self) -> int | None:
        descriptor = os.open(self.partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        if fcntl is not None:
            return descriptor
        os.close(descriptor)
        return None

    def _move(self) -> None:
        if self._replace:
            os.replace(self.partial, self.path)
            return
        for candidate in itertools.chain([self.path], self._names):
            self.path = candidate
            try:
                os.link(self.partial, candidate)  # unlike a rename, refuses a name taken meanwhile
            except FileExistsError:
                continue
            except OSError:  # no hard links on this file system (exFAT, some network drives)
                if candidate.exists():
                    continue
                os.replace(self.partial, candidate)
            return
        raise FileExistsError(errno.EEXIST, "the name is in use", str(self.path))


class OutputFolder(_Output):
    """Context manager for one new folder: fill `partial`, then call `publish`; without that nothing stays behind.

    names: as for OutputFile; no folder is ever replaced. Raises VideoError, one sentence, when no name can be used.
    """

    in_use = "the name is in use, and folders are not replaced; choose another"

    def publish(self) -> Path:
        """Sync the finished folder and move it into place; returns its final name."""
        with writing(self.path):
            _sync_folder(self.partial)
            self._move()
            _sync_folder(self.path.parent)
        return self.path

    def __exit__(self, *exception: object) -> None:
        shutil.rmtree(self.partial, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)

    def _create(self) -> int | None:
        os.mkdir(self.partial)
        return None if fcntl is None else os.open(self.partial, os.O_RDONLY)

    def _move(self) -> None:
        for candidate in itertools.chain([self.path], self._names):
            self.path = candidate
            if candidate.exists():
                continue
            try:
                os.rename(self.partial, candidate)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):  # taken meanwhile
                    raise
                continue
            return
        raise FileExistsError(errno.EEXIST, "the name is in use", str(self.path))


def _lock(descriptor: int, path: Path) -> bool | None:
    """Whether the open file is now locked and `path` still names it; None where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except (BlockingIOError, FileNotFoundError):
        return False
    except OSError:
        return None


def _remove_if_abandoned(partial: Path) -> bool:
    """Remove a fragment, a file or a folder, that no process holds; False if one does."""
    if fcntl is None:
        return False
    try:
        descriptor = os.open(partial, os.O_RDONLY if partial.is_dir() else os.O_RDWR)
    except FileNotFoundError:
        return True
    try:
        if not _lock(descriptor, partial):
            return False
        if partial.is_dir():
            shutil.rmtree(partial)
        else:
            partial.unlink()
        return True
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    """Make the new name durable where the system can (Windows cannot open a folder)."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
