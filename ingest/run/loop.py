"""`run` makes the cube of a plan: each shard is filled and written by one task, and then its ledger row.

The ledger is the only memory of a run. A shard whose row says done under the same key is skipped, so a run that was
killed, interrupted or partly failed continues where it stopped, and a finished one finds nothing to do. A complete
shard is never replaced by one with gaps, and a task writes only while its run holds the lock of the cube.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ingest.plan.plan import Plan
from ingest.plan.stored import check_hrefs, keep_plan, kept_digest, resume_plan
from ingest.plan.task import ShardTask
from ingest.raster.access import forbid_gdal_threads
from ingest.raster.kept import kept_bytes
from ingest.request.config import IngestConfig
from ingest.run.here import is_small, make_here
from ingest.run.job import Job, Tally, Which, plain_url
from ingest.run.outcome import IngestEvent, IngestReport
from ingest.run.stopping import handle_stop_signals
from zarr_store.backends import open_store
from zarr_store.create import create_cube, record_provenance
from zarr_store.empty import keep_empty
from zarr_store.errors import CubeMismatch
from zarr_store.grow import grow_cube
from zarr_store.labels import write_cube_item
from zarr_store.ledger import Ledger, LedgerRow
from zarr_store.lock import CubeLock, read_token
from zarr_store.read import open_cube
from zarr_store.states import forget_states, keep_states
from zarr_store.strays import sweep_strays

if TYPE_CHECKING:
    from distributed import Client

    from ingest.run.record import RunRecord

__all__ = ["IngestEvent", "IngestReport", "Job", "Which", "plain_url", "run", "run_job"]


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
    """Make the cube of a plan, or the shards that it still lacks.

    Args:
        plan: The plan of the cube.
        cube_url: Where the cube goes; a cube of the same plan is continued.
        config: Settings of the run: workers, memory, scheduler, limit, on_error. None for the defaults.
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
    if job.judge:
        check_hrefs(job.plan, job.config, typed=job.typed, tasks=_what_is_left(job, _tally_of(job)))
    if record:
        record.plan = job.plan
    with handle_stop_signals():
        sweep_strays(job.url)  # left by the run before
        # the plan first: if the run ends here, the cube still knows what it was about to become
        keep_plan(job.url, job.plan)
        if job.grow:
            grow_cube(job.url, job.plan.specs, items=job.plan.item_tables(), provenance=job.plan.provenance())
        write_cube_item(job.url)
        tally = _tally_of(job)
        _list_empty(job, tally)
        todo = _what_is_left(job, tally)
        now = todo[: job.config.running.limit] if job.config.running.limit else todo
        done = len(job.plan.tasks) - len(todo)
        tell(IngestEvent("planned", 0, len(now), message=f"{len(now)} shards to make, {done} done"))
        if now:
            _make(job, now, tally, client, tell, record)
            sweep_strays(job.url)  # left by workers that ended during this run
            if open_cube(job.url).provenance != json.loads(json.dumps(job.plan.provenance())):
                # a file that was unreadable when the cube was begun may have a verdict now
                record_provenance(job.url, job.plan.provenance())
        store = open_store(job.url)
        for states in tally.states.values():
            keep_states(store, states)
        snapshot = store.commit(job.name, still_ours=lambda: read_token(store) == job.lock.token)
    report = tally.report(job, pending=len(todo) - len(now), seconds=time.monotonic() - started, snapshot=snapshot)
    tell(IngestEvent("finished", len(now), len(now), message=report.summary()))
    return report


def _make(
    job: Job,
    tasks: Sequence[ShardTask],
    tally: Tally,
    client: Client | None,
    tell: Callable[[IngestEvent], None],
    record: RunRecord | None,
) -> None:
    """Make shards in this process where they are few, else on the given client or a cluster."""
    for name in tally.states:
        forget_states(open_store(job.url), name)
    kept = kept_bytes(os.getpid())
    try:
        if client is None and record is None and not job.lock.took_over and is_small(job.plan, tasks, job.config):
            make_here(job, tasks, tally, tell)
        else:
            from ingest.run.work import make_shards  # Dask

            make_shards(job, tasks, tally, client, tell, record)
    finally:  # what planning read of their files
        for href in {asset.href for task in tasks for source in task.sources for asset in source.assets}:
            kept.drop(href)


def _check_same_plan(url: str, plan: Plan) -> None:
    made_by = open_cube(url).provenance
    kept = kept_digest(url) or plan.digest
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


def _tally_of(job: Job) -> Tally:
    """Begin a tally with the states of all shards as they are now."""
    cube = open_cube(job.url)
    return Tally(states={name: cube.states(name) for name in cube.collections})


def _list_empty(job: Job, tally: Tally) -> None:
    """List the shards that no scene reaches, which makes them complete; they have no objects and need no worker.

    The list is written before any shard is made: one that a new scene reaches is no longer in it when it is written.
    """
    if job.which == "unfinished":
        return
    store = open_store(job.url)
    for spec in job.plan.specs:
        states = tally.states[spec.collection]
        stored = Ledger(store, spec.collection).stored_indices()
        empty = [
            task
            for task in job.plan.tasks
            if task.collection == spec.collection and not task.sources and task.index not in stored
        ]
        new = [task for task in empty if not states.has_key(task.index, task.key)]
        keep_empty(store, spec, [(task.index, task.region, task.key) for task in empty])
        tally.rows["empty"] += [LedgerRow(task.index, task.region, task.key, "done", checksums={}) for task in new]
        tally.listed |= {(spec.collection, task.index) for task in new}
        for task in empty:
            states.put(task.index, task.region, task.key, "done")
        states.keep_only([*stored, *(task.index for task in empty)])  # a new scene may reach one that was empty


def _what_is_left(job: Job, tally: Tally) -> list[ShardTask]:
    """List the tasks that a job has to run; the others go into the tally, complete ones without their sources."""
    cube = open_cube(job.url)
    left = []
    for task in job.plan.tasks:
        states = tally.states[task.collection]
        state = states.state(task.index)
        if (task.collection, task.index) in job.again:
            left.append(task)
        elif not states.has_key(task.index, task.key):
            if job.which != "unfinished":
                left.append(task)
        elif state == "done":
            if (task.collection, task.index) not in tally.listed:
                tally.rows["skipped"].append(LedgerRow(task.index, task.region, task.key, "done"))
        elif job.which == "absent" or (state == "partial" and job.config.running.on_error == "skip"):
            row = cube.ledger(task.collection).get_stored(task.index)
            if row is not None:
                tally.rows["failed" if state == "failed" else "kept"].append(replace(row, stats=()))
        else:
            left.append(task)
    return left
