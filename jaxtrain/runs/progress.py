"""`show_steps` shows the steps of a run started from Python: a bar in a terminal or notebook, else plain lines.

The command line has its own (`cli.progress`), which shares stderr with its warnings.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from jaxtrain.runs.events import OnEvent, TrainEvent
from zarr_store.notebook import is_notebook, shows_bars
from zarr_store.printable import one_line
from zarr_store.redact import redact_text

__all__ = ["show_steps"]

_LINE_EVERY_S = 10.0
"""Shortest time between two lines of steps, in seconds."""


@contextmanager
def show_steps(wanted: bool | None, on_event: OnEvent | None = None) -> Iterator[OnEvent | None]:
    """Yield a function that shows the events of a run during the `with` block.

    Nothing is shown before the first event, so that of several processes only those show something that report.

    Args:
        wanted: Whether to show progress; None shows it in a terminal and in a notebook.
        on_event: Also called with every event.
    """
    if not (sys.stderr.isatty() or is_notebook() if wanted is None else wanted):
        yield on_event
        return
    with ExitStack() as stack:
        shown: _Bar | _Lines | None = None

        def tell(event: TrainEvent) -> None:
            nonlocal shown
            if shown is None:
                shown = _Lines()
                if shows_bars():
                    shown = _Bar(stack)
            shown.show(event)
            if on_event:
                on_event(event)

        yield tell


class _Bar:
    """A live bar; other events are lines above it."""

    def __init__(self, stack: ExitStack) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (TextColumn("train"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"))
        clocks = (TimeElapsedColumn(), TimeRemainingColumn())
        # in a notebook rich writes into the cell, and only with a console of stdout
        console = Console(stderr=not is_notebook())
        self._bar = stack.enter_context(
            Progress(*columns, *clocks, TextColumn("{task.fields[detail]}", markup=False), console=console)
        )
        self._task = self._bar.add_task("train", total=None, detail="")

    def show(self, event: TrainEvent) -> None:
        if event.kind == "step":
            loss = event.metrics.get("loss")
            detail = "" if loss is None else f"loss {loss:.4f}"
            self._bar.update(self._task, completed=event.step, total=event.steps, detail=detail)
        elif text := _words(event):
            if event.kind == "resume":
                self._bar.update(self._task, completed=event.step, total=event.steps)
            self._bar.console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)


class _Lines:
    """A line for each event, and for a step every ten seconds."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def show(self, event: TrainEvent) -> None:
        text, now = _words(event), time.monotonic()
        if event.kind == "step" and (event.step == event.steps or now - self._last >= _LINE_EVERY_S):
            text = f"train: {event.step}/{event.steps} steps"
        if text:
            self._last = now
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()


def _words(event: TrainEvent) -> str:
    """Return the line for an event; none for steps and checkpoints, of which there are too many."""
    if event.kind in ("step", "checkpoint"):
        return ""
    mark = "warning: " if event.kind == "warning" else ""
    return mark + one_line(redact_text(event.message))
