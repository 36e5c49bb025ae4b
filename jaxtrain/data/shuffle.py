"""`ChunkOrder` is a global shuffle that touches each chunk of the cube once an epoch.

A chunk usually holds several windows, and decoding it again for each of them is most of the work of reading. So the
places of a batch are lanes: lane j of batches k, k + 1, … walks through chunks of its own, in random order, and sees
all windows of a few of them, mixed, before it continues. A batch therefore holds windows from as many chunks as it has
places, and a chunk is needed for a short while only, by the process that reads this lane.

Like `SampleOrder` it is a function of (seed, global sample counter) and nothing else: not of the number of processes
or devices, so a run continues on another number with the sample that comes next.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from jaxtrain.data.order import Index, mix
from zarr_store.errors import InvalidInput

__all__ = ["ChunkOrder", "chunk_numbers"]


def chunk_numbers(rows: npt.NDArray[np.int32], patch: int, chunk: tuple[int, int, int]) -> Index:
    """Return a number for each window, equal for windows that begin in the same chunk.

    Args:
        rows: int32 (count, 3 or more), the last three are (time, y, x).
        patch: Side of a window; where it divides the chunk, a window lies in one chunk.
        chunk: (times, height, width) of a chunk.

    Returns:
        int64 (count,), from 0 without gaps, in the order of the rows' sorted chunks.
    """
    # windows that begin within one multiple of the larger of both share their chunks with nobody else
    sides = np.array([chunk[0], max(chunk[1], patch), max(chunk[2], patch)], np.int64)
    places = rows.astype(np.int64)
    places[:, -3:] //= sides
    numbers: Index = np.unique(places, axis=0, return_inverse=True)[1].reshape(-1).astype(np.int64)
    return numbers


@dataclass(frozen=True)
class ChunkOrder:
    """The endless order of windows that lie in chunks: each epoch holds each window once.

    Attributes:
        seed: Any integer; the same seed gives the same order on every machine.
        chunks: int64 (count,): the chunk of each window, see `chunk_numbers`.
        size: Windows of a batch, over all processes; so many lanes there are.
        mixed: Chunks of a lane whose windows are mixed.

    >>> order = ChunkOrder(seed=0, chunks=np.array([0, 0, 1, 1, 2, 2]), size=2)
    >>> sorted(order.indices(first=0, count=6).tolist()), sorted(order.indices(first=6, count=6).tolist())
    ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5])
    """

    seed: int
    chunks: Index = field(repr=False)
    size: int
    mixed: int = 4

    def __post_init__(self) -> None:
        if not len(self.chunks):
            raise InvalidInput("an order needs at least one window, got 0; lower data.min_labelled")
        # epochs are worked out whole, and asked for batch by batch
        object.__setattr__(self, "_epoch", functools.lru_cache(maxsize=2)(self._make_epoch))

    @property
    def count(self) -> int:
        """Number of windows."""
        return len(self.chunks)

    def indices(self, first: int, count: int) -> Index:
        """Return the window numbers of the samples `first` … `first + count - 1` of the run.

        Args:
            first: Global sample counter, from 0.
            count: Number of samples.

        Returns:
            int64 (count,), each in [0, self.count).
        """
        numbers = np.empty(count, np.int64)
        done = 0
        while done < count:
            epoch, at = divmod(first + done, self.count)
            part = min(count - done, self.count - at)
            numbers[done : done + part] = self._epoch(epoch)[at : at + part]  # type: ignore[attr-defined]
            done += part
        return numbers

    def _make_epoch(self, epoch: int) -> Index:
        """Return all windows in the order of one epoch; O(count log count) once an epoch."""
        count, lanes = self.count, self.size
        key = mix(mix(np.array([self.seed % (1 << 64)], np.uint64)) ^ np.uint64(epoch))
        # ---- chunks in random order, and each whole chunk to the lane in whose share of the epoch it begins
        total = int(self.chunks.max()) + 1
        members = np.bincount(self.chunks, minlength=total)
        ranked = np.argsort(mix(key ^ np.arange(total, dtype=np.uint64)), kind="stable")
        begins = np.cumsum(members[ranked]) - members[ranked]
        slots = (epoch * count + np.arange(count, dtype=np.int64)) % lanes  # the place in the batch of each position
        lengths = np.bincount(slots, minlength=lanes)
        lane = np.searchsorted(np.cumsum(lengths), begins, side="right")
        # ---- within a lane the windows of a few chunks are mixed
        first = np.searchsorted(lane, np.arange(lanes))
        block = (np.arange(total) - first[lane]) // self.mixed
        rank = np.empty(total, np.int64)
        rank[ranked] = np.arange(total)
        of_window = rank[self.chunks]
        shuffle = mix(mix(key ^ np.uint64(0xC0FFEE)) ^ np.arange(count, dtype=np.uint64))
        windows = np.lexsort((shuffle, block[of_window], lane[of_window]))
        # ---- lanes end at whole chunks: the windows that one has too many are read by others at their end
        held = np.bincount(lane[of_window], minlength=lanes)
        ends = np.cumsum(held)
        depth = np.arange(count) - np.repeat(ends - held, held)
        over = depth >= np.repeat(lengths, held)
        spare = windows[over]
        order = np.empty(count, np.int64)
        positions = np.argsort(slots, kind="stable")  # positions of the epoch, lane by lane
        place = np.arange(count) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        filled = place < np.repeat(held, lengths)
        order[positions[filled]] = windows[~over]
        order[positions[~filled]] = spare
        return order
