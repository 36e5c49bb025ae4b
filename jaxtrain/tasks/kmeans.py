"""k-means of a table: seeds on a sample, then Lloyd's algorithm or mini-batches over all rows, from block to block.

Lloyd (1982, doi:10.1109/TIT.1982.1056489); mini-batches after Sculley (2010, doi:10.1145/1772690.1772862).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from jaxtrain.tasks.assign import Assigned, assign_rows
from jaxtrain.tasks.cells import assign_cells, make_cells
from jaxtrain.tasks.moments import Moments
from jaxtrain.tasks.sampling import sample_rows
from jaxtrain.tasks.scaling import Scaling
from jaxtrain.tasks.seeding import SampleFit, fit_sample, plus_plus, seed_parallel
from jaxtrain.tasks.table import Table
from jaxtrain.tasks.work import TableRef, Workers
from zarr_store.errors import InvalidInput

__all__ = ["MOST_CLUSTERS", "Fit", "Progress", "Seeding", "fit_kmeans", "seed_centres"]

F64 = npt.NDArray[np.float64]
Seeding = Literal["k-means++", "k-means||"]
MOST_CLUSTERS = 254
_STARTS = 4
"""Number of draws of k-means++ on the sample; the best one starts."""
_GROUP = 4
"""Blocks of a mini-batch: a fixed number, so that the answer does not depend on who computes."""

_PARTS = (1 << 18, 1 << 22)
"""Rows of the parts on which centres move first, so that few passes over all rows are left."""
_PART_VALUES = 1 << 24
"""Most numbers of a part: 64 MB, which are kept between passes beside the blocks."""
_WORTH = 4
"""Smallest number of rows for each row of a part: with fewer, passes over the part cost as much as they save."""


@dataclass(frozen=True)
class Fit:
    """The state of a fit, which is enough to continue it.

    Attributes:
        centres: float64 (k, scaled).
        iterations: Passes done.
        inertia: Sum of squared scaled distances in the last pass, to the centres before it.
        count: int64 (k,) rows of each centre in the last pass; of mini-batches, in all of them.
        done: Whether the centres no longer move by more than the tolerance.
    """

    centres: F64
    iterations: int = 0
    inertia: float = float("nan")
    count: npt.NDArray[np.int64] | None = None
    done: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        count = None if self.count is None else self.count.tolist()
        inertia = self.inertia if np.isfinite(self.inertia) else None
        return {"centres": self.centres.tolist(), "iterations": self.iterations, "inertia": inertia,
                "count": count, "done": self.done}  # fmt: skip

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Fit:
        """Make the object from its JSON form, which `to_dict` returns."""
        count = None if data["count"] is None else np.array(data["count"], np.int64)
        inertia = float("nan") if data["inertia"] is None else float(data["inertia"])
        return cls(np.array(data["centres"], np.float64), int(data["iterations"]), inertia, count, bool(data["done"]))


Progress = Callable[[Fit], None]


@dataclass(frozen=True)
class _StepJob:
    ref: TableRef
    scaling: Scaling
    centres: F64
    final: bool = False
    by_cells: bool = False
    every: int = 1

    def __call__(self, number: int) -> Assigned:
        values = self._values(number)
        if self.by_cells:
            name = "cells" if self.every == 1 else f"cells of every {self.every}th"
            cells = self.ref.keep(name, number, lambda: make_cells(values, device=number))
            if cells is not None:
                return assign_cells(values, cells, self.scaling, self.centres, device=number)
        found = assign_rows(values, self.scaling, self.centres, device=number, final=self.final)
        # iterations need no labels, and those of a whole cube would fill the memory
        return found._replace(labels=found.labels[:0], nearness=found.nearness[:0])

    def _values(self, number: int) -> npt.NDArray[np.float32]:
        if self.every == 1:
            return self.ref.block(number).values
        # a part of the rows is kept where whole blocks may not be
        return self.ref.keep(
            f"every {self.every}th", number,
            lambda: np.ascontiguousarray(self.ref.block(number).values[:, number % self.every :: self.every]),
        )  # fmt: skip


def seed_centres(
    table: Table, scaling: Scaling, sample: F64, k: int, *, rows: int, seed: int, seeding: Seeding, workers: Workers
) -> F64:
    """Return the first centres.

    Args:
        table: The rows.
        scaling: Scaling of the rows.
        sample: Scaled rows of the table (row, scaled).
        k: Number of centres.
        rows: Number of rows of the table.
        seed: Seed of the draws.
        seeding: The rule.
        workers: Workers that read the blocks, for k-means‖.

    Raises:
        InvalidInput: There are fewer than k distinct rows.
    """
    check_distinct(sample, k, rows, table.url)
    rng = np.random.default_rng(seed)
    if seeding == "k-means||":
        first = sample[rng.integers(len(sample))][None]
        centres = seed_parallel(table, scaling, k, first, seed, workers)
        if len(centres) == k:
            return centres
    fits = [fit_sample(sample, plus_plus(sample, k, rng), iterations=5) for _ in range(_STARTS)]
    best = min(fits, key=lambda fit: fit.inertia)
    return fit_sample(sample, best.centres).centres


def check_distinct(sample: F64, k: int, rows: int, url: str) -> None:
    """Refuse more centres than there are distinct rows."""
    distinct = len(np.unique(sample, axis=0))
    if distinct < k:
        where = "" if rows == len(sample) else f" in a sample of {len(sample):,}; a larger --sample may hold more"
        raise InvalidInput(
            f"-k {k}: {url} has {distinct} distinct row{'' if distinct == 1 else 's'} of {rows:,}{where}, and each "
            "cluster needs one; give a smaller -k"
        )


def fit_kmeans(
    table: Table,
    scaling: Scaling,
    start: Fit,
    moments: Moments,
    workers: Workers,
    *,
    iterations: int = 300,
    tolerance: float = 1e-4,
    mini_batch: bool = False,
    seed: int = 0,
    on_iteration: Progress | None = None,
) -> Fit:
    """Improve centres on all rows until they no longer move.

    Args:
        table: The rows.
        scaling: Scaling of the rows.
        start: First centres, or the state of a fit that was stopped.
        moments: Moments of the rows, for the scale of the tolerance.
        workers: Workers that compute the blocks.
        iterations: Most passes.
        tolerance: Squared shift of all centres at which the fit ends, in mean variances of the scaled features.
        mini_batch: Move the centres after every few blocks, not once in each pass.
        seed: Seed of the order of mini-batches.
        on_iteration: Called after each pass.
    """
    enough = tolerance * float(np.trace(scaling.matrix @ moments.scatter @ scaling.matrix.T)) / max(moments.count, 1)
    enough /= len(scaling.matrix)
    fit, ref = start, TableRef.of(table)
    if not fit.iterations and not mini_batch:
        for every in coarse_steps(moments.count, len(scaling.mean)):
            fit = start = replace(fit, centres=_move_on_part(ref, len(table), scaling, fit.centres, workers,
                                                             every, enough, iterations))  # fmt: skip
    while not fit.done and fit.iterations < iterations:
        if mini_batch:
            fit = _batches(ref, len(table), scaling, fit, workers, seed)
        else:
            fit = _lloyd(ref, len(table), scaling, fit, workers)
        moved = fit.centres
        shift = float(np.square(moved - start.centres).sum())
        start = fit
        fit = replace(fit, done=shift <= enough)
        if on_iteration:
            on_iteration(fit)
    return fit


def coarse_steps(rows: int, features: int) -> list[int]:
    """Return the steps of the parts of many rows on which centres move before they move on all: every n-th row.

    >>> coarse_steps(100_000_000, 4), coarse_steps(10_000_000, 4), coarse_steps(100_000, 4)
    ([381, 23], [38], [])
    """
    parts = (min(part, _PART_VALUES // features) for part in _PARTS)
    return list(dict.fromkeys(rows // part for part in parts if rows >= _WORTH * part))


def _move_on_part(
    ref: TableRef, blocks: int, scaling: Scaling, centres: F64, workers: Workers, every: int, enough: float, most: int
) -> F64:
    """Move centres by every n-th row until they no longer move, so that few passes over all rows are left."""
    fit = Fit(centres)
    for _ in range(most):
        before = fit.centres
        fit = _lloyd(ref, blocks, scaling, fit, workers, every)
        if float(np.square(fit.centres - before).sum()) <= enough:
            break
    return fit.centres


def _lloyd(ref: TableRef, blocks: int, scaling: Scaling, fit: Fit, workers: Workers, every: int = 1) -> Fit:
    # cells cost as much as some passes, and a good start may need one alone; the rule must not depend on what is kept
    by_cells = fit.iterations > 0
    count, total, inertia = _pass(ref, range(blocks), scaling, fit.centres, workers, by_cells=by_cells, every=every)
    centres = np.where(count[:, None] > 0, total / np.maximum(count, 1)[:, None], fit.centres)
    if not count.all():
        centres = _fill_empty(ref, blocks, scaling, centres, count, workers, every)
    return Fit(centres, fit.iterations + 1, inertia, count)


def _batches(ref: TableRef, blocks: int, scaling: Scaling, fit: Fit, workers: Workers, seed: int) -> Fit:
    """Do one pass in mini-batches: each centre moves to the mean of all rows that it has ever been given."""
    order = np.random.default_rng([seed, fit.iterations]).permutation(blocks).tolist()
    centres, inertia = fit.centres.copy(), 0.0
    seen = np.zeros(len(centres), np.int64) if fit.count is None else fit.count
    for at in range(0, blocks, _GROUP):
        group = order[at : at + _GROUP]
        count, total, part = _pass(ref, group, scaling, centres, workers, by_cells=fit.iterations > 0)
        seen, inertia = seen + count, inertia + part
        centres = centres + (total - count[:, None] * centres) / np.maximum(seen, 1)[:, None]
    return Fit(centres, fit.iterations + 1, inertia, seen)


def _pass(
    ref: TableRef,
    numbers: range | list[int],
    scaling: Scaling,
    centres: F64,
    workers: Workers,
    *,
    by_cells: bool,
    every: int = 1,
) -> tuple[npt.NDArray[np.int64], F64, float]:
    count, total, inertia = np.zeros(len(centres), np.int64), np.zeros_like(centres), 0.0
    for part in workers.map(_StepJob(ref, scaling, centres, by_cells=by_cells, every=every), numbers):
        count, total, inertia = count + part.members, total + part.total, inertia + part.inertia
    return count, total, inertia


def _fill_empty(
    ref: TableRef, blocks: int, scaling: Scaling, centres: F64, count: npt.NDArray[np.int64], workers: Workers,
    every: int = 1,
) -> F64:  # fmt: skip
    """Move each empty centre to the row that is farthest from its own, at most one of each block."""
    parts = workers.map(_StepJob(ref, scaling, centres, final=True, every=every), range(blocks))
    far = sorted((part.farthest for part in parts), key=lambda one: -one[0])
    centres = centres.copy()
    for at, (_, row) in zip(np.flatnonzero(count == 0), far, strict=False):
        centres[at] = row
    return centres


def sample_of(table: Table, scaling: Scaling, count: int, seed: int, workers: Workers) -> F64:
    """Draw rows of a table and scale them: float64 (row, scaled)."""
    return np.ascontiguousarray(scaling.apply(sample_rows(table, count, seed, workers).T).T)


def fit_of(fit: SampleFit) -> Fit:
    """Return the fit of a sample as one that is finished."""
    return Fit(fit.centres, 1, fit.inertia, np.bincount(fit.labels, minlength=len(fit.centres)), True)
