"""Strays: files and folders that killed processes leave beside and inside a cube.

They are found by their names (`zarr_store.temporary`), and no reader looks at them. A run sweeps its own cube;
`terrashard gc` shows or removes everything that is old enough. Links are removed and never followed.
"""

from __future__ import annotations

import fnmatch
import os
import shutil
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from zarr_store.backends import open_store
from zarr_store.errors import InvalidInput, Locked
from zarr_store.lock import CubeLock
from zarr_store.read import is_cube
from zarr_store.temporary import OVERWRITE, PARTIAL, STALE, is_temporary

__all__ = ["Stray", "find_strays", "remove_strays", "sweep_strays"]

_BESIDE = tuple(f".{{name}}.*{suffix}" for suffix in (PARTIAL, OVERWRITE))
"""Patterns of cubes that were never finished, or that another cube has replaced."""


@dataclass(frozen=True)
class Stray:
    """A file or folder that no process needs any longer.

    Attributes:
        path: Where it is.
        nbytes: Bytes of all its files.
        age_s: Seconds since anything in it has changed.
    """

    path: Path
    nbytes: int
    age_s: float


def find_strays(url: str | os.PathLike[str], *, older_than_s: float) -> list[Stray]:
    """Find the strays of the cube at `url`; the cube itself need not exist.

    Args:
        url: The cube.
        older_than_s: Seconds without a change after which no process works on a stray any longer.

    Raises:
        InvalidInput: The cube is in a bucket, where no object is ever half-written.
    """
    path = _folder(url)
    entries = []
    if path.parent.is_dir():
        patterns = [pattern.format(name=_literal(path.name)) for pattern in _BESIDE]
        entries += [
            entry
            for entry in sorted(path.parent.iterdir())
            if not entry.is_symlink() and any(fnmatch.fnmatchcase(entry.name, pattern) for pattern in patterns)
        ]
    for folder, folders, names in os.walk(path):
        entries += [Path(folder, name) for name in sorted((*names, *folders)) if is_temporary(name)]
        folders[:] = [name for name in folders if not is_temporary(name)]  # what is in a stray goes with it
    strays = [stray for entry in entries if (stray := _weigh(entry)) is not None]
    return [stray for stray in strays if stray.age_s >= older_than_s]


def remove_strays(url: str | os.PathLike[str], *, older_than_s: float) -> list[Stray]:
    """Remove strays while holding the cube's lock; a half-made cube that a run holds stays.

    Returns:
        The strays that were removed.

    Raises:
        Locked: A run writes to the cube.
    """
    path = _folder(url)
    removed = []
    with CubeLock(path, "gc") if is_cube(open_store(path)) else nullcontext():
        for stray in find_strays(path, older_than_s=older_than_s):
            if stray.path.is_symlink():  # the link is a stray, what it leads to is not
                stray.path.unlink(missing_ok=True)
                removed.append(stray)
                continue
            try:
                with CubeLock(stray.path, "gc") if is_cube(open_store(stray.path)) else nullcontext():
                    shutil.rmtree(stray.path) if stray.path.is_dir() else stray.path.unlink(missing_ok=True)
            except Locked:
                continue
            removed.append(stray)
    return removed


def sweep_strays(url: str | os.PathLike[str]) -> None:
    """Remove the half-written files inside a cube, whatever their age; nothing in a bucket is half-written.

    The caller holds the cube's lock, so no other run writes. A worker that was cut off and still writes finds its file
    gone; its run has ended, so the error reaches nobody. A lock that another run is about to take over (`STALE`) stays:
    that run may still have to put it back.
    """
    if "://" in os.fspath(url):
        return
    # the names are removed in folders that are held open: one that becomes a link meanwhile leads nowhere else
    for _, _, names, folder in os.fwalk(os.path.realpath(url), follow_symlinks=False):
        for name in names:
            if is_temporary(name) and not name.endswith(STALE):
                with suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=folder)


def _folder(url: str | os.PathLike[str]) -> Path:
    store = open_store(url)
    if "://" in store.url:
        raise InvalidInput(
            f"{store.url} is in a bucket, where an object is whole or absent, so there is nothing to clean up. A "
            "lifecycle rule of the bucket removes the parts of broken uploads"
        )
    return Path(store.url)


def _literal(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _weigh(path: Path) -> Stray | None:
    """Measure size and age; return None for what was removed meanwhile."""
    nbytes, newest = 0, 0.0
    try:
        newest = path.lstat().st_mtime
        if path.is_symlink():
            return Stray(path, 0, max(0.0, time.time() - newest))
        nbytes = 0 if path.is_dir() else path.lstat().st_size
        for folder, _, names in os.walk(path):
            for entry in (Path(folder), *(Path(folder, name) for name in names)):
                about = entry.lstat()
                newest = max(newest, about.st_mtime)
                nbytes += 0 if entry.is_dir() else about.st_size
    except FileNotFoundError:
        return None
    return Stray(path, nbytes, max(0.0, time.time() - newest))
