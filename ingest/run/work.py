"""`make_shards` gives the shards of a run to a Dask cluster, a few more than its threads, and takes their rows.

Only this part of a run needs Dask: a run that finds nothing to do does not import it.
"""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from distributed import Client, as_completed
from distributed.client import FutureCancelledError
from distributed.comm.core import CommClosedError
from distributed.scheduler import KilledWorker

from ingest.plan.task import ShardTask
from ingest.raster.kept import kept_bytes
from ingest.raster.limits import Access
from ingest.run.cluster import count_in_flight, open_cluster, prepare
from ingest.run.dashboard import publish
from ingest.run.job import Job, Tally
from ingest.run.liveness import watch_workers
from ingest.run.outcome import IngestEvent
from ingest.run.record import RunRecord
from ingest.run.rows import note_state, take_error, take_row
from ingest.run.task import ingest_shard, settle
from ingest.trust.presigned import signed_hrefs
from ingest.worker.guard import memory_note
from zarr_store.errors import AccessError, AssetUnreadable, NoSpace
from zarr_store.ledger import LedgerRow

__all__ = ["make_shards"]

log = logging.getLogger(__name__)

_ANSWER_S = 10.0
"""Seconds to wait for the scheduler to return the row of a finished task."""
_SETTLE_S = 5.0
"""Seconds that shards in progress have to finish, before an error that ends the run is raised."""
_COUNT_S = 1.0
"""Seconds between two questions to the scheduler how many threads there are."""
_LENT_BYTES = 8 << 20
"""Bytes of files that are sent along with one task; Dask is not made for larger arguments."""


def make_shards(
    job: Job,
    tasks: Sequence[ShardTask],
    tally: Tally,
    client: Client | None,
    tell: Callable[[IngestEvent], None],
    record: RunRecord | None,
) -> None:
    """Make shards on the given client, or on a cluster that is started for them and ends with them."""
    with ExitStack() as stack:
        running = client or stack.enter_context(open_cluster(job.config, most=len(tasks)))
        if client is not None:  # the cluster of a config is prepared as it is opened
            prepare(client)
        with suppress(OSError):  # the first task reports a scheduler that is gone
            for name in sorted({task.collection for task in tasks}):
                if note := memory_note(running, job.plan.recipe(name).spec):
                    log.warning("%s: %s", name, note)
        page, tell = publish(running, job.plan, job.url, tally.states, tell)
        tell(IngestEvent("dashboard", 0, len(tasks), url=page, message="shards, rates and failures, live"))
        with record.watching(running) if record else nullcontext():
            _work(running, job, tasks, tally, tell)


def _submit(job: Job, client: Client, task: ShardTask, access: Access, key: str) -> Any:
    """Hand one shard to the cluster and return the future of its ledger row."""
    hrefs = [asset.href for source in task.sources for asset in source.assets]
    signed = signed_hrefs(hrefs)
    known = kept_bytes(os.getpid()).lend(hrefs, _LENT_BYTES)
    return client.submit(
        ingest_shard,
        task,
        job.plan.recipe(task.collection),
        # a worker has another working directory
        job.url if "://" in job.url else str(Path(job.url).absolute()),
        replace(access, signed_hrefs=signed) if signed else access,
        fence=job.lock.token,
        again=(task.collection, task.index) in job.again,
        known=known,
        key=key,
        pure=False,
        retries=1,
    )


def _work(
    client: Client, job: Job, tasks: Sequence[ShardTask], tally: Tally, tell: Callable[[IngestEvent], None]
) -> None:
    """Keep a bounded number of tasks in flight until all have ended."""
    config = job.config
    access = Access.of(config, job.typed)
    waiting = iter(tasks)
    by_key: dict[str, ShardTask] = {}
    token = uuid.uuid4().hex[:8]  # a scheduler remembers keys, also those that failed in an earlier run

    most, counted = count_in_flight(client, config), time.monotonic()

    def submit(count: int) -> list[Any]:
        futures = []
        for task in (task for _, task in zip(range(count), waiting, strict=False)):
            key = f"shard-{task.collection}-{'-'.join(map(str, task.index))}-{task.key[:8]}-{token}"
            by_key[key] = task
            futures.append(_submit(job, client, task, access, key))
        return futures

    queue = as_completed(submit(most), loop=client.loop)  # type: ignore[no-untyped-call]
    try:
        with watch_workers(client, queue, is_local=config.running.cluster == "local" and not config.running.scheduler):
            for future in queue:
                row = _take(future, by_key[future.key], job, tally)
                if row is None:
                    queue.add(future)  # type: ignore[no-untyped-call]
                    continue
                note_state(tally, by_key.pop(future.key), row, job)
                # before the next one begins: otherwise the scheduler may hold several that have ended
                future.release()
                why = tally.errors[-1] if row.state == "failed" and tally.errors else ""
                tell(IngestEvent("shard", tally.ended, len(tasks), row=row, message=why))
                if time.monotonic() - counted >= _COUNT_S:
                    most, counted = count_in_flight(client, config), time.monotonic()
                for fresh in submit(most - len(by_key)):
                    queue.add(fresh)  # type: ignore[no-untyped-call]
    except BaseException as error:
        with suppress(OSError):  # a scheduler that is gone has nothing to cancel
            client.cancel(list(queue.futures), force=True)  # type: ignore[no-untyped-call]
        if isinstance(error, NoSpace | AssetUnreadable):
            # shards that are being written may finish first: without the lock their rows would not be written
            client.run(settle, _SETTLE_S)
        raise


def _take(future: Any, task: ShardTask, job: Job, tally: Tally) -> LedgerRow | None:
    """Put the outcome of one task into the tally; None where its result is lost and the task runs again."""
    if not future.done():
        return None
    try:
        error = future.exception(timeout=_ANSWER_S)
        made = None if error else future.result(timeout=_ANSWER_S)
    except TimeoutError:
        return None
    except (FutureCancelledError, CommClosedError) as gone:
        raise AccessError(
            f"the Dask scheduler of the run that writes {job.url} is gone; what was written stays, and the same "
            "command "
            "continues from there"
        ) from gone
    if made is not None:
        row, pixels = made
        return take_row(row, pixels, task, job, tally)
    words = ""
    if isinstance(error, KilledWorker):
        words = (
            f"{task.collection} shard {task.index}: {error.allowed_failures + 1} workers died while they made it, so "
            "the run gave it up; if they ran out of memory, give --memory or plan with a --profile of smaller shards, "
            "then try it again with `terrashard retry-failed`"
        )
    return take_error(error, task, job, tally, words=words)
