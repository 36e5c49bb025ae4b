"""Shards of one worker take turns, so that one is written or waits for the network while another is decoded.

A worker thread that makes a shard does not always need a core: it waits for the network as it reads, and for the disk
as it writes. There the task gives its thread back (Dask calls that to secede) and the next begins: over a network as
soon as it runs, from local files once the pixels are there and only the writing is left. Seats bound how many shards a
worker has in memory, one more than it has threads, and what decodes does so in turn, by as many as there are threads.
Outside a worker there is nobody to take turns with.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from distributed import get_worker, secede

__all__ = ["computing", "seat"]


class _Turns:
    """Of one process."""

    def __init__(self, threads: int) -> None:
        self.seats = threading.Semaphore(threads + 1)
        self.compute = threading.Semaphore(threads)


_turns: _Turns | None = None
_making = threading.Lock()


@contextmanager
def seat(*, remote: bool) -> Iterator[Callable[[], None]]:
    """Be one of the shards that this worker has in hand; what it gives, once called, lets the next begin.

    Args:
        remote: The task mostly waits for a network, so the next may begin at once.
    """
    try:
        worker = get_worker()
    except ValueError:  # not on a worker
        yield _nobody_waits
        return
    turns = _of(worker.state.nthreads)
    if remote:
        secede()  # type: ignore[no-untyped-call]  # of distributed
    with turns.seats:
        yield _nobody_waits if remote else secede


def _nobody_waits() -> None:
    """There is no thread to give back."""


@contextmanager
def computing() -> Iterator[None]:
    """Do what needs a core, but not while others of this worker do; nothing in here may wait for the network."""
    with nullcontext() if _turns is None else _turns.compute:
        yield


def _of(threads: int) -> _Turns:
    global _turns
    with _making:
        if _turns is None:
            _turns = _Turns(threads)
        return _turns
