"""Write files that appear complete or not at all, and survive a power failure.

A file is written beside its place, then synced and renamed there, and then its folder is synced. The first half needs
a processor and the second only waits for the disk, so a `PendingFile` separates them.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from zarr_store.crash import crashpoint

__all__ = ["PendingFile", "make_folder", "sync_folder", "sync_tree", "umask", "write_file"]


class PendingFile:
    """A file that is written, but not yet under its final name.

    Args:
        path: Its place.
        key: Name of the file at crash points.
        parts: Its bytes, written as they come.

    Attributes:
        digest: SHA-256 of the bytes.

    Raises:
        OSError: The error of the system; then nothing is left.
    """

    def __init__(self, path: Path, key: str, parts: Iterable[bytes]) -> None:
        self._path = path
        self._key = key
        digest = hashlib.sha256()
        make_folder(path.parent)
        descriptor, self._beside = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
        self._file = os.fdopen(descriptor, "wb", buffering=0)
        try:
            for part in parts:
                digest.update(part)
                _write_all(self._file, part)
        except BaseException:
            self.abandon()
            raise
        self.digest = digest.hexdigest()

    def finish(self) -> None:
        """Put the file in its place, durably; if that fails, the old file stays and the new one is removed."""
        try:
            with self._file:
                os.fsync(self._file.fileno())
            # mkstemp makes private files; a cube is shared like any other file
            os.chmod(self._beside, 0o666 & ~umask())
            crashpoint(f"before {self._key}")
            os.replace(self._beside, self._path)
            crashpoint(f"after {self._key}")
        except BaseException:
            self.abandon()
            raise
        sync_folder(self._path.parent)

    def abandon(self) -> None:
        """Remove the file."""
        self._file.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._beside)


def make_folder(folder: Path) -> None:
    """Make folders as `mkdir(parents=True, exist_ok=True)` does; every new name is synced in the folder it is in."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(top: Path) -> None:
    """Make everything in and below a folder durable."""
    for folder, _, files in os.walk(top):
        for name in files:
            descriptor = os.open(Path(folder, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_folder(Path(folder))


def umask() -> int:
    """Return the umask of this process; the only way to read it is to set it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _write_all(file: io.RawIOBase, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[file.write(left) or 0 :]


def write_file(path: str | os.PathLike[str], data: bytes) -> None:
    """Write or replace a file, which appears complete or not at all; its temporary name cannot be guessed.

    Raises:
        OSError: The error of the system; the old file stays.
    """
    place = Path(path)
    PendingFile(place, place.name, [data]).finish()
