"""`ChunkStream` reads the chunks of a replica ahead, in threads, while the shares may move from step to step.

Chunks of the next steps are read as if the share stayed. Those that a moved share adds are read at once, and those that
it takes away are dropped. So at most `1 + ahead` steps of the share are held in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

from jaxtrain.data.arrays import HostBatch, Reader, Rows, put_batch
from jaxtrain.data.order import SampleOrder
from jaxtrain.data.shuffle import ChunkOrder
from jaxtrain.data.windows import Windows

__all__ = ["ChunkStream"]


class ChunkStream:
    """Chunks of the batches of a run, by step and number; a context manager.

    Args:
        reader: Reads windows.
        windows: Windows to read.
        order: The order of the samples of the run.
        batch_size: Windows of a step.
        chunk: Windows of a chunk.
        sharding: Sharding of a chunk over the devices of this replica.
        last: Number of steps; none is read beyond it.
        threads: Chunks that are waited for and placed at once.
        ahead: Steps that are read ahead.
    """

    def __init__(
        self,
        reader: Reader,
        windows: Windows,
        *,
        order: SampleOrder | ChunkOrder,
        batch_size: int,
        chunk: int,
        sharding: jax.sharding.Sharding,
        last: int,
        threads: int = 2,
        ahead: int = 2,
    ) -> None:
        self._reader, self._windows, self._order = reader, windows, order
        self._batch_size, self._chunk, self._sharding = batch_size, chunk, sharding
        self._last, self._depth = last, ahead
        # one thread starts the reads of all chunks, the others wait for them and place them on the devices
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="reads")
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="chunk")
        self._ahead: dict[tuple[int, int], Future[Mapping[str, Any]]] = {}

    def __enter__(self) -> ChunkStream:
        return self

    def __exit__(self, *_: object) -> None:
        self._ahead.clear()
        for pool in (self._pool, self._starter):
            pool.shutdown(wait=True, cancel_futures=True)

    def rows(self, step: int) -> Rows:
        """Return the windows of all chunks of a step, int32 (batch_size, 3 or more)."""
        return self._windows.rows[self._order.indices(step * self._batch_size, self._batch_size)]

    def expect(self, step: int, chunks: Sequence[int]) -> None:
        """Begin to read the chunks of `step` and of the steps after it, and forget all others."""
        steps = range(step, min(step + 1 + self._depth, self._last))
        wanted = [(number, chunk) for number in steps for chunk in chunks]
        for place in self._ahead.keys() - set(wanted):
            self._ahead.pop(place).cancel()
        for place in wanted:
            if place not in self._ahead:
                self._ahead[place] = self._read(*place)

    def add(self, step: int, chunks: Sequence[int]) -> None:
        """Begin to read further chunks of the step under way."""
        for chunk in chunks:
            self._ahead[step, chunk] = self._read(step, chunk)

    def take(self, step: int, chunk: int) -> Mapping[str, Any]:
        """Wait for a chunk that was expected or added, and return its arrays on the devices."""
        return self._ahead.pop((step, chunk)).result()

    def _read(self, step: int, chunk: int) -> Future[Mapping[str, Any]]:
        first = step * self._batch_size + chunk * self._chunk
        rows = self._windows.rows[self._order.indices(first, self._chunk)]
        return self._pool.submit(self._finish, self._starter.submit(self._reader.begin, rows))

    def _finish(self, begun: Future[Callable[[], HostBatch]]) -> Mapping[str, Any]:
        return put_batch(begun.result()(), self._sharding, self._chunk)
