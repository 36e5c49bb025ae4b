"""`show_progress` shows the progress of a run started from Python: a bar in a terminal or notebook, else plain lines.

The command line has its own (`cli.progress`), which shares stderr with its warnings.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from zarr_store.notebook import is_notebook, shows_bars

if TYPE_CHECKING:
    from ingest.run.outcome import IngestEvent

__all__ = ["show_progress"]

_LINE_EVERY_S = 10.0
"""Shortest time between two lines of progress, in seconds."""

Tell = Callable[["IngestEvent"], None]


@contextmanager
def show_progress(title: str, wanted: bool | None, on_event: Tell | None = None) -> Iterator[Tell | None]:
    """Yield a function that shows the events of a run during the `with` block.

    Args:
        title: One word for what is being done.
        wanted: Whether to show progress; None shows it in a terminal and in a notebook.
        on_event: Also called with every event.
    """
    if not (sys.stderr.isatty() or is_notebook() if wanted is None else wanted):
        yield on_event
        return
    with (_bar if shows_bars() else _lines)(title) as show:

        def tell(event: IngestEvent) -> None:
            show(event)
            if on_event:
                on_event(event)

        yield tell


@contextmanager
def _bar(title: str) -> Iterator[Tell]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("shards"))
    # in a notebook rich writes into the cell, and only with a console of stdout
    console = Console(stderr=not is_notebook())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task(title, total=None)

        def show(event: IngestEvent) -> None:
            if event.kind in ("planned", "shard"):
                bar.update(task, completed=event.done, total=event.total)
            if text := _words(event):
                console.print(text, markup=False, highlight=False, soft_wrap=True)

        yield show


@contextmanager
def _lines(title: str) -> Iterator[Tell]:
    last = time.monotonic()

    def show(event: IngestEvent) -> None:
        nonlocal last
        text = _words(event)
        now = time.monotonic()
        if event.kind == "shard" and (event.done == event.total or now - last >= _LINE_EVERY_S):
            text = "\n".join(filter(None, (text, f"{title}: {event.done}/{event.total} shards")))
        if text:
            last = now
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()

    yield show


def _words(event: IngestEvent) -> str:
    """Describe an event that deserves a line: the address of the dashboard, or a shard that is not complete."""
    if event.kind == "dashboard":
        return f"dashboard: {event.url}"
    if event.kind == "shard" and event.row is not None and event.row.state != "done":
        names = ", ".join(source.item_id for source in event.row.sources if source.state == "missing")
        return f"shard {event.row.index} is {event.row.state}" + (f": {names}" if names else "")
    return ""
