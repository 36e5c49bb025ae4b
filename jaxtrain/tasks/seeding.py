"""First centres for k-means: k-means++ on a sample (Arthur & Vassilvitskii 2007), or k-means‖ over all rows.

k-means‖ (Bahmani et al. 2012) draws a few candidates in each of some passes, each row in proportion to its squared
distance from those before, and then clusters the candidates by the number of rows that are nearest to each.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from jaxtrain.tasks.sampling import uniform
from jaxtrain.tasks.scaling import Scaling
from jaxtrain.tasks.table import Table
from jaxtrain.tasks.work import TableRef, Workers

__all__ = ["SampleFit", "fit_sample", "plus_plus", "seed_parallel"]

F64 = npt.NDArray[np.float64]
_AT_ONCE = 1 << 14
_ROUNDS = 5


@dataclass(frozen=True)
class SampleFit:
    """k-means of rows in memory.

    Attributes:
        centres: float64 (k, feature).
        inertia: Sum of weighted squared distances to the nearest centre.
        labels: int64 (row,).
    """

    centres: F64
    inertia: float
    labels: npt.NDArray[np.int64]


def plus_plus(rows: F64, k: int, rng: np.random.Generator, weights: F64 | None = None) -> F64:
    """Draw k rows, each in proportion to its squared distance from those drawn before; the best of several tries.

    Args:
        rows: (row, feature), of which at least k are distinct.
        k: Number of centres.
        rng: Source of the draws.
        weights: Number of times that each row counts.
    """
    weights = np.ones(len(rows)) if weights is None else weights
    chosen = [_draw(weights, rng.random(1))[0]]
    nearest = _squares(rows, rows[chosen])[:, 0]
    tries = 2 + int(np.log(k))
    for _ in range(1, k):
        candidates = _draw(nearest * weights, rng.random(tries))
        after = np.minimum(nearest[:, None], _squares(rows, rows[candidates]))
        best = int((after * weights[:, None]).sum(axis=0).argmin())
        chosen.append(candidates[best])
        nearest = after[:, best]
    return rows[chosen]


def fit_sample(
    rows: F64, start: F64, *, weights: F64 | None = None, iterations: int = 100, tolerance: float = 1e-6
) -> SampleFit:
    """Run Lloyd's algorithm on rows in memory; an empty cluster keeps its centre."""
    weights = np.ones(len(rows)) if weights is None else weights
    centres = start.copy()
    enough = tolerance * float(rows.var(axis=0).mean())
    for _ in range(iterations):
        labels, _ = nearest_centres(rows, centres)
        count = np.bincount(labels, weights, len(centres))
        total = np.stack([np.bincount(labels, weights * column, len(centres)) for column in rows.T], axis=1)
        moved = np.where(count[:, None] > 0, total / np.maximum(count, 1e-300)[:, None], centres)
        shift = float(np.square(moved - centres).sum())
        centres = moved
        if shift <= enough:
            break
    labels, squares = nearest_centres(rows, centres)
    return SampleFit(centres, float((squares * weights).sum()), labels)


def nearest_centres(rows: F64, centres: F64) -> tuple[npt.NDArray[np.int64], F64]:
    """Return the nearest centre of each row and the squared distance; of two that are as near, the first."""
    labels, squares = np.empty(len(rows), np.int64), np.empty(len(rows))
    for start in range(0, len(rows), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        apart = _squares(rows[part], centres)
        labels[part] = apart.argmin(axis=1)
        squares[part] = np.take_along_axis(apart, labels[part][:, None], 1)[:, 0]
    return labels, squares


def _squares(rows: F64, centres: F64) -> F64:
    """Return squared distances (row, centre), feature by feature: no rounding depends on the threads of a library."""
    apart = np.zeros((len(rows), len(centres)))
    for at in range(rows.shape[1]):
        apart += np.square(rows[:, at, None] - centres[None, :, at])
    return apart


def _draw(weights: F64, drawn: F64) -> npt.NDArray[np.int64]:
    sums = np.cumsum(weights)
    drawn_rows: npt.NDArray[np.int64] = np.searchsorted(sums, drawn * sums[-1], side="right").astype(np.int64)
    return np.minimum(drawn_rows, len(weights) - 1)


@dataclass(frozen=True)
class _CandidateJob:
    """Draw the rows of a block with the smallest of −log(u) / d² (Efraimidis & Spirakis 2006)."""

    ref: TableRef
    scaling: Scaling
    candidates: F64
    count: int
    seed: int

    def __call__(self, number: int) -> tuple[F64, F64]:
        block = self.ref.block(number)
        rows = self.scaling.apply(block.values).T
        _, squares = nearest_centres(rows, self.candidates)
        with np.errstate(divide="ignore"):
            keys = -np.log(uniform(block.ids, self.seed)) / squares
        chosen = np.sort(np.argpartition(keys, self.count - 1)[: self.count]) if len(keys) > self.count else slice(None)
        return keys[chosen], rows[chosen]


@dataclass(frozen=True)
class _WeightJob:
    ref: TableRef
    scaling: Scaling
    candidates: F64

    def __call__(self, number: int) -> F64:
        labels, _ = nearest_centres(self.scaling.apply(self.ref.block(number).values).T, self.candidates)
        return np.bincount(labels, minlength=len(self.candidates)).astype(np.float64)


def seed_parallel(table: Table, scaling: Scaling, k: int, first: F64, seed: int, workers: Workers) -> F64:
    """Return k first centres by k-means‖: five passes that draw 2 k candidates each, and one that weighs them.

    Args:
        table: The rows.
        scaling: Scaling of the rows.
        k: Number of centres.
        first: The first candidate, (1, feature), scaled.
        seed: Seed of the draws.
        workers: Workers that read the blocks.
    """
    ref, candidates = TableRef.of(table), first
    for turn in range(_ROUNDS):
        keys, rows = np.zeros(0), np.zeros((0, first.shape[1]))
        job = _CandidateJob(ref, scaling, candidates, 2 * k, seed + 1 + turn)
        for more_keys, more_rows in workers.map(job, range(len(table))):
            keys, rows = np.concatenate([keys, more_keys]), np.concatenate([rows, more_rows])
            order = np.argsort(keys, kind="stable")[: 2 * k]
            keys, rows = keys[order], rows[order]
        candidates = np.concatenate([candidates, rows[np.isfinite(keys)]])
    candidates = np.unique(candidates, axis=0)
    weights = np.zeros(len(candidates))
    for counted in workers.map(_WeightJob(ref, scaling, candidates), range(len(table))):
        weights += counted
    if len(candidates) < k:
        return candidates
    rng = np.random.default_rng(seed)
    fits = [fit_sample(candidates, plus_plus(candidates, k, rng, weights), weights=weights) for _ in range(4)]
    return min(fits, key=lambda fit: fit.inertia).centres
