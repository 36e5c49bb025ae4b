"""Count, mean and covariance of a table in one pass, and the principal components that follow from them.

Moments of blocks are joined in the order of the blocks in float64 (Chan, Golub & LeVeque 1979), so a cube of any size
takes the memory of one block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from jaxtrain.tasks.table import Table, check_features
from jaxtrain.tasks.work import TableRef, Workers

__all__ = ["Components", "Moments", "principal_components", "table_moments"]

F64 = npt.NDArray[np.float64]
_NUMBERS = 1 << 17
"""Numbers that are centred and multiplied at once: 1 MB, which stays in the cache of a core."""


@dataclass(frozen=True)
class Moments:
    """Count, mean and scatter of the rows of a table.

    Attributes:
        count: Number of rows.
        mean: float64 (feature,).
        scatter: float64 (feature, feature): sum of products of deviations from the mean.
    """

    count: int
    mean: F64
    scatter: F64

    @property
    def covariance(self) -> F64:
        """Covariance with the divisor n − 1."""
        return self.scatter / max(self.count - 1, 1)

    @property
    def std(self) -> F64:
        """Standard deviation of each feature with the divisor n, as scikit-learn's scaler has it; 1 where it is 0."""
        spread = np.sqrt(np.diag(self.scatter) / max(self.count, 1))
        return np.where(spread > 0, spread, 1.0)

    @classmethod
    def of(cls, rows: npt.NDArray[np.floating[Any]]) -> Moments:
        """Compute the moments of (feature, row), some rows at a time."""
        found = cls(0, np.zeros(len(rows)), np.zeros((len(rows), len(rows))))
        step = max(1024, _NUMBERS // max(len(rows), 1))
        for start in range(0, rows.shape[1], step):
            wide = rows[:, start : start + step].astype(np.float64)
            mean = wide.mean(axis=1)
            wide -= mean[:, None]
            found = found.join(cls(wide.shape[1], mean, wide @ wide.T))
        return found

    def join(self, other: Moments) -> Moments:
        """Return the moments of both sets of rows."""
        if not self.count or not other.count:
            return other if not self.count else self
        count = self.count + other.count
        apart = other.mean - self.mean
        scatter = self.scatter + other.scatter + np.outer(apart, apart) * (self.count * other.count / count)
        return Moments(count, self.mean + apart * (other.count / count), scatter)


@dataclass(frozen=True)
class _MomentsJob:
    ref: TableRef

    def __call__(self, number: int) -> tuple[Moments, npt.NDArray[np.int64], int]:
        block = self.ref.block(number)
        return Moments.of(block.values), block.finite, block.observed


def table_moments(table: Table, workers: Workers, *, on_block: Callable[[int, int], None] | None = None) -> Moments:
    """Compute the moments of all rows of a table.

    Raises:
        InvalidInput: A feature holds no number anywhere.
        NothingFound: The table has no row.
    """
    found = Moments.of(np.zeros((len(table.features), 0), np.float32))
    finite, observed = np.zeros(len(table.features), np.int64), 0
    for number, (moments, numbers, seen) in enumerate(workers.map(_MomentsJob(TableRef.of(table)), range(len(table)))):
        found, finite, observed = found.join(moments), finite + numbers, observed + seen
        if on_block:
            on_block(number + 1, len(table))
    check_features(table, found.count, finite, observed)
    return found


@dataclass(frozen=True)
class Components:
    """Principal components: directions of largest variance.

    Attributes:
        mean: float64 (feature,), which is taken off first.
        vectors: float64 (component, feature): unit vectors, by falling variance.
        variance: float64 (component,).
        ratio: float64 (component,): share of the variance of all features.
    """

    mean: F64
    vectors: F64
    variance: F64
    ratio: F64


def principal_components(moments: Moments, count: int, scale: F64 | None = None) -> Components:
    """Compute principal components from moments.

    Args:
        moments: Moments of the rows.
        count: Number of components.
        scale: Features are divided by it first; None leaves them as they are.

    Returns:
        Components whose largest coefficient is positive, so that their signs are fixed.
    """
    divisor = np.ones(len(moments.mean)) if scale is None else scale
    covariance = moments.covariance / np.outer(divisor, divisor)
    variance, vectors = np.linalg.eigh(covariance)
    order = np.argsort(variance)[::-1][:count]
    chosen = vectors[:, order].T
    largest = np.abs(chosen).argmax(axis=1)
    chosen = chosen * np.sign(chosen[np.arange(len(chosen)), largest])[:, None]
    values = np.clip(variance[order], 0.0, None)
    return Components(moments.mean, chosen, values, values / max(float(np.clip(variance, 0, None).sum()), 1e-300))
