"""What killed processes leave beside and inside a cube: found by name, removed when old enough, read by nobody."""

from __future__ import annotations

import fnmatch
import os
import shutil
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from zarr_store.backends import open_store
from zarr_store.errors import InvalidInput, Locked
from zarr_store.lock import CubeLock
from zarr_store.read import is_cube

__all__ = ["Stray", "find_strays", "remove_strays"]

_BESIDE = (".{name}.*.partial", ".{name}.*.overwrite")
"""Cubes that were never finished, or that were swapped out."""
_INSIDE = ("*.partial", "*.__lock", "*.stale")
"""Files that were never renamed into place; `__lock` is tensorstore's."""


@dataclass(frozen=True)
class Stray:
    """A file or folder that nobody will come back for.

    Attributes:
        path: Where.
        nbytes: Of all its files.
        age_s: Since anything in it was changed.
    """

    path: Path
    nbytes: int
    age_s: float


def find_strays(url: str | os.PathLike[str], *, older_than_s: float) -> list[Stray]:
    """Strays of the cube at `url`, which itself need not exist.

    Args:
        url: The cube.
        older_than_s: Seconds without a change, after which no process works on it any more.

    Raises:
        InvalidInput: The cube is in a bucket, where nothing is ever half-written.
    """
    path = _folder(url)
    found = []
    if path.parent.is_dir():
        patterns = [pattern.format(name=_literal(path.name)) for pattern in _BESIDE]
        found += [
            entry
            for entry in sorted(path.parent.iterdir())
            if not entry.is_symlink() and any(fnmatch.fnmatchcase(entry.name, pattern) for pattern in patterns)
        ]
    for folder, folders, names in os.walk(path):
        found += [
            Path(folder, n) for n in sorted((*names, *folders)) if any(fnmatch.fnmatchcase(n, p) for p in _INSIDE)
        ]
    strays = [stray for entry in found if (stray := _weigh(entry)) is not None]
    return [stray for stray in strays if stray.age_s >= older_than_s]


def remove_strays(url: str | os.PathLike[str], *, older_than_s: float) -> list[Stray]:
    """Remove strays, under the cube's lock; those that a run holds are left.

    Returns:
        What was removed.

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


def _folder(url: str | os.PathLike[str]) -> Path:
    store = open_store(url)
    if "://" in store.url:
        raise InvalidInput(
            f"{store.url}: an object in a bucket is there whole or not at all, so nothing is to be cleaned; parts of "
            "broken uploads are removed by a lifecycle rule of the bucket"
        )
    return Path(store.url)


def _literal(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _weigh(path: Path) -> Stray | None:
    """Size and age; None for what has gone meanwhile."""
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
