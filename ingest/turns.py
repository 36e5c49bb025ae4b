"""Shards of one worker take turns, so that one waits for the network while another computes.

A worker thread that reads a shard over a network mostly waits. So such a task gives its thread back as soon as it runs
(Dask calls that to secede) and the next begins; seats bound how many shards a worker has in memory, one more than it
has threads, and what burns processor time is done in turn, by as many as there are threads. Shards from local files
gain nothing by it, and outside a worker there is nobody to take turns with.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
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
def seat(*, remote: bool) -> Iterator[None]:
    """Be one of the shards that this worker has in hand; where sources are remote, the next may begin meanwhile."""
    if not remote:
        yield
        return
    try:
        worker = get_worker()
    except ValueError:  # not on a worker
        yield
        return
    turns = _of(worker.state.nthreads)
    secede()  # type: ignore[no-untyped-call]  # of distributed
    with turns.seats:
        yield


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
