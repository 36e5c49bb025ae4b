"""`run` makes the cube of a plan: one Dask task per shard fills and writes the shard and its ledger row.

The ledger is the only memory of a run. A shard whose row says done under the same key is skipped, so a run that was
killed, interrupted or partly failed continues where it stopped, and a finished one finds nothing to do. A complete
shard is never replaced by one with gaps, and a task writes only while its run holds the lock of the cube.
"""

from __future__ import annotations

import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from distributed import Client, as_completed
from distributed.client import FutureCancelledError
from distributed.comm.core import CommClosedError
from distributed.scheduler import KilledWorker

from ingest.plan.plan import Plan
from ingest.plan.stored import PLAN_KEY, check_hrefs, keep_plan, resume_plan
from ingest.plan.task import ShardTask
from ingest.raster.access import forbid_gdal_threads
from ingest.raster.limits import Access
from ingest.request.config import IngestConfig
from ingest.run.cluster import count_in_flight, open_cluster, prepare
from ingest.run.dashboard import publish
from ingest.run.liveness import watch_workers
from ingest.run.outcome import IngestEvent, IngestReport
from ingest.run.record import RunRecord
from ingest.run.stopping import handle_stop_signals
from ingest.run.task import ingest_shard, settle
from ingest.trust.presigned import signed_hrefs
from ingest.trust.redact import redact_text
from ingest.worker.guard import memory_note
from zarr_store.backends import open_store
from zarr_store.create import create_cube, record_provenance
from zarr_store.empty import keep_empty
from zarr_store.errors import AccessError, AssetUnreadable, CubeMismatch, NoSpace, TerrashardError
from zarr_store.grow import grow_cube
from zarr_store.labels import write_cube_item
from zarr_store.ledger import LedgerRow, ShardIndex
from zarr_store.lock import CubeLock, read_token
from zarr_store.read import open_cube
from zarr_store.strays import sweep_strays
from zarr_store.write import ShardWriter

__all__ = ["IngestEvent", "IngestReport", "Job", "Which", "plain_url", "run", "run_job"]

log = logging.getLogger(__name__)


_ANSWER_S = 10.0
"""Seconds to wait for the scheduler to return the row of a finished task."""
_SETTLE_S = 5.0
"""Seconds that shards in progress have to finish, before an error that ends the run is raised."""

Which = Literal["all", "absent", "unfinished"]
"""Shards that a run makes: all that are not done · those never written · those partial or failed."""


@dataclass
class _Tally:
    """The shards of a run that have ended so far."""

    rows: dict[str, list[LedgerRow]] = field(
        default_factory=lambda: {"done": [], "partial": [], "failed": [], "skipped": [], "kept": [], "empty": []}
    )
    listed: set[tuple[str, ShardIndex]] = field(default_factory=set)
    errors: list[str] = field(default_factory=list)
    pixels_read: int = 0

    @property
    def ended(self) -> int:
        return sum(len(self.rows[state]) for state in ("done", "partial", "failed"))

    def report(self, job: Job, *, pending: int, seconds: float, snapshot: str | None) -> IngestReport:
        """Make the report of a job that has ended."""

        def rows(*states: str) -> tuple[LedgerRow, ...]:
            return tuple(sorted((row for state in states for row in self.rows[state]), key=lambda row: row.index))

        return IngestReport(
            cube=job.url,
            plan=job.plan.digest,
            written=rows("done", "empty"),
            partial=rows("partial", "kept"),
            skipped=rows("skipped"),
            failed=rows("failed"),
            errors=tuple(self.errors),
            pending=pending,
            pixels_read=self.pixels_read,
            seconds=seconds,
            snapshot=snapshot,
        )


def run(
    plan: Plan,
    cube_url: str | os.PathLike[str],
    *,
    config: IngestConfig | None = None,
    client: Client | None = None,
    on_event: Callable[[IngestEvent], None] | None = None,
    record: RunRecord | None = None,
    typed: str = "",
) -> IngestReport:
    """Make the cube of a plan, or those of its shards that are not there yet.

    Args:
        plan: The plan of the cube.
        cube_url: Where the cube goes; a cube of the same plan is continued.
        config: How to run: workers, memory, scheduler, limit, on_error. None for the defaults.
        client: A Dask client to use instead of the cluster of `config`.
        on_event: Called in this thread with the dashboard's address and with every shard that ends.
        record: Filled with what the report on the run needs.
        typed: SOURCE as the user gave it; its own host may have a private address.

    Raises:
        CubeMismatch: A cube of another plan is there.
        InvalidInput: Something else is there, or GDAL_NUM_THREADS is set.
        Locked: Another run writes to the cube.
        NoSpace: The disk is full; what was written stays, and the same call continues.
        AssetUnreadable: With on_error="fail", at the first asset that cannot be read.
        Preempted: SIGTERM came; the same call continues.
    """
    forbid_gdal_threads()
    url = plain_url(cube_url)
    kind = config.running.store if config else None
    plan = resume_plan(url, plan, kind)
    create_cube(url, plan.specs, items=plan.item_tables(), provenance=plan.provenance(), kind=kind)
    _check_same_plan(url, plan)
    with CubeLock(url, f"ingest of plan {plan.digest[:12]}") as lock:
        _check_same_plan(url, plan)  # another run may have added to it meanwhile
        job = Job(plan, url, lock, config or IngestConfig(), typed=typed)
        return run_job(job, client=client, on_event=on_event, record=record)


@dataclass(frozen=True)
class Job:
    """The work of one run on a cube whose lock it holds.

    Attributes:
        plan: What the cube holds or is to hold.
        url: The cube.
        lock: The cube's lock, which the caller holds for as long as the job runs.
        config: How to run: workers, memory, scheduler, limit, on_error.
        grow: Whether the plan may have more dates and items than the cube; they are added to the cube first.
        which: Which of the shards that are not done to make.
        again: (collection, index) of shards to make although they count as done.
        typed: SOURCE as the user gave it; its own host may have a private address.
        judge: Whether the plan comes from the cube. Then `config` and `typed` decide which of its files may be opened,
            before any is opened and before anything is written.
    """

    plan: Plan
    url: str
    lock: CubeLock
    config: IngestConfig = field(default_factory=IngestConfig)
    grow: bool = False
    which: Which = "all"
    again: frozenset[tuple[str, ShardIndex]] = frozenset()
    typed: str = ""
    judge: bool = False

    @property
    def name(self) -> str:
        """Message of the commit that ends the run."""
        return f"ingest of plan {self.plan.digest[:12]}"

    def submit(self, client: Client, task: ShardTask, access: Access, key: str) -> Any:
        """Hand one shard to the cluster and return the future of its ledger row."""
        signed = signed_hrefs(asset.href for source in task.sources for asset in source.assets)
        return client.submit(
            ingest_shard,
            task,
            self.plan.recipe(task.collection),
            # a worker has another working directory
            self.url if "://" in self.url else str(Path(self.url).absolute()),
            replace(access, signed_hrefs=signed) if signed else access,
            fence=self.lock.token,
            again=(task.collection, task.index) in self.again,
            key=key,
            pure=False,
            retries=1,
        )


def run_job(
    job: Job,
    *,
    client: Client | None = None,
    on_event: Callable[[IngestEvent], None] | None = None,
    record: RunRecord | None = None,
) -> IngestReport:
    """Make the missing shards of a cube whose lock is held; arguments and errors are those of `run`.

    Raises:
        InvalidInput: A file that a shard needs may not be opened.
    """
    started = time.monotonic()
    tell = on_event or (lambda event: None)
    forbid_gdal_threads()
    tally = _Tally()
    if job.judge:
        check_hrefs(job.plan, job.config, typed=job.typed, tasks=_what_is_left(job, _Tally()))
    if record:
        record.plan = job.plan
    with handle_stop_signals():
        sweep_strays(job.url)  # left by the run before
        # the plan first: if the run ends here, the cube still knows what it was about to become
        keep_plan(job.url, job.plan)
        if job.grow:
            grow_cube(job.url, job.plan.specs, items=job.plan.item_tables(), provenance=job.plan.provenance())
        write_cube_item(job.url)
        _list_empty(job, tally)
        todo = _what_is_left(job, tally)
        now = todo[: job.config.running.limit] if job.config.running.limit else todo
        done = len(job.plan.tasks) - len(todo)
        tell(IngestEvent("planned", 0, len(now), message=f"{len(now)} shards to make, {done} done"))
        if now:
            _make(job, now, tally, client, tell, record)
            sweep_strays(job.url)  # left by workers that ended during this run
            if open_cube(job.url).provenance != json.loads(json.dumps(job.plan.provenance())):
                # a file that can be read again has a verdict that it did not have when the cube was begun
                record_provenance(job.url, job.plan.provenance())
        store = open_store(job.url)
        snapshot = store.commit(job.name, still_ours=lambda: read_token(store) == job.lock.token)
    report = tally.report(job, pending=len(todo) - len(now), seconds=time.monotonic() - started, snapshot=snapshot)
    tell(IngestEvent("finished", len(now), len(now), message=report.summary()))
    return report


def _make(
    job: Job,
    tasks: Sequence[ShardTask],
    tally: _Tally,
    client: Client | None,
    tell: Callable[[IngestEvent], None],
    record: RunRecord | None,
) -> None:
    """Make shards on the given client, or on a cluster that is started for them and ends with them."""
    with ExitStack() as stack:
        running = client or stack.enter_context(open_cluster(job.config, most=len(tasks)))
        if client is not None:  # the cluster of a config is prepared as it is opened
            prepare(client)
        cube = open_cube(job.url)
        known = {name: cube.ledger(name).rows() for name in cube.collections}
        with suppress(OSError):  # the first task reports a scheduler that is gone
            for name in sorted({task.collection for task in tasks}):
                if note := memory_note(running, job.plan.recipe(name).spec):
                    log.warning("%s: %s", name, note)
        page, tell = publish(running, job.plan, job.url, known, tell)
        tell(IngestEvent("dashboard", 0, len(tasks), url=page, message="shards, rates and failures, live"))
        with record.watching(running) if record else nullcontext():
            _work(running, job, tasks, tally, tell)


def plain_url(url: str | os.PathLike[str]) -> str:
    """Make a path plain, without redundant parts; a URL stays as it is."""
    return str(Path(os.fspath(url))) if "://" not in os.fspath(url) else os.fspath(url)


def _check_same_plan(url: str, plan: Plan) -> None:
    made_by = open_cube(url).provenance
    kept = json.loads(open_store(url).read(PLAN_KEY) or b"{}").get("digest", plan.digest)
    if made_by.get("plan") == plan.digest == kept:
        return
    if kept not in (plan.digest, made_by.get("plan")):
        raise CubeMismatch(
            f"{url}: a run that added scenes to this cube was interrupted, and nothing was changed now; repeat that "
            f"command (--append or --refresh), or finish it with `terrashard repair {url}`"
        )
    there, asked = made_by.get("config", {}), plan.config
    changed = [
        f"{name}: {there.get(name, 'default')} → {asked.get(name, 'default')}"
        for name in sorted({*there, *asked})
        if there.get(name) != asked.get(name)
    ]
    what = "; ".join(changed) or "the options are the same, but the files or the catalogue have changed since"
    raise CubeMismatch(
        f"{url} was made by plan {str(made_by.get('plan'))[:12]}, and this is plan {plan.digest[:12]} (cube → asked "
        f"for): {what}. Nothing was changed: write to another path, repeat the command with the options of the cube, "
        "or add new scenes to it with --append"
    )


def _list_empty(job: Job, tally: _Tally) -> None:
    """List the shards that no scene reaches, which makes them complete; they have no objects and need no worker.

    The list is written before any shard is made: one that a new scene reaches is no longer in it when it is written.
    """
    if job.which == "unfinished":
        return
    cube, store = open_cube(job.url), open_store(job.url)
    for spec in job.plan.specs:
        ledger = cube.ledger(spec.collection)
        stored, before = ledger.stored_rows(), ledger.rows()
        empty = [
            task
            for task in job.plan.tasks
            if task.collection == spec.collection and not task.sources and task.index not in stored
        ]
        keep_empty(store, spec, [(task.index, task.region, task.key) for task in empty])
        rows = ledger.rows()
        new = [task for task in empty if task.index not in before or before[task.index].key != task.key]
        tally.rows["empty"] += [rows[task.index] for task in new]
        tally.listed |= {(spec.collection, task.index) for task in new}


def _what_is_left(job: Job, tally: _Tally) -> list[ShardTask]:
    """List the tasks that a job has to run; the ledger rows of the others go into the tally."""
    cube = open_cube(job.url)
    ledgers = {collection: cube.ledger(collection).rows() for collection in cube.collections}
    left = []
    for task in job.plan.tasks:
        row = ledgers[task.collection].get(task.index)
        if (task.collection, task.index) in job.again:
            left.append(task)
        elif row is None or row.key != task.key:
            if job.which != "unfinished":
                left.append(task)
        elif row.state == "done":
            if (task.collection, task.index) not in tally.listed:
                tally.rows["skipped"].append(row)
        elif job.which == "absent" or (row.state == "partial" and job.config.running.on_error == "skip"):
            tally.rows["failed" if row.state == "failed" else "kept"].append(row)
        else:
            left.append(task)
    return left


def _work(
    client: Client, job: Job, tasks: Sequence[ShardTask], tally: _Tally, tell: Callable[[IngestEvent], None]
) -> None:
    """Keep a bounded number of tasks in flight until all have ended."""
    config = job.config
    access = Access.of(config, job.typed)
    waiting = iter(tasks)
    by_key: dict[str, ShardTask] = {}
    token = uuid.uuid4().hex[:8]  # a scheduler remembers keys, also those that failed in an earlier run

    def submit(count: int) -> list[Any]:
        futures = []
        for task in (task for _, task in zip(range(count), waiting, strict=False)):
            key = f"shard-{task.collection}-{'-'.join(map(str, task.index))}-{task.key[:8]}-{token}"
            by_key[key] = task
            futures.append(job.submit(client, task, access, key))
        return futures

    queue = as_completed(submit(count_in_flight(client, config)), loop=client.loop)  # type: ignore[no-untyped-call]
    try:
        with watch_workers(client, queue, is_local=config.running.cluster == "local" and not config.running.scheduler):
            for future in queue:
                row = _take(future, by_key[future.key], job, tally)
                if row is None:
                    queue.add(future)  # type: ignore[no-untyped-call]
                    continue
                del by_key[future.key]
                why = tally.errors[-1] if row.state == "failed" and tally.errors else ""
                tell(IngestEvent("shard", tally.ended, len(tasks), row=row, message=why))
                for fresh in submit(count_in_flight(client, config) - len(by_key)):
                    queue.add(fresh)  # type: ignore[no-untyped-call]
    except BaseException as error:
        with suppress(OSError):  # a scheduler that is gone has nothing to cancel
            client.cancel(list(queue.futures), force=True)  # type: ignore[no-untyped-call]
        if isinstance(error, NoSpace | AssetUnreadable):
            # shards that are being written may finish first: without the lock their rows would not be written
            client.run(settle, _SETTLE_S)
        raise


def _take(future: Any, task: ShardTask, job: Job, tally: _Tally) -> LedgerRow | None:
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
        row: LedgerRow = made[0]
        pixels: int = made[1]
        tally.pixels_read += pixels
        tally.rows[row.state].append(row)
        if row.state != "done":
            bad = next(source for source in row.sources if source.state == "missing")
            if job.config.running.on_error == "fail":
                raise AssetUnreadable.of(bad.item_id, bad.asset or "?", bad.reason or "unknown", "--on-error fail")
            if row.state == "failed":
                tally.errors.append(
                    f"{task.collection} shard {task.index} stays as it was, because asset {bad.asset} of scene "
                    f"{bad.item_id} could not be read for its new content"
                )
        return row
    if isinstance(error, TerrashardError) or job.config.running.on_error == "fail":
        raise error
    text = redact_text(f"{task.collection} shard {task.index}: {type(error).__name__}: {error}")
    if isinstance(error, KilledWorker):
        text = (
            f"{task.collection} shard {task.index}: {error.allowed_failures + 1} workers died while they made it, so "
            "the run gave it up; if they ran out of memory, give --memory or plan with a --profile of smaller shards, "
            "then try it again with `terrashard retry-failed`"
        )
    log.warning("%s", text)
    row = ShardWriter(job.url, task.collection).fail(task.region, key=task.key, sources=())
    tally.rows["failed"].append(row)
    tally.errors.append(" ".join(text.split())[:300])
    return row
