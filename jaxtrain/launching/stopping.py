"""`asked_to_stop` collects the signals that ask a launcher to end its run."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

__all__ = ["asked_to_stop"]


@contextlib.contextmanager
def asked_to_stop() -> Iterator[list[int]]:
    """Yield the list of signals that have come; a second one means to stop at once.

    Ctrl-C is left ignored where it was ignored at the start: so shells start what a script puts in the background.
    """
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {
        number: signal.signal(number, lambda got, _frame: asked.append(got))
        for number in (signal.SIGTERM, signal.SIGINT)
        if signal.getsignal(number) is not signal.SIG_IGN or number == signal.SIGTERM
    }
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
