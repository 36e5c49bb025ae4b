"""Windows and samples that are read once and then kept: in the memory of the host (`KeptReader`), or on the devices
(`KeptBatches`).

A batch has the same bits as one that is read from the store, since the rows of both come from the same reader, and the
order of the run says which rows it holds.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import numpy as np
import numpy.typing as npt

from jaxtrain.data.arrays import HostBatch, Reader, Rows, local_rows, put_batch
from jaxtrain.data.memory import empty_array
from jaxtrain.data.order import SampleOrder
from jaxtrain.data.shuffle import ChunkOrder
from jaxtrain.parallel.mesh import batch_sharding, replicated, stored_sharding

__all__ = ["KeptBatches", "KeptReader"]

_BLOCK_BYTES = 64 << 20
"""Bytes that are read at once to be placed on the devices."""


class KeptReader:
    """Reads rows with another reader, and keeps those of `rows` in the memory of the host after the first reading.

    The other reader decides what an unreadable row gives; this result is kept, too.

    Args:
        reader: Reads rows of `rows` that are not kept yet, and all other rows.
        rows: int32 (N, columns), the rows that are kept; memory is taken as they are read.
    """

    def __init__(self, reader: Reader, rows: Rows) -> None:
        self._reader = reader
        self._positions = _RowPositions(rows)
        self._is_kept = np.zeros(len(rows), bool)
        self._kept: HostBatch = {}
        self._lock = threading.Lock()

    @property
    def shows(self) -> Literal["windows", "images"]:
        """Kind of a row: that of the other reader."""
        return self._reader.shows

    @property
    def count(self) -> int:
        """Number of rows that are kept so far."""
        return int(self._is_kept.sum())

    def read(self, rows: Rows) -> HostBatch:
        """Read rows, as the other reader does."""
        return self.begin(rows)()

    def begin(self, rows: Rows) -> Callable[[], HostBatch]:
        """Start to read the rows that are not kept yet, and return a function that waits for them."""
        at = self._positions.of(rows)
        if at is None:
            return self._reader.begin(rows)
        new = np.flatnonzero(~self._is_kept[at])
        wait = self._reader.begin(rows[new]) if len(new) else None

        def finish() -> HostBatch:
            if wait is not None:
                self._keep(at[new], wait())
            return {name: _take_rows(array, at) for name, array in self._kept.items()}

        return finish

    def _keep(self, at: npt.NDArray[np.int64], batch: HostBatch) -> None:
        with self._lock:  # several threads finish batches; the first allocates the memory
            if not self._kept:
                count = len(self._is_kept)
                self._kept = {name: np.empty((count, *array.shape[1:]), array.dtype) for name, array in batch.items()}
        for name, array in batch.items():
            self._kept[name][at] = array
        self._is_kept[at] = True


class KeptBatches:
    """Makes batches from rows that are kept on all devices of a mesh; only the row numbers of a batch are sent.

    Args:
        reader: Reads all rows at the beginning, in blocks of 64 MB.
        rows: int32 (N, columns), the rows of the training split, in the order of their numbers.
        mesh: Each of its devices holds all rows.
    """

    def __init__(self, reader: Reader, rows: Rows, mesh: jax.sharding.Mesh) -> None:
        self._rows, self._mesh = rows, mesh
        self._held = _place_on_devices(reader, rows, mesh)
        shardings = {name: stored_sharding(mesh, array.ndim) for name, array in self._held.items()}

        def take(held: dict[str, jax.Array], at: jax.Array) -> dict[str, jax.Array]:
            return {name: array[at] for name, array in held.items()}

        self._take = jax.jit(take, out_shardings=shardings)

    @property
    def nbytes(self) -> int:
        """Bytes that each device holds."""
        return sum(array.nbytes for array in self._held.values())

    @contextlib.contextmanager
    def iterated(
        self, order: SampleOrder | ChunkOrder, *, size: int, first: int, last: int
    ) -> Iterator[Iterator[tuple[int, Rows, Any]]]:
        """Yield the iterator of the batches `first` … `last - 1`: (number, rows, batch on the devices).

        Args:
            order: The order of the samples of the run.
            size: Rows of a batch, over all processes.
            first: Number of the first batch.
            last: Number after the last batch.
        """
        yield self._batches(order, size, first, last)

    def _batches(
        self, order: SampleOrder | ChunkOrder, size: int, first: int, last: int
    ) -> Iterator[tuple[int, Rows, Any]]:
        sharding = batch_sharding(self._mesh)
        mine = local_rows(sharding, size)
        for number in range(first, last):
            chosen = order.indices(number * size, size)
            at = put_batch({"at": chosen[mine].astype(np.int32)}, sharding, size)["at"]
            yield number, self._rows[chosen], self._take(self._held, at)


class _RowPositions:
    """Finds the positions of rows among those that are kept."""

    def __init__(self, rows: Rows) -> None:
        self._column_sizes = rows.max(axis=0).astype(np.int64) + 1
        keys = self._keys(rows)
        self._order = np.argsort(keys, kind="stable")
        self._sorted = keys[self._order]

    def _keys(self, rows: Rows) -> npt.NDArray[np.int64]:
        keys = np.zeros(len(rows), np.int64)
        for column, most in enumerate(self._column_sizes.tolist()):
            keys = keys * most + rows[:, column]
        return keys

    def of(self, rows: Rows) -> npt.NDArray[np.int64] | None:
        """Return the positions of rows; None if any of them is not kept."""
        if not ((rows >= 0) & (rows < self._column_sizes)).all():
            return None
        keys = self._keys(rows)
        at = np.minimum(np.searchsorted(self._sorted, keys), len(self._sorted) - 1)
        return self._order[at] if (self._sorted[at] == keys).all() else None


def _take_rows(array: np.ndarray, at: npt.NDArray[np.int64]) -> np.ndarray:
    made = empty_array((len(at), *array.shape[1:]), array.dtype)
    # all numbers are inside; `raise`, the default, would take the rows to a buffer first
    return np.take(array, at, axis=0, out=made, mode="clip")


def _place_on_devices(reader: Reader, rows: Rows, mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """Read all rows, block by block, into arrays on every device of the mesh."""
    sharding = replicated(mesh)
    one = reader.read(rows[:1])
    block = min(len(rows), max(1, _BLOCK_BYTES // max(1, sum(array.nbytes for array in one.values()))))
    shapes = {name: ((len(rows), *array.shape[1:]), array.dtype) for name, array in one.items()}
    empty = jax.jit(
        lambda: {name: jax.numpy.zeros(shape, dtype) for name, (shape, dtype) in shapes.items()},
        out_shardings=dict.fromkeys(shapes, sharding),
    )

    def write(held: dict[str, jax.Array], part: dict[str, jax.Array], first: jax.Array) -> dict[str, jax.Array]:
        return {
            name: jax.lax.dynamic_update_slice_in_dim(array, part[name], first, axis=0) for name, array in held.items()
        }

    written = jax.jit(write, donate_argnums=0, out_shardings=dict.fromkeys(shapes, sharding))
    place: Callable[..., jax.Array] = jax.make_array_from_process_local_data
    # blocks of one size, so that one program writes them; the last one begins earlier
    starts = [min(start, len(rows) - block) for start in range(0, len(rows), block)]
    held: dict[str, jax.Array] = empty()
    waiting = reader.begin(rows[starts[0] : starts[0] + block])
    for start, following in zip(starts, [*starts[1:], None], strict=True):
        ahead = None if following is None else reader.begin(rows[following : following + block])
        part = {name: place(sharding, array, array.shape) for name, array in waiting().items()}
        held = written(held, part, np.int32(start))
        if ahead is not None:
            waiting = ahead
    return held
