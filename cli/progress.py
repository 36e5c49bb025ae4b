"""Progress on stderr: a live bar in a terminal, plain lines in a file or a pipe."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from cli.session import Session, speak

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

__all__ = ["Reporter"]

# A log file needs a sign of life, not each step.
_LINE_EVERY_S = 15.0
_LEAST_APART_S = 1.0


class Reporter:
    """Show how far one piece of work is.

    Args:
        session: The running command; --quiet shows nothing.
        title: Name of the work, one word.
        unit: Name of what is counted.
    """

    def __init__(self, session: Session, title: str, *, unit: str = "") -> None:
        self._title = title
        self._unit = unit
        self._quiet = session.verbosity < 0
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._started = self._said = time.monotonic()
        self._share_said = 0.0

    def __enter__(self) -> Self:
        if not self._quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.description:9}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[detail]}", markup=False),
                console=Console(stderr=True),
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(self._title, total=None, detail="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, total: int, detail: str = "") -> None:
        """Show that `done` of `total` units are finished."""
        if self._quiet:
            return
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=total, detail=_safe(detail))
            return
        now = time.monotonic()
        share = done / total if total else 1.0
        quiet_for = now - self._said
        # at each quarter and at the end, unless all is done in a moment; and every 15 s between
        if (share >= min(self._share_said + 0.25, 1.0) and quiet_for > _LEAST_APART_S) or quiet_for > _LINE_EVERY_S:
            self._said, self._share_said = now, share
            tail = f" · {detail}" if detail else ""
            self.line(f"{self._title}: {done}/{total} {self._unit} · {now - self._started:.0f} s{tail}")

    def line(self, text: str) -> None:
        """Show one line without breaking the bar."""
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.console.print(_safe(text), markup=False, highlight=False, emoji=False, soft_wrap=True)
        else:
            speak(text)


def _safe(text: str) -> str:
    """Return text for rich, which writes its own escapes to the terminal: names must not bring theirs."""
    from zarr_store.printable import one_line
    from zarr_store.redact import redact_text

    return one_line(redact_text(text))
