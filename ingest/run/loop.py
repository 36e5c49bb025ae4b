"""Running a plan: one Dask task per shard, each of which fills and writes a whole shard and its ledger row.

The ledger is the only memory of a run. A shard whose row says done under the same key is skipped, so a run that was
killed, interrupted or partly failed goes on where it was, and a finished one finds nothing to do. A shard that is
complete is never replaced by one with gaps, and a task writes only while its run holds the lock of the cube.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from distributed import Client, as_completed
from distributed.client import FutureCancelledError
from distributed.comm.core import CommClosedError
from distributed.scheduler import KilledWorker

from ingest.plan.plan import Plan
from ingest.plan.stored import PLAN_KEY, begun_plan, check_hrefs, keep_plan
from ingest.plan.task import Recipe, ShardTask
from ingest.raster.access import Access, forbid_gdal_threads
from ingest.request.config import IngestConfig
from ingest.run.cluster import in_flight, open_cluster, prepare
from ingest.run.dashboard import publish
from ingest.run.liveness import attended
from ingest.run.outcome import IngestEvent, IngestReport
from ingest.run.record import RunRecord
from ingest.run.shard import fill_shard
from ingest.run.stopping import stoppable
from ingest.trust.hrefs import is_url
from ingest.trust.redact import redact_text
from ingest.worker.guard import memory_note
from ingest.worker.meters import stage
from ingest.worker.slots import computing, in_seat
from zarr_store.backends import open_store
from zarr_store.crash import crashpoint
from zarr_store.create import create_cube, record_provenance
from zarr_store.errors import AccessError, AssetUnreadable, CubeMismatch, NoSpace, TerrashardError
from zarr_store.grow import grow_cube
from zarr_store.ledger import LedgerRow, ShardIndex
from zarr_store.lock import CubeLock, read_token
from zarr_store.read import open_cube
from zarr_store.write import ShardWriter

__all__ = ["IngestEvent", "IngestReport", "Which", "ingest_shard", "run", "run_locked"]

log = logging.getLogger(__name__)


_ANSWER_S = 10.0
"""Of the scheduler, for a row of a task that has ended."""
_SETTLE_S = 5.0
_being_made: set[int] = set()
"""Shards that this process makes at the moment, by thread."""

Which = Literal["all", "absent", "unfinished"]
"""Shards that a run makes: all that are not done · those that were never written · those that are partial or failed."""


@dataclass
class _Tally:
    """What has ended so far."""

    rows: dict[str, list[LedgerRow]] = field(
        default_factory=lambda: {"done": [], "partial": [], "failed": [], "skipped": [], "kept": []}
    )
    errors: list[str] = field(default_factory=list)
    pixels_read: int = 0

    @property
    def ended(self) -> int:
        return sum(len(self.rows[state]) for state in ("done", "partial", "failed"))


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
    """Make the cube of a plan, or what of it is not there yet.

    Args:
        plan: What to make.
        cube_url: Where; a cube of the same plan is continued.
        config: How to run: workers, memory, scheduler, limit, on_error. None for the defaults.
        client: A Dask client to use instead of the cluster of `config`.
        on_event: Told of the dashboard and of every shard that ends, in this thread.
        record: Filled with what the report on the run needs.
        typed: SOURCE as the user gave it: its own host may be a private one.

    Raises:
        CubeMismatch: A cube of another plan is there.
        InvalidInput: Something else is there, or GDAL_NUM_THREADS is set.
        Locked: Another run writes to the cube.
        NoSpace: The disk is full; what was written stays, and the same call goes on.
        AssetUnreadable: With on_error="fail", at the first asset that cannot be read.
        Preempted: SIGTERM; the same call goes on.
    """
    forbid_gdal_threads()
    url = _plain_url(cube_url)
    kind = config.store if config else None
    plan = begun_plan(url, plan, kind)
    create_cube(url, plan.specs, items=plan.item_tables(), provenance=plan.provenance(), kind=kind)
    _check_same_plan(url, plan)
    with CubeLock(url, f"ingest of plan {plan.digest[:12]}") as lock:
        _check_same_plan(url, plan)  # another run may have added to it meanwhile
        return run_locked(plan, url, lock, config=config, client=client, on_event=on_event, record=record, typed=typed)


def run_locked(
    plan: Plan,
    cube_url: str | os.PathLike[str],
    lock: CubeLock,
    *,
    config: IngestConfig | None = None,
    client: Client | None = None,
    on_event: Callable[[IngestEvent], None] | None = None,
    grow: bool = False,
    which: Which = "all",
    again: Collection[tuple[str, ShardIndex]] = (),
    record: RunRecord | None = None,
    typed: str = "",
    judge: bool = False,
) -> IngestReport:
    """As `run`, for a cube that exists and whose lock is held.

    Args:
        plan: What the cube holds or is to hold.
        cube_url: The cube.
        lock: Held by the caller.
        config: How to run.
        client: A Dask client to use.
        on_event: As for `run`.
        grow: Whether the plan may have more dates and items than the cube, which then gets them first.
        which: Of the shards that are not done, those to make.
        again: (collection, index) of shards to make although they count as done.
        record: As for `run`.
        typed: As for `run`.
        judge: The plan is the one that the cube keeps: its files are judged by `config` and `typed` before any is
            opened and before anything is written.

    Raises:
        InvalidInput: A file of a shard that is to be made may not be opened.
    """
    started = time.monotonic()
    config = config or IngestConfig()
    tell = on_event or (lambda event: None)
    forbid_gdal_threads()
    url = _plain_url(cube_url)
    tally = _Tally()
    access = Access.of(config, typed)
    if judge:
        left = _what_is_left(plan, url, config, _Tally(), which, frozenset(again))
        check_hrefs(plan, config, typed=typed, tasks=left)
    if record:
        record.plan = plan
    with stoppable():
        _sweep(url)
        # the plan first: if nothing more gets done, the cube still knows what it was about to become
        keep_plan(url, plan)
        if grow:
            grow_cube(url, plan.specs, items=plan.item_tables(), provenance=plan.provenance())
        todo = _what_is_left(plan, url, config, tally, which, frozenset(again))
        now = todo[: config.limit] if config.limit else todo
        tell(
            IngestEvent(
                "planned", 0, len(now), message=f"{len(now)} shards to make, {len(plan.tasks) - len(todo)} done"
            )
        )
        if now:
            with ExitStack() as stack:
                running = client or stack.enter_context(open_cluster(config, most=len(now)))
                if client is not None:  # the cluster of a config is prepared as it is opened
                    prepare(client)
                known = {name: open_cube(url).ledger(name).rows() for name in open_cube(url).collections}
                with suppress(OSError):  # a scheduler that is gone is said by the first task
                    for name in sorted({task.collection for task in now}):
                        if note := memory_note(running, plan.recipe(name).spec):
                            log.warning("%s: %s", name, note)
                page, tell = publish(running, plan, url, known, tell)
                tell(IngestEvent("dashboard", 0, len(now), url=page, message="shards, rates and failures, live"))
                with record.watching(running) if record else nullcontext():
                    at = _for_workers(url)
                    _work(running, plan, now, at, config, access, tally, tell, fence=lock.token, again=frozenset(again))
            _sweep(url)
            if open_cube(url).provenance != json.loads(json.dumps(plan.provenance())):
                # a file that is healed now has a verdict that it had not when the cube was begun
                record_provenance(url, plan.provenance())
        store = open_store(url)
        snapshot = store.commit(
            f"ingest of plan {plan.digest[:12]}", still_ours=lambda: read_token(store) == lock.token
        )
    report = IngestReport(
        cube=url,
        plan=plan.digest,
        written=_sorted(tally.rows["done"]),
        partial=_sorted(tally.rows["partial"] + tally.rows["kept"]),
        skipped=_sorted(tally.rows["skipped"]),
        failed=_sorted(tally.rows["failed"]),
        errors=tuple(tally.errors),
        pending=len(todo) - len(now),
        pixels_read=tally.pixels_read,
        seconds=time.monotonic() - started,
        snapshot=snapshot,
    )
    tell(IngestEvent("finished", len(now), len(now), message=report.summary()))
    return report


def ingest_shard(
    task: ShardTask, recipe: Recipe, url: str, access: Access, *, fence: str | None = None, again: bool = False
) -> tuple[LedgerRow, int]:
    """The Dask task: fill one shard, write it, and say so in the ledger. Running it twice leaves the same bytes.

    A task that ran already (its worker died before it could tell, or it was stolen) reads nothing. Where the shard is
    complete and this time a scene cannot be read, it stays as it is and the row that is returned says failed.

    Args:
        task: The shard.
        recipe: Of its collection.
        url: The cube.
        access: Limits of reading.
        fence: Token of the run's lock; nothing is written once the run has lost it.
        again: Make the shard although its row says done.

    Returns:
        The shard's row, and how many source pixels were asked for.
    """
    remote = any(is_url(asset.href) for source in task.sources for asset in source.assets)

    def make(give_way: Callable[[], None]) -> tuple[LedgerRow, int]:
        with _making():
            return _make_shard(task, recipe, url, access, fence, again, give_way)

    return in_seat(make, remote=remote)


def _make_shard(
    task: ShardTask,
    recipe: Recipe,
    url: str,
    access: Access,
    fence: str | None,
    again: bool,
    give_way: Callable[[], None],
) -> tuple[LedgerRow, int]:
    before = open_cube(url).ledger(task.collection).get(task.index)
    if before is not None and before.state == "done" and before.key == task.key and not again:
        return before, 0
    filled = fill_shard(task, recipe, access=access)
    if before is not None and before.state == "done" and any(s.state == "missing" for s in filled.outcomes):
        return LedgerRow(task.index, task.region, task.key, "failed", filled.outcomes), filled.pixels_read
    crashpoint(f"filled {task.index}")
    writer, pixels_read = ShardWriter(url, task.collection, fence=fence), filled.pixels_read
    try:
        with stage("write", sum(array.nbytes for array in filled.arrays.values())):
            with computing():
                packed = writer.pack(task.region, filled.arrays, key=task.key, sources=filled.outcomes)
            del filled  # its memory is for the next shard, which begins now
            give_way()
            row = packed.finish()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT) and not isinstance(error, NoSpace):
            raise NoSpace(f"no space left for {url}; free some and repeat the command") from error
        raise
    return row, pixels_read


def _plain_url(url: str | os.PathLike[str]) -> str:
    return str(Path(os.fspath(url))) if "://" not in os.fspath(url) else os.fspath(url)


def _for_workers(url: str) -> str:
    """The cube as workers find it, whose working directory is not this one's."""
    return url if "://" in url else str(Path(url).absolute())


def _check_same_plan(url: str, plan: Plan) -> None:
    made_by = open_cube(url).provenance
    kept = json.loads(open_store(url).read(PLAN_KEY) or b"{}").get("digest", plan.digest)
    if made_by.get("plan") == plan.digest == kept:
        return
    if kept not in (plan.digest, made_by.get("plan")):
        raise CubeMismatch(
            f"{url}: adding scenes to this cube was interrupted; repeat that command (--append or --refresh), or "
            f"`terrashard repair {url}` finishes it. Nothing was changed"
        )
    there, asked = made_by.get("config", {}), plan.config
    changed = [
        f"{name}: {there.get(name, 'default')} → {asked.get(name, 'default')}"
        for name in sorted({*there, *asked})
        if there.get(name) != asked.get(name)
    ]
    what = "; ".join(changed) or "the sources differ: files or catalogue have changed since"
    raise CubeMismatch(
        f"{url} was made by plan {str(made_by.get('plan'))[:12]}, this is plan {plan.digest[:12]} (there → asked for): "
        f"{what}. Nothing was changed: write to another path, repeat with the options the cube was made with, or "
        "add to it what is new with --append"
    )


def _what_is_left(
    plan: Plan,
    url: str,
    config: IngestConfig,
    tally: _Tally,
    which: Which,
    again: frozenset[tuple[str, ShardIndex]],
) -> list[ShardTask]:
    """Tasks that this run is to make; the rows of the others are put into the tally."""
    cube = open_cube(url)
    ledgers = {collection: cube.ledger(collection).rows() for collection in cube.collections}
    left = []
    for task in plan.tasks:
        row = ledgers[task.collection].get(task.index)
        if (task.collection, task.index) in again:
            left.append(task)
        elif row is None or row.key != task.key:
            if which != "unfinished":
                left.append(task)
        elif row.state == "done":
            tally.rows["skipped"].append(row)
        elif which == "absent" or (row.state == "partial" and config.on_error == "skip"):
            tally.rows["failed" if row.state == "failed" else "kept"].append(row)
        else:
            left.append(task)
    return left


def _work(
    client: Client,
    plan: Plan,
    tasks: Sequence[ShardTask],
    url: str,
    config: IngestConfig,
    access: Access,
    tally: _Tally,
    tell: Callable[[IngestEvent], None],
    *,
    fence: str,
    again: frozenset[tuple[str, ShardIndex]],
) -> None:
    """Keep a bounded number of tasks in flight until all have ended."""
    waiting = iter(tasks)
    by_key: dict[str, ShardTask] = {}
    token = uuid.uuid4().hex[:8]  # a scheduler remembers keys, also those that failed in an earlier run

    def submit(count: int) -> list[Any]:
        futures = []
        for task in (task for _, task in zip(range(count), waiting, strict=False)):
            name = f"shard-{task.collection}-{'-'.join(map(str, task.index))}-{task.key[:8]}-{token}"
            by_key[name] = task
            futures.append(
                client.submit(
                    ingest_shard,
                    task,
                    plan.recipe(task.collection),
                    url,
                    access,
                    fence=fence,
                    again=(task.collection, task.index) in again,
                    key=name,
                    pure=False,
                    retries=1,
                )
            )
        return futures

    queue = as_completed(submit(in_flight(client, config)), loop=client.loop)  # type: ignore[no-untyped-call]
    try:
        with attended(client, queue, own=config.cluster == "local" and not config.scheduler):
            for future in queue:
                row = _take(future, by_key[future.key], url, config, tally)
                if row is None:
                    queue.add(future)  # type: ignore[no-untyped-call]
                    continue
                del by_key[future.key]
                why = tally.errors[-1] if row.state == "failed" and tally.errors else ""
                tell(IngestEvent("shard", tally.ended, len(tasks), row=row, message=why))
                for fresh in submit(in_flight(client, config) - len(by_key)):
                    queue.add(fresh)  # type: ignore[no-untyped-call]
    except BaseException as error:
        with suppress(OSError):  # a scheduler that is gone has nothing to cancel
            client.cancel(list(queue.futures), force=True)  # type: ignore[no-untyped-call]
        if isinstance(error, NoSpace | AssetUnreadable):
            # shards that are being written are worth the moment: without the lock their rows are not written
            client.run(_settle, _SETTLE_S)
        raise


@contextmanager
def _making() -> Iterator[None]:
    thread = threading.get_ident()
    _being_made.add(thread)
    try:
        yield
    finally:
        _being_made.discard(thread)


async def _settle(limit_s: float) -> None:
    """On a worker: wait until no shard is being made, but not for long."""
    until = time.monotonic() + limit_s
    while _being_made and time.monotonic() < until:
        await asyncio.sleep(0.02)


def _take(future: Any, task: ShardTask, url: str, config: IngestConfig, tally: _Tally) -> LedgerRow | None:
    """The outcome of one task into the tally; None where it went with its worker, and the task runs again."""
    if not future.done():
        return None
    try:
        error = future.exception(timeout=_ANSWER_S)
        made = None if error else future.result(timeout=_ANSWER_S)
    except TimeoutError:
        return None
    except (FutureCancelledError, CommClosedError) as gone:
        raise AccessError(
            f"the Dask scheduler that {url} was written with is gone; what was written stays, and the same command "
            "goes on from there"
        ) from gone
    if made is not None:
        row: LedgerRow = made[0]
        pixels: int = made[1]
        tally.pixels_read += pixels
        tally.rows[row.state].append(row)
        if row.state != "done":
            bad = next(source for source in row.sources if source.state == "missing")
            if config.on_error == "fail":
                raise AssetUnreadable.of(bad.item_id, bad.asset or "?", bad.reason or "unknown", "--on-error fail")
            if row.state == "failed":
                tally.errors.append(
                    f"{task.collection} shard {task.index} stays as it was: scene {bad.item_id}, asset {bad.asset} "
                    "could not be read for its new content"
                )
        return row
    if isinstance(error, TerrashardError) or config.on_error == "fail":
        raise error
    text = redact_text(f"{task.collection} shard {task.index}: {type(error).__name__}: {error}")
    if isinstance(error, KilledWorker):
        text = (
            f"{task.collection} shard {task.index}: it ended {error.allowed_failures + 1} workers, so it is left "
            "alone; if they ran out of memory, give --memory, or plan with a --profile of smaller shards; `terrashard "
            "retry-failed` tries it again"
        )
    log.warning("%s", text)
    row = ShardWriter(url, task.collection).fail(task.region, key=task.key, sources=())
    tally.rows["failed"].append(row)
    tally.errors.append(" ".join(text.split())[:300])
    return row


def _sweep(url: str) -> None:
    """Remove what a killed writer left half-written; the lock says that no other run is writing.

    Before a run: of the run before. After its last shard: of workers that ended while it went on. One that is cut off
    and writes still finds its file gone, and fails for nobody.
    """
    for folder, _, files in os.walk(url):
        for name in files:
            if name.endswith((".partial", ".__lock")):
                Path(folder, name).unlink(missing_ok=True)


def _sorted(rows: Sequence[LedgerRow]) -> tuple[LedgerRow, ...]:
    return tuple(sorted(rows, key=lambda row: row.index))
