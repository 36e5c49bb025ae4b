"""Draw rows of a table at random, in one pass, so that the draw depends on the rows and the seed alone.

Each row gets a pseudo-random key from its number; the rows with the smallest keys are the sample. Neither the cut into
blocks nor the order in which they are read changes it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from jaxtrain.tasks.table import Table
from jaxtrain.tasks.work import TableRef, Workers

__all__ = ["hash_ids", "sample_rows", "uniform"]

U64 = npt.NDArray[np.uint64]
Choice = Callable[[Table, U64], npt.NDArray[np.bool_]]


def hash_ids(ids: U64, seed: int) -> U64:
    """Mix numbers and a seed into 64 pseudo-random bits each (splitmix64; Steele, Lea & Flood 2014)."""
    with np.errstate(over="ignore"):
        z = ids + np.uint64(seed % (1 << 64)) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed: U64 = z ^ (z >> np.uint64(31))
    return mixed


def uniform(ids: U64, seed: int) -> npt.NDArray[np.float64]:
    """Return a pseudo-random number in (0, 1) for each row."""
    drawn: npt.NDArray[np.float64] = ((hash_ids(ids, seed) >> np.uint64(11)).astype(np.float64) + 0.5) / (1 << 53)
    return drawn


@dataclass(frozen=True)
class _SampleJob:
    ref: TableRef
    count: int
    seed: int
    choose: Choice | None

    def __call__(self, number: int) -> tuple[U64, U64, npt.NDArray[np.float32]]:
        block = self.ref.block(number)
        ids, values, turns = block.ids, block.values, block.turns
        if self.choose is not None:
            chosen = self.choose(self.ref.table, ids)
            ids, values, turns = ids[chosen], values[:, chosen], turns[chosen]
        return _smallest(hash_ids(hash_ids(ids, self.seed) + turns, 1), ids, values, self.count)


def sample_rows(
    table: Table, count: int, seed: int, workers: Workers, *, choose: Choice | None = None
) -> npt.NDArray[np.float32]:
    """Draw rows without replacement.

    Args:
        table: The rows.
        count: Number of rows.
        seed: Seed of the draw.
        workers: Workers that read the blocks.
        choose: Which rows may be drawn, of a table and the numbers of its rows; None for all. It goes to workers.

    Returns:
        float32 (row, feature), ordered by their keys; all rows if there are not more than `count`.
    """
    keys, ids = np.zeros(0, np.uint64), np.zeros(0, np.uint64)
    values = np.zeros((len(table.features), 0), np.float32)
    for found in workers.map(_SampleJob(TableRef.of(table), count, seed, choose), range(len(table))):
        keys, ids, values = _smallest(
            np.concatenate([keys, found[0]]), np.concatenate([ids, found[1]]),
            np.concatenate([values, found[2]], axis=1), count,
        )  # fmt: skip
    order = np.lexsort((ids, keys))
    return np.ascontiguousarray(values[:, order].T)


def _smallest(
    keys: U64, ids: U64, values: npt.NDArray[np.float32], count: int
) -> tuple[U64, U64, npt.NDArray[np.float32]]:
    if len(keys) <= count:
        return keys, ids, values
    chosen = np.sort(np.argpartition(keys, count - 1)[:count])
    return keys[chosen], ids[chosen], values[:, chosen]
