"""`take_row`, `take_error` and `note_state` put what became of a shard into the tally of a run, whoever made it."""

from __future__ import annotations

import logging

from ingest.plan.task import ShardTask
from ingest.run.job import Job, Tally
from ingest.trust.redact import redact_text
from zarr_store.backends import open_store
from zarr_store.errors import AssetUnreadable, TerrashardError
from zarr_store.ledger import Ledger, LedgerRow
from zarr_store.write import ShardWriter

__all__ = ["note_state", "take_error", "take_row"]

log = logging.getLogger(__name__)


def take_row(row: LedgerRow, pixels: int, task: ShardTask, job: Job, tally: Tally) -> LedgerRow:
    """Put the row of a task that has ended into the tally.

    Raises:
        AssetUnreadable: With on_error="fail", a source is missing.
    """
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


def take_error(error: BaseException, task: ShardTask, job: Job, tally: Tally, *, words: str = "") -> LedgerRow:
    """Record a task that raised an error as failed.

    Args:
        error: The error.
        task: The task.
        job: The run.
        tally: Tally of the shards of the run.
        words: Text about the error; by default its type and text.

    Raises:
        BaseException: `error`, where it ends the run: one of ours, an interrupt, or any with on_error="fail".
    """
    stops = isinstance(error, TerrashardError) or not isinstance(error, Exception)
    if stops or job.config.running.on_error == "fail":
        raise error
    text = words or redact_text(f"{task.collection} shard {task.index}: {type(error).__name__}: {error}")
    log.warning("%s", text)
    writer = ShardWriter(job.url, task.collection, spec=job.plan.recipe(task.collection).spec)
    row = writer.fail(task.region, key=task.key, sources=())
    tally.rows["failed"].append(row)
    tally.errors.append(" ".join(text.split())[:300])
    return row


def note_state(tally: Tally, task: ShardTask, row: LedgerRow, job: Job) -> None:
    """Bring the state of a shard that has ended into the tally."""
    # a complete shard that could not be made again stays complete: then the ledger has another row
    kept = row if row.state != "failed" else Ledger(open_store(job.url), task.collection).get_stored(task.index)
    if kept is not None:
        tally.states[task.collection].put(kept.index, kept.region, kept.key, kept.state)
