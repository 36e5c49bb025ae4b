"""Shards of one worker take turns, so that one is written or waits for the network while another is decoded.

A worker thread that makes a shard does not always need a core: it waits for the network as it reads, and for the disk
as it writes. There the task gives its thread back (Dask calls that to secede) and the next begins: over a network as
soon as it runs, from local files once the pixels are packed and only the writing is left. Seats bound how many shards
a worker has in memory, one more than it has threads, and what decodes and packs does so in turn, by as many as there
are threads. Outside a worker there is nobody to take turns with.

The seats are threads that stay: Dask begins a new one for each task that secedes, and in a new thread PROJ opens its
database again, which for a shard of five files took as long as a tenth of its decoding.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from contextvars import copy_context
from typing import TypeVar

from distributed import get_worker, secede
from distributed.threadpoolexecutor import ThreadPoolExecutor

__all__ = ["computing", "in_seat"]

T = TypeVar("T")
GiveWay = Callable[[], None]
"""What a task calls once it only waits: the next begins."""


class _Turns:
    """Of one process."""

    def __init__(self, threads: int) -> None:
        # Dask's own kind of pool, whose threads do not keep a worker from ending
        self.seats = ThreadPoolExecutor(  # type: ignore[no-untyped-call]
            threads + 1, thread_name_prefix="terrashard-seat"
        )
        self.compute = threading.Semaphore(threads)


_turns: _Turns | None = None
_making = threading.Lock()


def in_seat(work: Callable[[GiveWay], T], *, remote: bool) -> T:
    """Do `work` as one of the shards that this worker has in hand.

    Args:
        work: Is given what it may call to let the next begin.
        remote: It mostly waits for a network, so the next may begin at once.
    """
    try:
        worker = get_worker()
    except ValueError:  # not on a worker
        return work(_nobody_waits)
    if remote:
        secede()  # type: ignore[no-untyped-call]  # of distributed
    left = threading.Event()  # this thread is not needed any more, or the work has ended
    seats = _of(worker.state.nthreads).seats
    done: Future[T] = seats.submit(copy_context().run, work, left.set)  # type: ignore[no-untyped-call]
    done.add_done_callback(lambda _: left.set())
    if not remote:
        left.wait()
        if not done.done():
            secede()  # type: ignore[no-untyped-call]
    return done.result()


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
