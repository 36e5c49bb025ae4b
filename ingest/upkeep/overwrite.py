"""`overwrite` replaces a cube by a new one, which is made beside it; they change places when the new one is complete.

Until then readers find the old cube, and it is locked. A killed run leaves the half-made cube beside the old one, and
the same command continues from there.
"""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ingest.plan.plan import Plan
from ingest.request.config import IngestConfig
from ingest.run.loop import IngestEvent, IngestReport, run
from zarr_store.backends import open_store
from zarr_store.crash import crashpoint
from zarr_store.durable import sync_folder
from zarr_store.errors import InvalidInput
from zarr_store.lock import CubeLock
from zarr_store.read import is_cube, open_cube
from zarr_store.temporary import OVERWRITE

if TYPE_CHECKING:
    from distributed import Client

    from ingest.run.record import RunRecord

__all__ = ["overwrite"]

log = logging.getLogger(__name__)

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def overwrite(
    plan: Plan,
    cube_url: str | os.PathLike[str],
    *,
    config: IngestConfig | None = None,
    client: Client | None = None,
    on_event: Callable[[IngestEvent], None] | None = None,
    record: RunRecord | None = None,
    typed: str = "",
) -> IngestReport:
    """Make the cube of a plan where another cube, an empty folder or nothing is; the arguments are those of `run`.

    Returns:
        The report of the run. Where a shard is not complete, the old cube is still in its place.

    Raises:
        InvalidInput: Something other than a cube is there, or the cube is in a bucket. Nothing was changed.
        Locked: Another run writes to the old cube.
    """
    path = _place(cube_url)

    def make(where: Path) -> IngestReport:
        return run(plan, where, config=config, client=client, on_event=on_event, record=record, typed=typed)

    beside = path.with_name(f".{path.name}.{plan.digest[:12]}{OVERWRITE}")
    if not path.exists():
        if not beside.exists():
            return make(path)
        report = make(beside)  # a run died between the two steps of a swap
        if _is_whole(report):
            os.rename(beside, path)
            _clear_aside(path)
        return _named(report, path)
    with CubeLock(path, f"overwriting with plan {plan.digest[:12]}"):
        swapped = False
        if beside.exists() and not _is_of(plan, beside):
            shutil.rmtree(beside)  # what is left of the old cube: a run was killed after the swap
            swapped = _is_of(plan, path)
        if not swapped:
            report = make(beside)
            if not _is_whole(report):
                log.warning("%s stays as it was until the new cube is complete; the same command continues it", path)
                return report
            crashpoint("before the swap")
            _swap(beside, path)
            crashpoint("after the swap")
            shutil.rmtree(beside)
            return _named(report, path)
    return make(path)


def _is_of(plan: Plan, path: Path) -> bool:
    return is_cube(open_store(path)) and open_cube(path).provenance.get("plan") == plan.digest


def _place(cube_url: str | os.PathLike[str]) -> Path:
    """Check that what is at a path may be overwritten, and return the path; an empty folder is removed."""
    store = open_store(cube_url)
    if "://" in store.url:
        raise InvalidInput(
            f"{store.url} is in a bucket, where two cubes cannot change places: --overwrite needs a folder. Remove "
            "what "
            "is there with the tools of the bucket, or choose another prefix"
        )
    path = Path(store.url)
    if path.is_symlink():
        raise InvalidInput(f"{path} is a link, and nothing was changed: give the path that it leads to")
    if path.is_dir() and not any(path.iterdir()):
        path.rmdir()
    elif path.exists() and not (path.is_dir() and is_cube(store)):
        what = "a folder that is not a terrashard cube" if path.is_dir() else "a file"
        raise InvalidInput(
            f"{path} is {what}, which --overwrite does not touch; nothing was changed: choose another path or remove it"
        )
    return path


def _is_whole(report: IngestReport) -> bool:
    return report.exit_code == 0 and not report.pending


def _named(report: IngestReport, path: Path) -> IngestReport:
    return replace(report, cube=str(path)) if _is_whole(report) else report


def _swap(new: Path, old: Path) -> None:
    """Swap two folders, in one step if the system can."""
    exchange = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if exchange is None or exchange(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _RENAME_EXCHANGE):
        aside = _aside(old)
        os.rename(old, aside)
        os.rename(new, old)
        os.rename(aside, new)
    sync_folder(old.parent)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.old{OVERWRITE}")


def _clear_aside(path: Path) -> None:
    if _aside(path).exists():
        shutil.rmtree(_aside(path))
