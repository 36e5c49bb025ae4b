"""`WindowOrder` puts the windows of a map one after the other and cuts them into batches.

A batch may hold windows of several shards, and a window at the edge of two shards is predicted once for both. A batch
holds the same windows whichever shards are missing and whichever process makes it: on some devices the last digit of an
answer depends on its neighbours in the batch, and the bytes of a map must not depend on who made it. For the same
reason a batch holds windows of one map of dates only: a date that is added leaves the others as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from zarr_store.ledger import ShardIndex

__all__ = ["WindowOrder"]

Rows = npt.NDArray[np.int32]
Places = npt.NDArray[np.int64]
_STEP = 1 << 21
"""More than the rows or columns of a scene."""


@dataclass(frozen=True)
class WindowOrder:
    """Windows in the order in which they are predicted.

    Attributes:
        rows: (time, y, x) of each window, int32 (windows, 3); the last one of a map of dates is repeated until its
            batches are whole.
        size: Windows of a batch.
        places: Where the windows of a shard are in `rows`, in the order in which the shard needs them.
    """

    rows: Rows
    size: int
    places: Mapping[ShardIndex, Places]

    @classmethod
    def of(cls, windows: Mapping[ShardIndex, Rows], size: int, *, shared: bool) -> WindowOrder:
        """Put windows in order.

        Args:
            windows: Windows of every shard of some maps of dates, by (map, row of shards, column of shards), sorted.
            size: Windows of a batch.
            shared: Whether a window that two shards of a row need is predicted once. Its answer is held until the
                second one has it. The first one puts it before its other windows, so that a process that makes the
                second one alone predicts few others with it.
        """
        codes = {index: _codes(rows) for index, rows in windows.items()}
        parts: list[Rows] = []
        places: dict[ShardIndex, Places] = {}
        length, last = 0, None
        for index, rows in windows.items():
            if last is not None and index[0] != last[0] and length % size:
                parts.append(np.repeat(parts[-1][-1:], -length % size, axis=0))
                length += len(parts[-1])
            last = index
            before, after = ((*index[:2], index[2] + step) for step in (-1, 1))
            place = np.full(len(rows), -1, np.int64)
            wanted_later = np.zeros(len(rows), bool)
            if shared and before in places:
                known = dict(zip(codes[before].tolist(), places[before].tolist(), strict=True))
                place[:] = [known.get(code, -1) for code in codes[index].tolist()]
            if shared and after in codes:
                wanted_later = np.isin(codes[index], codes[after])
            own = np.flatnonzero(place < 0)
            own = own[np.argsort(~wanted_later[own], kind="stable")]
            place[own] = length + np.arange(len(own))
            places[index] = place
            if len(own):
                parts.append(rows[own])
                length += len(own)
        if length % size:
            parts.append(np.repeat(parts[-1][-1:], -length % size, axis=0))
        return cls(np.concatenate(parts) if parts else np.zeros((0, 3), np.int32), size, places)

    def batches(self, shards: Iterable[ShardIndex]) -> list[int]:
        """Return the numbers of the batches that some shards need, in order."""
        numbers = {int(number) for index in shards for number in np.unique(self.places[index] // self.size)}
        return sorted(numbers)

    def count(self, shards: Iterable[ShardIndex]) -> int:
        """Return the number of windows that some shards need; one that several need counts once."""
        every = [self.places[index] for index in shards]
        return len(np.unique(np.concatenate(every))) if every else 0

    def rows_of(self, batches: Iterable[int]) -> Rows:
        """Return the windows of batches, one batch after the other."""
        parts = [self.rows[number * self.size : (number + 1) * self.size] for number in batches]
        return np.concatenate(parts) if parts else self.rows[:0]

    def dealt(
        self, shards: Iterable[ShardIndex], batches: Iterable[int], answers: Callable[[], Iterable[Any]]
    ) -> Callable[[ShardIndex], Iterator[Any]]:
        """Return a function that yields the answers of the windows of one shard, in the order in which it needs them.

        An answer is held until the last of the shards has it. The shards must be asked for in order.

        Args:
            shards: Shards that will be asked for, in order.
            batches: Numbers of the batches that they need.
            answers: Predicts the next of these batches; returns the answers of its windows.
        """
        every = [self.places[index] for index in shards]
        uses = np.bincount(np.concatenate(every) if every else np.zeros(0, np.int64), minlength=len(self.rows))
        held: dict[int, Any] = {}
        coming = iter(batches)

        def of(index: ShardIndex) -> Iterator[Any]:
            for place in self.places[index].tolist():
                while place not in held:
                    first = next(coming) * self.size
                    held.update((first + i, answer) for i, answer in enumerate(answers()) if uses[first + i])
                uses[place] -= 1
                yield held[place] if uses[place] else held.pop(place)

        return of


def _codes(rows: Rows) -> Places:
    """Return a number for each window, equal for equal windows."""
    codes: Places = (rows[:, 0].astype(np.int64) * _STEP + rows[:, 1]) * _STEP + rows[:, 2]
    return codes
