"""Keep compiled programs in a folder of the user, never in a folder that came with a run.

Whoever can write a compiled program can run any code as the one who loads it. So programs are loaded only from a folder
that this user made and nobody else can write to: `$XDG_CACHE_HOME/terrashard/programs/KEY`, or `~/.cache/…`. A run that
comes from another machine, or from somebody else, has none there and is compiled again. Programs for processors are
shared by all runs of the user; those for GPUs belong to one run.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import re
import shutil
import stat
import time
import zlib
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from numcodecs.zstd import Zstd

from zarr_store.errors import AccessError

__all__ = ["MOST_BYTES", "private_folder", "program_folder", "shared_folder"]

_log = logging.getLogger(__name__)

MOST_BYTES = 4 << 30
"""Largest size of all programs of all runs, bytes; those that were not used for longest are removed first."""

MOST_SHARED_BYTES = 1 << 30
"""Largest size of the programs of one kind of processor, bytes; the default U-Net has about 1 MB."""
_PROGRAM = "-cache"
"""End of the name of a file that JAX keeps a program in."""
_MARK = "looked"
_WRITING_S = 60.0
"""Seconds that a program may take to be written."""
_ZSTD = b"\x28\xb5\x2f\xfd"


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


def shared_folder(environment: Mapping[str, str] | None = None) -> Path | None:
    """Return the folder for programs of this kind of processor, which all runs share; None, with a warning, if none.

    Programs are for one compiler and one kind of processor: several machines may see the same home folder.
    """
    folder = private_folder("programs", f"processor{_processor()}", environment=environment)
    if folder is None:
        return None
    try:
        _drop_broken(folder)
        _prune_files(folder)
        os.utime(folder)
        _prune(folder)
    except OSError as error:  # another process has just removed a program, or may not write here
        _log.debug("the folder of compiled programs was not tidied: %s", error)
    return folder


def _processor() -> str:
    """Return a digest of the compiler's release, of what this kind of processor can do, and of how many cores are used.

    The compiler cuts loops for the cores that this process may use, and sums are rounded by how they are cut. A program
    for another number would give other bits.
    """
    try:
        found = re.findall(
            r"^(?:flags|Features|model name|CPU implementer|CPU part)\s*:.*",
            Path("/proc/cpuinfo").read_text(),
            re.MULTILINE,
        )
    except OSError:  # not Linux
        found = [platform.processor()]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = [str(cores), *(os.environ.get(name, "") for name in ("NPROC", "PJRT_NPROC"))]
    kind = [version("jaxlib"), platform.machine(), platform.system(), *threads, *sorted(set(found))]
    return hashlib.sha256(repr(kind).encode()).hexdigest()[:16]


def _drop_broken(folder: Path) -> None:
    """Remove programs that a killed process has not written to their end; JAX finds them broken and keeps them.

    Only those are looked at that were written since the last look.
    """
    mark = folder / _MARK
    looked, now = mark.stat().st_mtime if mark.exists() else 0.0, time.time()
    for entry in folder.glob(f"*{_PROGRAM}"):
        with suppress(FileNotFoundError):  # another process may remove programs, too
            if entry.stat().st_mtime >= looked - _WRITING_S and not _is_whole(entry.read_bytes()):
                entry.unlink()
    mark.touch(mode=0o600)
    os.utime(mark, (now, now))


def _is_whole(data: bytes) -> bool:
    if data.startswith(_ZSTD):  # JAX compresses by zstandard where that is installed
        try:
            Zstd().decode(data)
        except (RuntimeError, ValueError):
            return False
        return True
    unpacked = zlib.decompressobj()
    try:
        unpacked.decompress(data)
    except zlib.error:
        return False
    return unpacked.eof


def _prune_files(folder: Path) -> None:
    """Remove the programs that were longest not used, until those that all runs share fit."""
    kept = []
    for entry in folder.glob(f"*{_PROGRAM}"):
        with suppress(FileNotFoundError):
            about = entry.stat()
            kept.append((max(about.st_atime, about.st_mtime), about.st_size, entry))
    total = sum(size for _, size, _ in kept)
    for _, size, entry in sorted(kept):
        if total <= MOST_SHARED_BYTES:
            return
        entry.unlink(missing_ok=True)
        total -= size


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
            size = 0
            for file in entry.iterdir():
                with suppress(FileNotFoundError):  # runs on a processor tidy the programs that they share
                    size += file.lstat().st_size
            kept.append((entry.stat().st_mtime, size, entry))
    total = sum(size for _, size, _ in kept)
    for _, size, entry in sorted(kept):
        if total <= MOST_BYTES:
            return
        if entry != current:
            shutil.rmtree(entry, ignore_errors=True)
            total -= size
