"""Run one function over the blocks of a table: on threads of this process, or shared with the other processes of a run.

Results come back in the order of the blocks, whoever made them. What is summed over them is therefore the same on any
number of threads, devices and processes.
"""

from __future__ import annotations

import functools
import json
import os
import pickle
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from jaxtrain.tasks.table import Block, Table
from jaxtrain.tasks.tables import open_table

__all__ = ["MEMORY", "Job", "LocalWorkers", "ProcessWorkers", "TableRef", "Workers", "keep_blocks"]

T = TypeVar("T")
K = TypeVar("K")
MEMORY = 2 << 30
"""Bytes of blocks that a process keeps between passes, unless told otherwise; what does not fit is read again."""


class Job(Protocol):
    """A function of the number of a block that can be sent to another process."""

    def __call__(self, number: int) -> Any: ...


class Workers(Protocol):
    """Interface of everything that runs jobs."""

    def map(self, job: Callable[[int], T], numbers: Sequence[int]) -> Iterator[T]:
        """Yield the result of each block, in the order of `numbers`."""

    def share(self, value: T) -> T:
        """Return the value that the first process has given."""


@dataclass(frozen=True)
class TableRef:
    """A table by what opens it, so that a job can be sent to another process.

    Attributes:
        description: Arguments of `open_table` as JSON.
        digest: Digest of the table.
    """

    description: str
    digest: str

    @classmethod
    def of(cls, table: Table) -> TableRef:
        """Return the reference to a table, and keep the table open among the last ones of this process."""
        ref = cls(json.dumps(table.description, default=list, sort_keys=True), table.digest)
        with _LOCK:
            _OPEN[ref.description] = table
            while len(_OPEN) > _MOST_OPEN:
                _OPEN.popitem(last=False)
        return ref

    @property
    def table(self) -> Table:
        """The open table."""
        with _LOCK:
            found = _OPEN.get(self.description)
        return found if found is not None else _open(self.description)

    def block(self, number: int) -> Block:
        """Read a block, or take it from those that are kept."""
        key = (self.digest, number)
        with _LOCK:
            found = _BLOCKS.get(key)
        if found is not None:
            return found
        block = self.table.read(number)
        with _LOCK:
            # a part is left to what is made from the blocks
            if key not in _BLOCKS and _KEPT[0] + block.nbytes <= _KEPT[1] * _BLOCKS_SHARE:
                _BLOCKS[key] = block
                _KEPT[0] += block.nbytes
        return block

    def keep(self, name: str, number: int, make: Callable[[], K]) -> K:
        """Return the result of `make` for a block, or take it from what is kept.

        Args:
            name: Name of what is made, which must depend on the block alone.
            number: Number of the block.
            make: Makes it; what has no `nbytes` takes no room.
        """
        key = (self.digest, name, number)
        with _LOCK:
            if key in _MADE:
                found: K = _MADE[key]
                return found
        made = make()
        nbytes = int(getattr(made, "nbytes", 0))
        with _LOCK:
            if key not in _MADE and _KEPT[0] + nbytes <= _KEPT[1]:
                _MADE[key] = made
                _KEPT[0] += nbytes
        return made


_MOST_OPEN = 4
_LOCK = threading.Lock()
_OPEN: OrderedDict[str, Table] = OrderedDict()
_BLOCKS: dict[tuple[str, int], Block] = {}
_BLOCKS_SHARE = 0.875
_MADE: dict[tuple[str, str, int], Any] = {}
_KEPT = [0, MEMORY]
"""Bytes that are kept, and the most that may be. The first blocks stay: passes go through all of them in order, so
whatever was thrown out would be the next to be read."""


def keep_blocks(nbytes: int) -> None:
    """Forget all kept blocks, and keep at most this many bytes of them from now on."""
    with _LOCK:
        _BLOCKS.clear()
        _MADE.clear()
        _KEPT[:] = [0, nbytes]


@functools.lru_cache(maxsize=_MOST_OPEN)
def _open(description: str) -> Table:
    return open_table(**json.loads(description))


class LocalWorkers:
    """Threads of this process; two blocks more than threads are under way at a time.

    Args:
        threads: Number of threads; None for one on each core, and at most 16.
    """

    def __init__(self, threads: int | None = None) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.threads = threads or max(1, min(cores, 16))

    def map(self, job: Callable[[int], T], numbers: Sequence[int]) -> Iterator[T]:
        if len(numbers) < 2 or self.threads == 1:
            yield from map(job, numbers)
            return
        under_way: deque[Future[T]] = deque()
        with ThreadPoolExecutor(self.threads, thread_name_prefix="terrashard-block") as pool:
            try:
                for number in numbers:
                    under_way.append(pool.submit(job, number))
                    if len(under_way) > self.threads + 1:
                        yield under_way.popleft().result()
                while under_way:
                    yield under_way.popleft().result()
            finally:
                for future in under_way:
                    future.cancel()

    def share(self, value: T) -> T:
        return value


class ProcessWorkers:
    """The processes of one run of JAX: each makes every n-th block, and all of them get all results.

    Args:
        index: Number of this process.
        count: Number of processes.
        local: Workers of this process.
    """

    def __init__(self, index: int, count: int, local: LocalWorkers | None = None) -> None:
        self.index, self.count = index, count
        self.local = local or LocalWorkers()

    def map(self, job: Callable[[int], T], numbers: Sequence[int]) -> Iterator[T]:
        at_once = self.count * self.local.threads
        for start in range(0, len(numbers), at_once):
            turn = numbers[start : start + at_once]
            results, failure = [], None
            try:
                results = list(self.local.map(job, turn[self.index :: self.count]))
            except Exception as error:  # noqa: BLE001  every process must learn of it, or they would wait without end
                failure = error
            everyone = _exchange((failure, results))
            for failure, _ in everyone:
                if failure is not None:
                    raise failure
            for at in range(len(turn)):
                yield everyone[at % self.count][1][at // self.count]

    def share(self, value: T) -> T:
        shared: T = _exchange(value if self.index == 0 else None)[0]
        return shared


def _exchange(value: Any) -> list[Any]:
    """Return what each process has given, in order of their numbers."""
    from jax.experimental.multihost_utils import process_allgather

    data = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = np.asarray(process_allgather(np.array([len(data)], np.int32))).ravel()
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(data)] = data
    rows = np.asarray(process_allgather(padded)).reshape(len(sizes), -1)
    # these are our own processes of the same run
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]
