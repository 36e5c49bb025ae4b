"""`handle_stop_signals` lets signals end a run: the first in order, the second at once.

In order means that tasks are cancelled, the cluster is closed and the lock is released, which can take as long as a
worker that does not answer. At once is safe too, as is dying at any moment: the ledger records what is done, and the
lock of a dead process no longer counts.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from zarr_store.errors import Preempted

__all__ = ["handle_stop_signals"]

_CODES = {signal.SIGTERM: 75, signal.SIGINT: 130}
_AT_ONCE = b"stopped at once; what was written stays, and the same command continues from there\n"


@contextmanager
def handle_stop_signals() -> Iterator[None]:
    """Raise `Preempted` at SIGTERM or `KeyboardInterrupt` at an interrupt, once; the next signal ends the process.

    Interrupts are left alone in interactive sessions, which outlive a run, and where a program has its own handler.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    signalled = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal signalled
        if signalled:
            os.write(2, _AT_ONCE)
            os._exit(_CODES[signal.Signals(number)])
        signalled = True
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise Preempted("stopped by SIGTERM; what was written stays, and the same command continues from there")

    interactive = hasattr(sys, "ps1") or "ipykernel" in sys.modules
    ours = [signal.SIGTERM]
    if not interactive and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        ours.append(signal.SIGINT)
    before = {number: signal.signal(number, stop) for number in ours}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
