"""`Watchdog` ends a run without progress, with its stacks in the log, so that a launcher can restart it.

A collective waits without limit for a process that never comes. Nothing is raised then, so a thread counts the seconds
since the last sign of life instead.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

__all__ = ["HUNG", "Watchdog"]

HUNG = 70
"""Exit code of a process that its watchdog has ended (EX_SOFTWARE of sysexits.h)."""


class Watchdog:
    """Watch that ends this process when `beat` was not called for `seconds`; a context manager.

    The stacks of all threads go to stderr and to the file, before the process ends with code 70. Python's threads
    are enough for it: who waits in a collective has given the interpreter's lock back.

    Args:
        seconds: Longest time between two signs of life.
        file: File for the stacks; its folder must exist by then.
    """

    def __init__(self, seconds: float, file: Path) -> None:
        self._seconds, self._file = seconds, file
        self._last, self._what = time.monotonic(), "start"
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def beat(self, what: str) -> None:
        """Report progress; `what` has just begun."""
        self._last, self._what = time.monotonic(), what

    def _watch(self) -> None:
        every = min(1.0, self._seconds / 4)
        while not self._ended.wait(every):
            silent = time.monotonic() - self._last
            if silent > self._seconds:
                self._end(silent)

    def _end(self, silent: float) -> None:
        text = (
            f"error: nothing has moved for {silent:.0f} s since: {self._what}. Another process is gone or has fewer "
            f"batches, or a device hangs; the stacks of all threads follow and are in {self._file}. The same command "
            "continues from the newest checkpoint; a longer run.hang_s allows longer steps\n"
        )
        try:
            with self._file.open("w", encoding="utf-8") as file:
                file.write(text)
                faulthandler.dump_traceback(file=file, all_threads=True)
        finally:
            os.write(2, text.encode())
            faulthandler.dump_traceback(file=sys.__stderr__ or 2, all_threads=True)
            os._exit(HUNG)
