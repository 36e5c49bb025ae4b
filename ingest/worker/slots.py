"""Slots of a worker: one shard is written or waits for the network while another is decoded.

A task that makes a shard does not always need a core: it waits for the network when it reads, and for the disk when it
writes. Then it gives its thread back (Dask calls this seceding) and the next task starts: over a network right at the
beginning, from local files while the pixels are compressed: handing over takes some milliseconds, in which a core would
stand idle. A worker has one slot more than threads, which bounds the shards in its memory. At most as many tasks as
there are threads decode and compress at once.
Outside a worker, shards are made one by one.

The slots are threads that stay. Dask starts a new thread for each task that secedes, and in a new thread PROJ opens its
database again, which for a shard of five files took as long as a tenth of its decoding.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from contextvars import copy_context
from typing import TypeVar

__all__ = ["computing", "run_in_slot", "take_turns"]

T = TypeVar("T")
GiveWay = Callable[[], None]
"""A function that a task calls once it will soon only wait; the next task then starts."""


class _Slots:
    """The slots of this process, and the limit on tasks that compute."""

    def __init__(self, threads: int) -> None:
        from distributed.threadpoolexecutor import ThreadPoolExecutor

        # Dask's own kind of pool, whose threads do not keep a worker from ending
        self.pool = ThreadPoolExecutor(  # type: ignore[no-untyped-call]
            threads + 1, thread_name_prefix="terrashard-slot"
        )
        self.compute = threading.Semaphore(threads)


_slots: _Slots | None = None
_here: list[threading.Semaphore] = []
"""The limits of runs in threads of this process; where there are several, all keep to the last one's."""
_making = threading.Lock()


def run_in_slot(work: Callable[[GiveWay], T], *, remote: bool) -> T:
    """Run `work` in a slot of this worker; outside a worker, run it in this thread.

    Args:
        work: The function to run. It gets a function that it may call to let the next task start.
        remote: Whether `work` mostly waits for a network, so that the next task may start at once.
    """
    if "distributed" not in sys.modules:  # importing it takes longer than many a shard
        return work(_do_nothing)
    from distributed import get_worker, secede

    try:
        worker = get_worker()
    except ValueError:  # not on a worker
        return work(_do_nothing)
    if remote:
        secede()  # type: ignore[no-untyped-call]  # of distributed
    left = threading.Event()  # this thread is no longer needed, or the work has ended
    pool = _slots_of(worker.state.nthreads).pool
    done: Future[T] = pool.submit(copy_context().run, work, left.set)  # type: ignore[no-untyped-call]
    done.add_done_callback(lambda _: left.set())
    if not remote:
        left.wait()
        if not done.done():
            secede()  # type: ignore[no-untyped-call]
    return done.result()


def _do_nothing() -> None:
    """Keep the thread: outside a worker, no other task waits for one."""


@contextmanager
def take_turns(threads: int) -> Iterator[None]:
    """Limit how many threads of this process compute at once, during the `with` block."""
    mine = threading.Semaphore(threads)
    with _making:
        _here.append(mine)
    try:
        yield
    finally:
        with _making:
            _here.remove(mine)


@contextmanager
def computing() -> Iterator[None]:
    """Wait for a core of this worker, and hold it for the `with` block, which must not wait for the network."""
    here = _here[-1:]  # another run may end meanwhile
    with here[0] if here else (nullcontext() if _slots is None else _slots.compute):
        yield


def _slots_of(threads: int) -> _Slots:
    global _slots
    with _making:
        if _slots is None:
            _slots = _Slots(threads)
        return _slots
