"""`make_here` makes the shards of a small run in threads of this process, without Dask.

To start two worker processes takes as long as to decode a gigabyte, and to import Dask as long as to make some shards.
Decoding, packing and hashing release Python's lock, so a few threads use the processors as well as processes do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace
from pathlib import Path

from ingest.plan.plan import Plan
from ingest.plan.task import ShardTask
from ingest.raster.limits import Access
from ingest.request.config import IngestConfig
from ingest.run.job import Job, Tally
from ingest.run.outcome import IngestEvent
from ingest.run.rows import note_state, take_error, take_row
from ingest.run.task import ingest_shard
from ingest.trust.presigned import signed_hrefs
from ingest.trust.waits import crew
from ingest.worker.slots import take_turns
from zarr_store.errors import AssetUnreadable, NoSpace
from zarr_store.ledger import LedgerRow

__all__ = ["is_small", "make_here"]

_SMALL_BYTES = 1 << 30
"""Bytes to read and to write of a small run: two cores decode them in about ten seconds."""
_CLUSTER = frozenset(
    {"scheduler", "cluster", "workers", "hosts", "memory", "threads_per_worker", "tls", "expose", "dashboard"}
)
"""Settings that ask for a cluster."""
_SETTLE_S = 5.0
"""Seconds that shards in progress have to finish, before an error that ends the run is raised."""


def is_small(plan: Plan, tasks: Sequence[ShardTask], config: IngestConfig) -> bool:
    """Return whether tasks need no worker processes: they read and write little, and no cluster is asked for.

    Args:
        plan: The plan, whose statistics estimate the bytes.
        tasks: The tasks that are left.
        config: The settings of the run.
    """
    if config.running.model_fields_set & _CLUSTER:
        return False
    total = 0.0
    for name in {task.collection for task in tasks}:
        stated = plan.statistics.get(name, {})
        try:
            whole = max(0, int(stated["bytes_to_read"])) + max(0, int(stated["bytes_to_write"]))
        except (KeyError, TypeError, ValueError, OverflowError):
            return False
        of_all, of_these = (
            sum(len(task.sources) for task in some if task.collection == name) for some in (plan.tasks, tasks)
        )
        total += whole * of_these / max(1, of_all)
    return total <= _SMALL_BYTES


def make_here(job: Job, tasks: Sequence[ShardTask], tally: Tally, tell: Callable[[IngestEvent], None]) -> None:
    """Make shards in threads of this process; errors and events are those of `ingest.run.work.make_shards`.

    There is no page to watch, as there is no scheduler.
    """
    threads = job.config.running.workers
    access = Access.of(job.config, job.typed)
    url = job.url if "://" in job.url else str(Path(job.url).absolute())
    waiting = iter(tasks)
    running: dict[Future[tuple[LedgerRow, int]], ShardTask] = {}
    # as on two workers: while one shard waits for the network or the disk, another is decoded
    with take_turns(threads), crew(2 * threads, "terrashard-shard") as pool:

        def submit(count: int) -> None:
            for task in (task for _, task in zip(range(count), waiting, strict=False)):
                signed = signed_hrefs(asset.href for source in task.sources for asset in source.assets)
                future = pool.submit(
                    ingest_shard,
                    task,
                    job.plan.recipe(task.collection),
                    url,
                    replace(access, signed_hrefs=signed) if signed else access,
                    fence=job.lock.token,
                    again=(task.collection, task.index) in job.again,
                )
                running[future] = task

        submit(3 * threads)
        try:
            while running:
                ended, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in ended:
                    task = running.pop(future)
                    error = future.exception()
                    row = take_error(error, task, job, tally) if error else take_row(*future.result(), task, job, tally)
                    note_state(tally, task, row, job)
                    why = tally.errors[-1] if row.state == "failed" and tally.errors else ""
                    tell(IngestEvent("shard", tally.ended, len(tasks), row=row, message=why))
                    submit(1)
        except (NoSpace, AssetUnreadable):
            # shards that are being written may finish first: without the lock their rows would not be written
            for future in running:
                future.cancel()
            wait(running, timeout=_SETTLE_S)
            raise
