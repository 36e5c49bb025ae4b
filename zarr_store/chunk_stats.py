"""`ChunkStats`: the counts and moments of one chunk, made while its shard is written and kept in the ledger row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from zarr_store.spec import STATUS_MASKED, STATUS_MISSING, STATUS_OBSERVED

__all__ = ["ChunkStats"]

_FEW_CLASSES = 24
"""Largest number of class values that are compared one by one; a table is faster for more."""


@dataclass(frozen=True)
class ChunkStats:
    """Counts and moments of one chunk.

    Attributes:
        observed, masked, missing: Pixels of each status; a pixel with a number that is not finite is not observed.
        mean, m2: Per band, mean and sum of squared deviations over observed pixels.
        classes: Per class layer, value → pixels among those observed or masked.
    """

    observed: int
    masked: int
    missing: int
    mean: tuple[float, ...]
    m2: tuple[float, ...]
    classes: Mapping[str, Mapping[int, int]]

    @classmethod
    def of(cls, main: np.ndarray, status: np.ndarray, layers: Mapping[str, np.ndarray]) -> Self:
        """Compute the statistics of one chunk.

        Args:
            main: (time, band, y, x).
            status: (time, y, x).
            layers: Class layers, each (time, y, x) uint8.
        """
        status = np.ascontiguousarray(status)  # rows of a shard lie far apart, and each is read several times
        clear = status == STATUS_OBSERVED
        if main.dtype.kind == "f":
            clear &= np.isfinite(main).all(axis=1)
        observed = int(np.count_nonzero(clear))
        if observed == status.size:  # most chunks are clear as a whole, and need one pass
            mean, m2 = _moments(main, clear, observed)
            return cls(observed, 0, 0, mean, m2, {name: _class_counts(layer.ravel()) for name, layer in layers.items()})
        masked = status == STATUS_MASKED
        counted = observed + int(np.count_nonzero(masked))
        mean, m2 = _moments(main, clear, observed)
        seen = clear | masked
        classes = {}
        for name, layer in layers.items():
            classes[name] = _class_counts(layer.ravel() if counted == layer.size else layer[seen])
        missing = int(np.count_nonzero(status == STATUS_MISSING))
        return cls(observed, counted - observed, missing, mean, m2, classes)

    def to_list(self) -> list[Any]:
        """Return the JSON form, which is short as there is one for each chunk."""
        classes = {name: {str(k): v for k, v in counts.items()} for name, counts in self.classes.items()}
        return [self.observed, self.masked, self.missing, list(self.mean), list(self.m2), classes]

    @classmethod
    def from_list(cls, data: list[Any]) -> Self:
        """Make the statistics from the list that `to_list` returned."""
        observed, masked, missing, mean, m2, classes = data
        return cls(
            int(observed),
            int(masked),
            int(missing),
            tuple(map(float, mean)),
            tuple(map(float, m2)),
            {name: {int(k): int(v) for k, v in counts.items()} for name, counts in classes.items()},
        )


def _class_counts(layer: np.ndarray) -> dict[int, int]:
    """Count the pixels of each value of a flat layer; comparing with a few values is twice as fast as a table."""
    top = int(layer.max(initial=0))
    if top >= _FEW_CLASSES:
        counts = np.bincount(layer, minlength=256)
        return {int(value): int(counts[value]) for value in np.flatnonzero(counts)}
    found = ((value, int(np.count_nonzero(layer == value))) for value in range(top + 1))
    return {value: count for value, count in found if count}


def _moments(main: np.ndarray, clear: np.ndarray, observed: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and sum of squared deviations of each band over the clear pixels.

    Whole numbers are summed exactly: a chunk of up to 2²¹ pixels of 16 bits sums to less than 2⁵³ even when squared,
    so neither the order of summation nor the size of the mean costs a bit. Products are summed row by row: for a whole
    chunk at once BLAS would wake a thread on every core, and those then spin.
    """
    bands = main.shape[1]
    if not observed:
        return (0.0,) * bands, (0.0,) * bands
    if main.dtype.kind == "f" or main.dtype.itemsize > 2 or observed > 1 << 21:
        values = np.moveaxis(main, 1, 0)[:, clear].astype(np.float64)
        means = values.mean(axis=1)
        squares = np.square(values - means[:, None]).sum(axis=1)
        return tuple(float(v) for v in means), tuple(float(v) for v in squares)
    mean, m2 = [], []
    values = np.empty((main.shape[0], *main.shape[2:]))  # one for all bands: fresh memory costs more than the sums
    ones = np.ones(values.shape[-1])
    kept = clear.astype(np.float64) if observed < values.size else None
    for band in range(bands):
        values[...] = main[:, band]
        if kept is not None:
            values *= kept
        total, squared = int((values @ ones).sum()), int(np.vecdot(values, values).sum())
        mean.append(total / observed)
        m2.append((observed * squared - total * total) / observed)
    return tuple(mean), tuple(m2)
