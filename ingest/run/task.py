"""The Dask task of an ingest: `ingest_shard` fills one shard, writes it and records it in the ledger."""

from __future__ import annotations

import asyncio
import errno
import functools
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace

from ingest.plan.task import Recipe, ShardTask
from ingest.raster.kept import KnownFile, kept_bytes
from ingest.raster.limits import Access
from ingest.run.shard import fill_shard
from ingest.trust.hrefs import is_url
from ingest.worker.meters import stage
from ingest.worker.slots import computing, run_in_slot
from zarr_store.crash import crashpoint
from zarr_store.errors import NoSpace
from zarr_store.ledger import LedgerRow
from zarr_store.read import open_cube
from zarr_store.write import ShardWriter

__all__ = ["ingest_shard", "settle"]

_being_made: set[int] = set()
"""Identifiers of the threads of this process that are making a shard."""


def ingest_shard(
    task: ShardTask,
    recipe: Recipe,
    url: str,
    access: Access,
    *,
    fence: str | None = None,
    again: bool = False,
    known: Sequence[KnownFile] = (),
) -> tuple[LedgerRow, int]:
    """Fill one shard, write it and record it in the ledger; a second call leaves the same bytes.

    A task that ran before (its worker died before it could answer, or the task was stolen) reads nothing. Where the
    shard is complete and a scene cannot be read this time, the shard stays as it is and the returned row is "failed".

    Args:
        task: The shard.
        recipe: Recipe of its collection.
        url: The cube.
        access: Limits of reading.
        fence: Token of the run's lock; nothing is written once the run has lost the lock.
        again: Make the shard although its row is "done".
        known: What planning read of the files of the shard.

    Returns:
        The shard's row without its statistics, which stay in the ledger (the run keeps all rows in memory), and how
        many pixels were read from files.
    """
    remote = any(is_url(asset.href) for source in task.sources for asset in source.assets)

    def make(give_way: Callable[[], None]) -> tuple[LedgerRow, int]:
        kept = kept_bytes(os.getpid())
        kept.borrow(known)
        try:
            with _making():
                return _make_shard(task, recipe, url, access, fence, again, remote, give_way)
        finally:
            for file in known:
                kept.drop(file.href)

    return run_in_slot(make, remote=remote)


def _make_shard(
    task: ShardTask,
    recipe: Recipe,
    url: str,
    access: Access,
    fence: str | None,
    again: bool,
    remote: bool,
    give_way: Callable[[], None],
) -> tuple[LedgerRow, int]:
    _check_cube(url, fence) if fence else open_cube(url)
    writer = ShardWriter(url, task.collection, fence=fence, spec=recipe.spec)
    before = writer.ledger().get_stored(task.index)
    if before is not None and before.state == "done" and before.key == task.key and not again:
        return replace(before, stats=()), 0
    with nullcontext() if remote else computing():
        pass  # a shard before this one is being packed; with one thread, its pixels are gone then
    filled = fill_shard(task, recipe, access=access)
    if before is not None and before.state == "done" and any(s.state == "missing" for s in filled.outcomes):
        return LedgerRow(task.index, task.region, task.key, "failed", filled.outcomes), filled.pixels_read
    crashpoint(f"filled {task.index}")
    pixels_read = filled.pixels_read
    try:
        with stage("write", sum(array.nbytes for array in filled.arrays.values())):
            with computing():
                give_way()  # the next shard is handed over meanwhile, and begins as soon as this one is packed
                packed = writer.pack(task.region, filled.arrays, key=task.key, sources=filled.outcomes)
                del filled  # the next shard needs the memory
            row = packed.finish()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT) and not isinstance(error, NoSpace):
            raise NoSpace(f"no space left for {url}; free some space and repeat the command") from error
        raise
    return replace(row, stats=()), pixels_read


@functools.lru_cache(maxsize=16)
def _check_cube(url: str, fence: str) -> None:
    """Refuse a place without a cube, as a worker may see other folders than the client; once in a process and run."""
    open_cube(url)


@contextmanager
def _making() -> Iterator[None]:
    thread = threading.get_ident()
    _being_made.add(thread)
    try:
        yield
    finally:
        _being_made.discard(thread)


async def settle(limit_s: float) -> None:
    """Wait on a worker until it makes no shard, for at most `limit_s` seconds."""
    until = time.monotonic() + limit_s
    while _being_made and time.monotonic() < until:
        await asyncio.sleep(0.02)
