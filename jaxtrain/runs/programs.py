"""Compiled programs are kept in a folder of the user, never in one that came with a run.

Whoever can write a compiled program can run any code as the one who loads it. So programs are loaded only from a folder
that this user made and nobody else can write to: `$XDG_CACHE_HOME/terrashard/programs/KEY`, or `~/.cache/…`. A run that
comes from another machine, or from somebody else, has none there and is compiled again.
"""

from __future__ import annotations

import logging
import os
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path

from zarr_store.errors import AccessError

__all__ = ["MOST_BYTES", "private_folder", "program_folder"]

_log = logging.getLogger(__name__)

MOST_BYTES = 4 << 30
"""Largest size of all programs of all runs, bytes; the longest unused ones are removed first."""


def program_folder(key: str, environment: Mapping[str, str] | None = None) -> Path | None:
    """Return the folder for the programs of a run, which is made if need be; None, with a warning, if it cannot be.

    Args:
        key: Identity of the run, letters and digits.
        environment: Environment variables; None for those of the process.
    """
    folder = private_folder("programs", key, environment=environment)
    if folder is None:
        return None
    os.utime(folder)
    _prune(folder)
    return folder


def private_folder(*parts: str, environment: Mapping[str, str] | None = None) -> Path | None:
    """Return a folder of the user's cache to which nobody else can write; None, with a warning, if there can be none.

    Args:
        parts: names of folders below `terrashard`, letters and digits.
        environment: Environment variables; None for those of the process.
    """
    if not all(part.isalnum() for part in parts):
        raise ValueError(f"expected letters and digits, got {parts!r}")
    try:
        folder = _cache_home(os.environ if environment is None else environment)
        folder.mkdir(parents=True, exist_ok=True)
        for part in ("terrashard", *parts):
            folder = folder / part
            folder.mkdir(mode=0o700, exist_ok=True)
            _check_private(folder)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
        _log.warning("compiled programs are not kept: %s; the next run compiles them again", error)
        return None
    return folder


def _cache_home(environment: Mapping[str, str]) -> Path:
    named = environment.get("XDG_CACHE_HOME", "")
    # its specification ignores a relative path, which would lead into the current folder, whatever that is
    return Path(named) if os.path.isabs(named) else Path.home() / ".cache"


def _check_private(folder: Path) -> None:
    """Refuse a folder that somebody else could have filled.

    Raises:
        AccessError: It is a link, is not this user's, or others may write to it.
    """
    about = folder.lstat()
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.geteuid() or about.st_mode & 0o022:
        raise AccessError(
            f"{folder} is not a folder of this user alone ({stat.filemode(about.st_mode)}, owner {about.st_uid}); "
            "remove it, or set XDG_CACHE_HOME to a folder of yours"
        )


def _prune(current: Path) -> None:
    """Remove the programs of the runs that were longest not used, until all of them fit."""
    kept: list[tuple[float, int, Path]] = []
    for entry in current.parent.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            size = sum(file.lstat().st_size for file in entry.iterdir())
            kept.append((entry.stat().st_mtime, size, entry))
    total = sum(size for _, size, _ in kept)
    for _, size, entry in sorted(kept):
        if total <= MOST_BYTES:
            return
        if entry != current:
            shutil.rmtree(entry, ignore_errors=True)
            total -= size
