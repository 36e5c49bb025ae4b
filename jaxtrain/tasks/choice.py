"""Choose the number of clusters: inertia, silhouette and gap of each k on a sample, and the k that they suggest.

Silhouette: Rousseeuw (1987, doi:10.1016/0377-0427(87)90125-7). Gap: Tibshirani, Walther & Hastie (2001,
doi:10.1111/1467-9868.00293), with reference data in the box of the principal axes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from jaxtrain.tasks.seeding import fit_sample, plus_plus

__all__ = ["Choice", "choose_k", "silhouette"]

F64 = npt.NDArray[np.float64]
_REFERENCES = 5
_ROWS = 4096
"""Rows of the sample on which the curves are drawn."""
_SILHOUETTE_ROWS = 1500


@dataclass(frozen=True)
class Choice:
    """The curves of several k.

    Attributes:
        k: The numbers of clusters.
        inertia: Mean squared distance of a row to its centre.
        silhouette: Mean silhouette, −1 … 1.
        gap: Gap statistic.
        gap_error: Its standard error, with the factor for the simulation.
        suggested: The k to take.
        reason: Reason for the suggestion.
    """

    k: tuple[int, ...]
    inertia: tuple[float, ...]
    silhouette: tuple[float, ...]
    gap: tuple[float, ...]
    gap_error: tuple[float, ...]
    suggested: int
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)


def choose_k(
    sample: F64, numbers: Sequence[int], seed: int, *, on_k: Callable[[int, int], None] | None = None
) -> Choice:
    """Cluster a sample with each k and suggest one.

    Args:
        sample: Scaled rows (row, scaled), with at least max(numbers) distinct ones.
        numbers: The k to compare, ascending.
        seed: Seed of all draws.
        on_k: Called with (done, in all).
    """
    rows = sample[:_ROWS]
    rng = np.random.default_rng(seed)
    references = [_reference(rows, rng) for _ in range(_REFERENCES)]
    apart = _distances(rows[:_SILHOUETTE_ROWS])
    inertia, shape, gap, error = [], [], [], []
    for done, k in enumerate(numbers):
        fits = [fit_sample(rows, plus_plus(rows, k, rng), iterations=30) for _ in range(3)]
        best = min(fits, key=lambda fit: fit.inertia)
        logs = [np.log(max(fit_sample(one, plus_plus(one, k, rng), iterations=15).inertia, 1e-300))
                for one in references]  # fmt: skip
        inertia.append(best.inertia / len(rows))
        shape.append(silhouette(apart, best.labels[: len(apart)]))
        gap.append(float(np.mean(logs) - np.log(max(best.inertia, 1e-300))))
        error.append(float(np.std(logs) * np.sqrt(1 + 1 / len(logs))))
        if on_k:
            on_k(done + 1, len(numbers))
    suggested, reason = _suggest(list(numbers), shape, gap, error)
    return Choice(tuple(numbers), tuple(inertia), tuple(shape), tuple(gap), tuple(error), suggested, reason)


def _suggest(numbers: list[int], shape: list[float], gap: list[float], error: list[float]) -> tuple[int, str]:
    widest = numbers[int(np.argmax(shape))]
    said = f"the silhouette is largest at k = {widest} ({max(shape):.2f})"
    for at in range(len(numbers) - 1):
        if gap[at] >= gap[at + 1] - error[at + 1]:
            k = numbers[at]
            return k, (
                f"k = {k} is the smallest whose gap ({gap[at]:.3f}) is not exceeded by that of k = {numbers[at + 1]} "
                f"({gap[at + 1]:.3f}) by more than its error ({error[at + 1]:.3f}); {said}"
            )
    return widest, f"the gap still grows at k = {numbers[-1]}, so it decides nothing; {said}"


def silhouette(apart: F64, labels: npt.NDArray[np.int64]) -> float:
    """Return the mean silhouette of rows from their distances (row, row); rows alone in their cluster count 0."""
    k = int(labels.max()) + 1
    member = np.eye(k)[labels]
    count = member.sum(axis=0)
    if np.count_nonzero(count) < 2:
        return 0.0
    sums = apart @ member
    own = np.take_along_axis(sums, labels[:, None], 1)[:, 0] / np.maximum(count[labels] - 1, 1)
    others = np.where(count > 0, sums / np.maximum(count, 1), np.inf)
    others[np.arange(len(labels)), labels] = np.inf
    nearest = others.min(axis=1)
    score = np.where(count[labels] > 1, (nearest - own) / np.maximum(np.maximum(nearest, own), 1e-300), 0.0)
    return float(score.mean())


def _distances(rows: F64) -> F64:
    square = np.zeros((len(rows), len(rows)))
    for column in rows.T:
        square += np.square(column[:, None] - column[None])
    return np.sqrt(square)


def _reference(rows: F64, rng: np.random.Generator) -> F64:
    """Draw rows evenly from the box of the principal axes."""
    centre = rows.mean(axis=0)
    _, _, axes = np.linalg.svd(rows - centre, full_matrices=False)
    turned = (rows - centre) @ axes.T
    drawn: F64 = rng.uniform(turned.min(axis=0), turned.max(axis=0), turned.shape) @ axes + centre
    return drawn
