"""`BatchStream` reads windows into batches for the mesh, ahead in threads, in the order of the run.

Bounds: at most `threads + prefetch` batches are held, and all of them are read at once, so that the decoding threads of
tensorstore never wait for the loop that trains.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from jaxtrain.data.arrays import HostBatch, Reader, Rows, local_rows, put_batch
from jaxtrain.data.classes import UNLABELLED
from jaxtrain.data.order import SampleOrder
from jaxtrain.data.shuffle import ChunkOrder
from jaxtrain.data.windows import Windows

__all__ = ["BatchStream"]


class BatchStream:
    """Batches `first` … `last - 1`, read ahead; a context manager that iterates (number, window rows, host batch).

    With an order, batch k holds the samples k·size … (k+1)·size - 1 of the run. Without one it holds the windows of
    those numbers, once, and the last batch is filled up with windows that are neither observed nor labelled.

    Args:
        reader: Reads windows.
        windows: Windows to read.
        size: Windows of a batch, over all processes.
        sharding: Sharding of a batch, which decides the windows that this process reads.
        order: The order of the samples of the run.
        first, last: Numbers of batches.
        threads: Batches that are waited for and placed at once.
        prefetch: Batches more whose reads are under way, or that wait for the device.
        place: Whether batches come as global arrays on the devices (`put_batch`), which the reading threads see to.
    """

    def __init__(
        self,
        reader: Reader,
        windows: Windows,
        *,
        size: int,
        sharding: jax.sharding.Sharding,
        order: SampleOrder | ChunkOrder | None = None,
        first: int = 0,
        last: int | None = None,
        threads: int = 2,
        prefetch: int = 2,
        place: bool = False,
    ) -> None:
        self._reader, self._windows, self._order, self._size = reader, windows, order, size
        self._local = local_rows(sharding, size)
        self._first = first
        self._last = -(-len(windows) // size) if last is None else last
        self._depth = threads + prefetch
        self._sharding, self._place = sharding, place
        # one thread starts the reads of all batches ahead, the others wait for them and place them on the devices
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="reads")
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="batch")
        self._stopped = threading.Event()

    def __enter__(self) -> BatchStream:
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        for pool in (self._pool, self._starter):
            pool.shutdown(wait=True, cancel_futures=True)

    @contextlib.contextmanager
    def iterated(self) -> Iterator[Iterator[tuple[int, Rows, Any]]]:
        """Yield the iterator of the batches, and stop reading at the end of the block."""
        with self:
            yield iter(self)

    def rows(self, number: int) -> Rows:
        """Return the windows of batch `number` over all processes, int32 (size, 3) or fewer at the end of one pass."""
        start = number * self._size
        if self._order is not None:
            return self._windows.rows[self._order.indices(start, self._size)]
        return self._windows.rows[start : start + self._size]

    def __iter__(self) -> Iterator[tuple[int, Rows, Any]]:
        ahead: deque[tuple[int, Rows, Future[Any]]] = deque()
        submitted = self._first
        while ahead or submitted < self._last:
            while submitted < self._last and len(ahead) < self._depth:
                rows = self.rows(submitted)
                begun = self._starter.submit(self._begin, rows)
                ahead.append((submitted, rows, self._pool.submit(self._finish, begun, rows)))
                submitted += 1
            number, rows, pending = ahead.popleft()
            yield number, rows, pending.result()

    def _begin(self, rows: Rows) -> Callable[[], HostBatch]:
        if self._stopped.is_set():
            return dict
        missing = self._size - len(rows)
        filled = np.concatenate([rows, np.repeat(rows[-1:], missing, axis=0)]) if missing else rows
        return self._reader.begin(filled[self._local])

    def _finish(self, begun: Future[Callable[[], HostBatch]], rows: Rows) -> Mapping[str, Any]:
        wait = begun.result()
        if self._stopped.is_set():
            return {}
        batch = wait()
        extra = np.arange(self._size)[self._local] >= len(rows)
        if extra.any():
            for name, array in batch.items():
                if name.startswith("observed"):
                    array[extra] = 0
            if "label" in batch:
                label = batch["label"]
                label[extra] = np.nan if np.issubdtype(label.dtype, np.floating) else UNLABELLED
        return put_batch(batch, self._sharding, self._size) if self._place else batch
