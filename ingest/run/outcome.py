"""`IngestEvent` is what a run reports while it works, `IngestReport` what it returns at its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from zarr_store.ledger import LedgerRow
from zarr_store.notebook import facts_table
from zarr_store.printable import one_line

__all__ = ["IngestEvent", "IngestReport"]

_MOST_LISTED = 10
"""Largest number of missing scenes and errors in a summary."""


@dataclass(frozen=True)
class IngestEvent:
    """One step of a run that a person may want to see.

    Attributes:
        kind: "planned" (totals are known) · "dashboard" (see `url`) · "shard" (one ended, see `row`) · "finished".
        done: Shards that have ended in this run.
        total: Shards that this run has to make.
        row: Ledger row of the shard that ended; None where it could not be made.
        url: Address of the dashboard.
        message: The event in words.

    Example:
        >>> import ingest
        >>> plan = ingest.make_plan("world/catalog.json", collections=["sentinel-2-l2a"], bands=["red", "nir"])
        >>> report = ingest.run_plan(plan, "cube.zarr", on_event=lambda event: print(event.kind, event.message))
        planned 0 shards to make, 2 done
        finished cube.zarr: nothing to do, all 2 shards are done (0 written)
    """

    kind: Literal["planned", "dashboard", "shard", "finished"]
    done: int = 0
    total: int = 0
    row: LedgerRow | None = None
    url: str | None = None
    message: str = ""


@dataclass(frozen=True)
class IngestReport:
    """The result of a run, shard by shard.

    Attributes:
        cube: Path or URL of the cube.
        plan: Digest of the plan.
        written: Rows of shards made now, with every source read; the statistics of chunks stay in the ledger.
        partial: Rows of shards with a source missing, made now or before.
        skipped: Rows of shards that were done before, without their sources, checksums and statistics.
        failed: Rows of shards that could not be made, with nothing written.
        errors: Reasons why shards failed, one line each.
        pending: Number of shards that were not tried because of a limit.
        pixels_read: Number of pixels that were read from files, over all bands and classes.
        seconds: Wall time of the run.
        snapshot: Id of the snapshot that the run committed, in a store that has snapshots.

    Example:
        >>> import ingest
        >>> plan = ingest.make_plan("world/catalog.json", collections=["sentinel-2-l2a"], bands=["red", "nir"])
        >>> report = ingest.run_plan(plan, "cube.zarr")
        >>> len(report.written), report.missing, report.exit_code
        (0, {}, 0)
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
    snapshot: str | None = None

    def __repr__(self) -> str:
        counts = [f"{len(rows)} {state}" for state, rows in self._counted()]
        counts += [f"{self.pending} left for later"] if self.pending else []
        return f"<IngestReport {self.cube}: {', '.join(counts)}>"

    def _repr_html_(self) -> str:
        missing = [f"{scene}: {reason}" for scene, reason in self.missing.items()]
        facts = [
            *((state, len(rows)) for state, rows in self._counted()),
            ("left for later", self.pending or ""),
            ("source pixels", f"{self.pixels_read:,}"),
            ("seconds", f"{self.seconds:.1f}"),
            ("missing", "\n".join(missing[:_MOST_LISTED])),
            ("errors", "\n".join(self.errors[:_MOST_LISTED])),
        ]
        return facts_table(f"Ingest of {self.cube}", facts)

    def _counted(self) -> tuple[tuple[str, tuple[LedgerRow, ...]], ...]:
        return (
            ("written", self.written),
            ("partial", self.partial),
            ("done before", self.skipped),
            ("failed", self.failed),
        )

    @property
    def empty(self) -> int:
        """Number of shards made now that no scene reaches; they are complete and have no file."""
        return sum(not row.sources and not row.checksums for row in self.written)

    @property
    def missing(self) -> dict[str, str]:
        """Each scene and asset that could not be read, with the cause."""
        return {
            f"{source.item_id}, asset {source.asset}": source.reason or "unknown"
            for row in (*self.partial, *self.failed)
            for source in row.sources
            if source.state == "missing"
        }

    @property
    def unsupported(self) -> tuple[str, ...]:
        """The scenes and assets of `missing` that no repeated run can read: their files are of an unsupported form."""
        return tuple(
            dict.fromkeys(
                f"{source.item_id}, asset {source.asset}"
                for row in (*self.partial, *self.failed)
                for source in row.sources
                if source.state == "missing" and source.final
            )
        )

    @property
    def exit_code(self) -> int:
        """0 if every shard that was asked for is complete, 3 if some are partial or failed."""
        return 3 if self.partial or self.failed else 0

    def to_dict(self) -> dict[str, Any]:
        """Convert to values that can be written as JSON; shards by index, without their statistics."""

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
            "unsupported": list(self.unsupported),
            "pending": self.pending,
            "pixels_read": self.pixels_read,
            "seconds": round(self.seconds, 3),
            **({"snapshot": self.snapshot} if self.snapshot else {}),
            "exit_code": self.exit_code,
        }

    def summary(self) -> str:
        """Describe the run in a few lines."""
        made = len(self.written)
        if not made and not self.partial and not self.failed and not self.pending:
            return f"{self.cube}: nothing to do, all {len(self.skipped)} shards are done (0 written)"
        counts = [
            f"{made} shards written" + (f" ({self.empty} of them empty, without a file)" if self.empty else ""),
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
        never = len(self.unsupported)
        if never:
            lines.append(
                f"{never} of these cannot be read as they are, and to repeat the command does not change that: convert "
                "the files, or leave their scenes out"
            )
        if self.exit_code and (self.errors or len(self.missing) > never):
            lines.append(f"repeat the same command to try {'the others' if never else 'these'} again")
        return "\n".join(one_line(line) for line in lines)
