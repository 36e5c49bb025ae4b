"""`Job`: the work of one run on a cube, and `Tally`: what has become of its shards."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ingest.plan.plan import Plan
from ingest.request.config import IngestConfig
from ingest.run.outcome import IngestReport
from zarr_store.ledger import LedgerRow, ShardIndex
from zarr_store.lock import CubeLock
from zarr_store.states import ShardStates

__all__ = ["Job", "Tally", "Which", "plain_url"]

Which = Literal["all", "absent", "unfinished"]
"""Shards that a run makes: all that are not done · those never written · those partial or failed."""


@dataclass
class Tally:
    """The shards of a run that have ended so far, by how they ended, and the states of all shards of the cube."""

    rows: dict[str, list[LedgerRow]] = field(
        default_factory=lambda: {"done": [], "partial": [], "failed": [], "skipped": [], "kept": [], "empty": []}
    )
    states: dict[str, ShardStates] = field(default_factory=dict)
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


@dataclass(frozen=True)
class Job:
    """The work of one run on a cube whose lock it holds.

    Attributes:
        plan: What the cube holds or is to hold.
        url: The cube.
        lock: The cube's lock, which the caller holds for as long as the job runs.
        config: Settings of the run: workers, memory, scheduler, limit, on_error.
        grow: Whether the plan may have more dates and items than the cube; they are added to the cube first.
        which: Choice among the shards that are not done.
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


def plain_url(url: str | os.PathLike[str]) -> str:
    """Make a path plain, without redundant parts; a URL stays as it is."""
    return str(Path(os.fspath(url))) if "://" not in os.fspath(url) else os.fspath(url)
