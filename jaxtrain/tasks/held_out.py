"""Held-out ground, and the threshold that its scores give for a rate of false alarms."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from jaxtrain.tasks.sampling import uniform
from jaxtrain.tasks.table import Table
from jaxtrain.tasks.tables import CubeTable, SampleTable
from zarr_store.errors import InvalidInput

__all__ = ["HELD_OUT", "Fitted", "ScoreCounts", "held_out"]

HELD_OUT = 0.25
"""Share of the ground that is held out."""
_CELL = 64
"""Side of a cell of a cube that is held out as a whole: neighbouring pixels are too alike to test each other."""
_SHIFT = 12
"""Bits of a float32 that a bin leaves out: a threshold is exact to a part in two thousand."""
_LEAST_ABOVE = 10
"""Smallest number of held-out rows above the threshold that a rate needs."""


def held_out(table: Table, ids: npt.NDArray[np.uint64], seed: int) -> npt.NDArray[np.bool_]:
    """Return which rows are held out: whole cells of a cube, whole samples, or single vectors.

    Args:
        table: The table.
        ids: Numbers of the rows in the table.
        seed: Seed of the draw.
    """
    groups = ids
    if isinstance(table, CubeTable):
        width = np.uint64(table.reader.spec.grid.width)
        cells = width // np.uint64(_CELL) + np.uint64(1)
        groups = ids // (width * np.uint64(_CELL)) * cells + ids % width // np.uint64(_CELL)
    elif isinstance(table, SampleTable):
        groups = ids // np.uint64(np.prod(table.store.spec.size))
    chosen: npt.NDArray[np.bool_] = uniform(groups, seed + 1) < HELD_OUT
    return chosen


@dataclass(frozen=True)
class Fitted:
    """Choice of the rows that are not held out.

    Attributes:
        seed: Seed of the draw of the held-out ground.
    """

    seed: int

    def __call__(self, table: Table, ids: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        return ~held_out(table, ids, self.seed)


class ScoreCounts:
    """Counts of scores in fine bins, so that a quantile of any number of them takes 8 MB."""

    def __init__(self) -> None:
        self.counts = np.zeros(1 << (32 - _SHIFT), np.int64)

    def add(self, scores: npt.NDArray[np.float32]) -> None:
        """Count scores, which are not negative; NaN is left out."""
        # the bits of positive floats are in the order of their values
        bits = np.abs(scores[np.isfinite(scores)]).view(np.uint32) >> np.uint32(_SHIFT)
        self.counts += np.bincount(bits, minlength=len(self.counts))

    @property
    def total(self) -> int:
        """Number of scores."""
        return int(self.counts.sum())

    def threshold(self, rate: float, *, where: str) -> float:
        """Return the score that a share `rate` of the scores exceeds.

        Raises:
            InvalidInput: There are too few scores for so small a rate.
        """
        total = self.total
        if total * rate < _LEAST_ABOVE:
            needed = round(_LEAST_ABOVE / rate)
            raise InvalidInput(
                f"--false-alarms {rate:g}: an empirical threshold needs {needed:,} held-out rows, {where} has "
                f"{total:,}; give a larger rate, or --threshold chi2 for a method of RX"
            )
        above = np.cumsum(self.counts[::-1])[::-1]
        first = int(np.flatnonzero(above <= total * rate)[0])
        return float(np.array([first << _SHIFT], np.uint32).view(np.float32)[0])
