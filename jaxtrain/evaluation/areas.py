"""`estimate_areas` corrects the mapped area of each class by what the test data say about the map's errors.

Counting the pixels of a map gives a biased area: what the map confuses is counted in the wrong class. A confusion
matrix of reference samples corrects it and gives a standard error (stratified estimator; strata are the map's classes).

Source: Olofsson, Foody, Herold, Stehman, Woodcock & Wulder (2014), Good practices for estimating area and assessing
accuracy of land change, Remote Sensing of Environment 148, 42-57, eqs. 4-11.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from zarr_store.errors import InvalidInput

__all__ = ["AreaEstimates", "estimate_areas"]

Floats = NDArray[np.float64]

_Z95 = 1.959963984540054
"""Quantile of the normal distribution: estimate ± z · standard error is a 95 % confidence interval."""
_SAMPLE = "the test samples of each mapped class are an independent random sample of its area"


@dataclass(frozen=True)
class AreaEstimates:
    """Areas and accuracies of the classes of a map, with standard errors.

    Attributes:
        classes: Class names.
        mapped: Area that the map gives each class.
        area: Estimated area; nan for all if nothing was tested in a class that the map has.
        area_se: Its standard error.
        users, users_se: Share of the mapped class that is of the class.
        producers, producers_se: Share of the class that the map finds, by area.
        overall, overall_se: Share of the map that is right, by area.
        samples: Reference samples of each mapped class.
        untested: Classes that the map has and no sample tests.
    """

    classes: tuple[str, ...]
    mapped: Floats
    area: Floats
    area_se: Floats
    users: Floats
    users_se: Floats
    producers: Floats
    producers_se: Floats
    overall: float
    overall_se: float
    samples: NDArray[np.int64]
    untested: tuple[str, ...]

    @property
    def half_width(self) -> Floats:
        """Half the width of the 95 % confidence interval of each area."""
        return _Z95 * self.area_se

    def to_dict(self, *, per_unit: float = 1.0, unit: str = "ha") -> dict[str, Any]:
        """Return the JSON form.

        Args:
            per_unit: Divisor of the areas: 10 000 from square metres to hectares.
            unit: Unit of the areas, for the names of the keys.
        """
        rows = {}
        for at, name in enumerate(self.classes):
            half = self.half_width[at] / per_unit
            area = self.area[at] / per_unit
            rows[name] = {
                f"mapped_{unit}": _number(self.mapped[at] / per_unit, 4),
                f"area_{unit}": _number(area, 4),
                "se": _number(self.area_se[at] / per_unit, 4),
                "ci95": [_number(max(area - half, 0), 4), _number(area + half, 4)],
                "users_accuracy": _number(self.users[at]),
                "users_accuracy_se": _number(self.users_se[at]),
                "producers_accuracy": _number(self.producers[at]),
                "producers_accuracy_se": _number(self.producers_se[at]),
                "samples": int(self.samples[at]),
            }
        return {
            "unit": unit, "classes": rows, "overall_accuracy": _number(self.overall),
            "overall_accuracy_se": _number(self.overall_se), "untested": list(self.untested), "assumes": _SAMPLE,
        }  # fmt: skip


def estimate_areas(confusion: ArrayLike, mapped: ArrayLike, classes: Sequence[str] = ()) -> AreaEstimates:
    """Estimate the area of each class, and accuracies by area, from a confusion matrix and the areas of a map.

    Args:
        confusion: Counts of reference samples by true class (rows) and mapped class (columns).
        mapped: Area of each class on the map, in any unit.
        classes: Their names.

    Returns:
        The estimates. A class with one sample has no standard error (nan).

    Raises:
        InvalidInput: The shapes do not fit, a number is negative, or the map has no area.

    >>> made = estimate_areas([[90, 0], [10, 100]], [20.0, 80.0], ["water", "land"])
    >>> made.area.round(2).tolist(), made.half_width.round(2).tolist()
    ([18.0, 82.0], [1.18, 1.18])
    """
    counts, area = np.asarray(confusion, np.float64), np.asarray(mapped, np.float64)
    if counts.shape != (len(area), len(area)):
        raise InvalidInput(
            f"expected a confusion matrix of {len(area)} × {len(area)} classes, as the map has, got {counts.shape}"
        )
    if (counts < 0).any() or (area < 0).any() or not area.sum() > 0:
        raise InvalidInput("areas and counts must not be negative, and the map must have some area")
    names = tuple(classes) or tuple(map(str, range(len(area))))
    by_map = counts.T  # rows are strata, as in the paper
    samples = by_map.sum(axis=1)
    weight = area / area.sum()
    untested = tuple(name for name, n, w in zip(names, samples, weight, strict=True) if n == 0 and w > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = by_map / samples[:, np.newaxis]
        if not untested:
            share = np.where(samples[:, np.newaxis] == 0, 0.0, share)  # of no area, so of no weight
        users = np.where(samples > 0, np.diagonal(by_map) / samples, np.nan)
        spread = share * (1 - share) / np.where(weight > 0, samples - 1, np.inf)[:, np.newaxis]
        one_apart = np.diagonal(spread)
        parts = weight[:, np.newaxis] * share  # eq. 4
        true = parts.sum(axis=0)  # eq. 9
        area_var = (weight[:, np.newaxis] ** 2 * spread).sum(axis=0)  # eq. 10
        right = np.diagonal(parts)
        producers = np.where(true > 0, right / true, np.nan)
        # eq. 7, in shares of the whole area
        own = weight**2 * (1 - producers) ** 2 * one_apart
        others = (weight[:, np.newaxis] ** 2 * spread).sum(axis=0) - weight**2 * one_apart
        producers_var = np.where(true > 0, (own + producers**2 * others) / true**2, np.nan)
        overall_var = (weight**2 * one_apart).sum()  # eq. 5
        users_var = np.where(samples > 1, users * (1 - users) / (samples - 1), np.nan)  # eq. 6
    return AreaEstimates(
        names, area, true * area.sum(), np.sqrt(area_var) * area.sum(), users, np.sqrt(users_var), producers,
        np.sqrt(producers_var), float(right.sum()), math.sqrt(overall_var) if overall_var >= 0 else math.nan,
        samples.astype(np.int64), untested,
    )  # fmt: skip


def _number(value: float, digits: int = 6) -> float | None:
    return round(float(value), digits) if math.isfinite(value) else None
