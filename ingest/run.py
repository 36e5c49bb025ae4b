"""Running a plan: one Dask task per shard, each of which fills and writes a whole shard and its ledger row.

The ledger is the only memory of a run. A shard whose row says done under the same key is skipped, so a run that was
killed, interrupted or partly failed goes on where it was, and a finished one finds nothing to do.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from distributed import Client, as_completed

from ingest.access import Access, forbid_gdal_threads
from ingest.cluster import open_cluster
from ingest.config import IngestConfig
from ingest.plan import Plan
from ingest.shard import fill_shard
from ingest.task import Recipe, ShardTask
from zarr_store.errors import AssetUnreadable, CubeMismatch, NoSpace, Preempted, TerrashardError
from zarr_store.ledger import LedgerRow
from zarr_store.lock import CubeLock
from zarr_store.read import open_cube
from zarr_store.write import ShardWriter, create_cube, record_provenance

__all__ = ["IngestEvent", "IngestReport", "ingest_shard", "run"]

log = logging.getLogger(__name__)

_IN_FLIGHT_PER_THREAD = 2
"""One task running and one waiting per thread: workers never idle, and stopping early wastes at most these."""
_MOST_LISTED = 10


@dataclass(frozen=True)
class IngestEvent:
    """Something a person may want to see while a run goes on.

    Attributes:
        kind: "planned" (totals are known) · "dashboard" (`url`) · "shard" (one ended; `row`) · "finished".
        done: Shards that have ended in this run.
        total: Shards that this run has to make.
        row: Ledger row of the shard that ended; None where it could not be made.
        url: Of the dashboard.
        message: In words.
    """

    kind: Literal["planned", "dashboard", "shard", "finished"]
    done: int = 0
    total: int = 0
    row: LedgerRow | None = None
    url: str | None = None
    message: str = ""


@dataclass(frozen=True)
class IngestReport:
    """What a run did.

    Attributes:
        cube: Where the cube is.
        plan: Digest of the plan.
        written: Rows of shards made now with every source read.
        partial: Rows of shards with a source missing, made now or before.
        skipped: Rows of shards that were done before.
        failed: Rows of shards that could not be made, with nothing written.
        errors: Why, one line per failed shard.
        pending: Shards not tried, because of a limit.
        pixels_read: Source pixels asked for over all bands.
        seconds: Wall time.
    """

    cube: str
    plan: str
    written: tuple[LedgerRow, ...] = ()
    partial: tuple[LedgerRow, ...] = ()
    skipped: tuple[LedgerRow, ...] = ()
    failed: tuple[LedgerRow, ...] = ()
    errors: tuple[str, ...] = ()
    pending: int = 0
    pixels_read: int = 0
    seconds: float = 0.0

    @property
    def missing(self) -> dict[str, str]:
        """Scene and asset that could not be read → cause."""
        return {
            f"{source.item_id}, asset {source.asset}": source.reason or "unknown"
            for row in (*self.partial, *self.failed)
            for source in row.sources
            if source.state == "missing"
        }

    @property
    def exit_code(self) -> int:
        """0 when every shard that was asked for is complete, 3 when something is missing and can be tried again."""
        return 3 if self.partial or self.failed else 0

    def to_dict(self) -> dict[str, Any]:
        """JSON form; shards by index, without their statistics."""

        def rows(which: Sequence[LedgerRow]) -> list[dict[str, Any]]:
            return [
                {
                    "index": list(row.index),
                    "region": row.region.to_list(),
                    "sources": [asdict(source) for source in row.sources],
                }
                for row in which
            ]

        return {
            "cube": self.cube,
            "plan": self.plan,
            "written": rows(self.written),
            "partial": rows(self.partial),
            "skipped": len(self.skipped),
            "failed": rows(self.failed),
            "errors": list(self.errors),
            "missing": self.missing,
            "pending": self.pending,
            "pixels_read": self.pixels_read,
            "seconds": round(self.seconds, 3),
            "exit_code": self.exit_code,
        }

    def summary(self) -> str:
        """In words."""
        made = len(self.written)
        if not made and not self.partial and not self.failed and not self.pending:
            return f"{self.cube}: nothing to do, all {len(self.skipped)} shards are done (0 written)"
        counts = [
            f"{made} shards written",
            f"{len(self.partial)} with missing scenes",
            f"{len(self.skipped)} were done before",
            f"{len(self.failed)} failed",
        ]
        counts += [f"{self.pending} left for later"] if self.pending else []
        lines = [f"{self.cube}: {', '.join(counts)}; {self.seconds:.1f} s"]
        named = [f"missing: {scene}: {reason}" for scene, reason in self.missing.items()]
        named += [f"failed: {text}" for text in self.errors]
        lines += named[:_MOST_LISTED]
        if len(named) > _MOST_LISTED:
            lines.append(f"… and {len(named) - _MOST_LISTED} more")
        if self.exit_code:
            lines.append("the same command tries these again")
        return "\n".join(lines)


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
) -> IngestReport:
    """Make the cube of a plan, or what of it is not there yet.

    Args:
        plan: What to make.
        cube_url: Where; a cube of the same plan is continued.
        config: How to run: workers, memory, scheduler, limit, on_error. None for the defaults.
        client: A Dask client to use instead of the cluster of `config`.
        on_event: Told of the dashboard and of every shard that ends, in this thread.

    Raises:
        CubeMismatch: A cube of another plan is there.
        InvalidInput: Something else is there, or GDAL_NUM_THREADS is set.
        Locked: Another run writes to the cube.
        NoSpace: The disk is full; what was written stays, and the same call goes on.
        AssetUnreadable: With on_error="fail", at the first asset that cannot be read.
        Preempted: SIGTERM; the same call goes on.
    """
    started = time.monotonic()
    config = config or IngestConfig()
    tell = on_event or (lambda event: None)
    forbid_gdal_threads()
    url = str(Path(os.fspath(cube_url))) if "://" not in os.fspath(cube_url) else os.fspath(cube_url)
    create_cube(url, plan.specs, items=plan.item_tables(), provenance=plan.provenance())
    _check_same_plan(url, plan)
    tally = _Tally()
    with CubeLock(url, f"ingest of plan {plan.digest[:12]}"), _sigterm_raises():
        _sweep(url)
        todo = _what_is_left(plan, url, config, tally)
        now = todo[: config.limit] if config.limit else todo
        tell(
            IngestEvent(
                "planned", 0, len(now), message=f"{len(now)} shards to make, {len(plan.tasks) - len(todo)} done"
            )
        )
        if now:
            with ExitStack() as stack:
                running = client or stack.enter_context(open_cluster(config, most=len(now)))
                tell(IngestEvent("dashboard", 0, len(now), url=running.dashboard_link, message="Dask dashboard"))
                _work(running, plan, now, url, config, tally, tell)
            if open_cube(url).provenance != json.loads(json.dumps(plan.provenance())):
                # a file that is healed now has a verdict that it had not when the cube was begun
                record_provenance(url, plan.provenance())
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
    )
    tell(IngestEvent("finished", len(now), len(now), message=report.summary()))
    return report


def ingest_shard(task: ShardTask, recipe: Recipe, url: str, access: Access) -> tuple[LedgerRow, int]:
    """The Dask task: fill one shard, write it, and say so in the ledger. Running it twice leaves the same bytes."""
    filled = fill_shard(task, recipe, access=access)
    writer = ShardWriter(url, task.collection)
    try:
        row = writer.write(task.region, filled.arrays, key=task.key, sources=filled.outcomes)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT) and not isinstance(error, NoSpace):
            raise NoSpace(f"no space left for {url}; free some and repeat the command") from error
        raise
    return row, filled.pixels_read


def _check_same_plan(url: str, plan: Plan) -> None:
    made_by = open_cube(url).provenance
    if made_by.get("plan") == plan.digest:
        return
    there, asked = made_by.get("config", {}), plan.config
    changed = [
        f"{name}: {there.get(name, 'default')} → {asked.get(name, 'default')}"
        for name in sorted({*there, *asked})
        if there.get(name) != asked.get(name)
    ]
    what = "; ".join(changed) or "the sources differ: files or catalogue have changed since"
    raise CubeMismatch(
        f"{url} was made by plan {str(made_by.get('plan'))[:12]}, this is plan {plan.digest[:12]} (there → asked for): "
        f"{what}. Nothing was changed: write to another path, or repeat with the options the cube was made with"
    )


def _what_is_left(plan: Plan, url: str, config: IngestConfig, tally: _Tally) -> list[ShardTask]:
    """Tasks without a row that says done under their key; the others are put into the tally."""
    cube = open_cube(url)
    ledgers = {collection: cube.ledger(collection).rows() for collection in cube.collections}
    left = []
    for task in plan.tasks:
        row = ledgers[task.collection].get(task.index)
        if row is None or row.key != task.key or row.state == "failed":
            left.append(task)
        elif row.state == "done":
            tally.rows["skipped"].append(row)
        elif config.on_error == "skip":
            tally.rows["kept"].append(row)
        else:
            left.append(task)
    return left


def _work(
    client: Client,
    plan: Plan,
    tasks: Sequence[ShardTask],
    url: str,
    config: IngestConfig,
    tally: _Tally,
    tell: Callable[[IngestEvent], None],
) -> None:
    """Keep a bounded number of tasks in flight until all have ended."""
    access = replace(Access.of(config), sign=plan.config.get("sign", "none"))
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
                    ingest_shard, task, plan.recipe(task.collection), url, access, key=name, pure=False, retries=1
                )
            )
        return futures

    threads = max(1, sum(client.nthreads().values()))  # type: ignore[no-untyped-call]
    queue = as_completed(submit(threads * _IN_FLIGHT_PER_THREAD + 1))  # type: ignore[no-untyped-call]
    try:
        for future in queue:
            row = _take(future, by_key.pop(future.key), url, config, tally)
            tell(IngestEvent("shard", tally.ended, len(tasks), row=row))
            for fresh in submit(1):
                queue.add(fresh)  # type: ignore[no-untyped-call]
    except BaseException:
        client.cancel(list(queue.futures), force=True)  # type: ignore[no-untyped-call]
        raise


def _take(future: Any, task: ShardTask, url: str, config: IngestConfig, tally: _Tally) -> LedgerRow:
    """The outcome of one task into the tally."""
    error = future.exception()
    if error is None:
        made: tuple[LedgerRow, int] = future.result()
        row, pixels = made
        tally.pixels_read += pixels
        tally.rows[row.state].append(row)
        if row.state == "partial" and config.on_error == "fail":
            bad = next(source for source in row.sources if source.state == "missing")
            raise AssetUnreadable.of(bad.item_id, bad.asset or "?", bad.reason or "unknown", "--on-error fail")
        return row
    if isinstance(error, TerrashardError) or config.on_error == "fail":
        raise error
    text = f"{task.collection} shard {task.index}: {type(error).__name__}: {error}"
    log.warning("%s", text)
    row = ShardWriter(url, task.collection).fail(task.region, key=task.key, sources=())
    tally.rows["failed"].append(row)
    tally.errors.append(" ".join(text.split())[:300])
    return row


def _sweep(url: str) -> None:
    """Remove what a killed writer left half-written; the lock says that no other run is writing."""
    for pattern in ("*.partial", "*.__lock"):
        for path in Path(url).rglob(pattern):
            path.unlink(missing_ok=True)


def _sorted(rows: Sequence[LedgerRow]) -> tuple[LedgerRow, ...]:
    return tuple(sorted(rows, key=lambda row: row.index))


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """SIGTERM ends the run like an interrupt: tasks cancelled, cluster closed, lock released."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise Preempted("told to stop (SIGTERM); what was written stays, and the same command goes on from there")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
