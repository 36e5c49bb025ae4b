"""`find_places` groups the flagged pixels of a mask into places, strip by strip, and ranks them by score."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from zarr_store.crs import transformer_between
from zarr_store.grid import Grid

__all__ = ["Place", "find_places"]

_STRIP = 512


@dataclass(frozen=True)
class Place:
    """One place where something is unusual.

    Attributes:
        rank: 1 is the most unusual.
        x, y: Pixel of the largest score, in the CRS of the data; nan where that is not known.
        lon, lat: The same in degrees.
        date: Date or dates that were looked at.
        score: Largest score.
        mean_score: Mean of its scores.
        pixels: Number of flagged pixels; vectors count as one.
        area_m2: Their area; nan where that is not known.
        box: (left, bottom, right, top) around its pixels, in the CRS of the data; nan where that is not known.
        row, column: The pixel of the largest score in the grid; of samples and vectors, their number and -1.
        name: Name of the sample, if it has one.
    """

    rank: int
    x: float
    y: float
    lon: float
    lat: float
    date: str
    score: float
    mean_score: float
    pixels: int
    area_m2: float
    box: tuple[float, float, float, float]
    row: int
    column: int
    name: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)


class _Groups:
    """Sums over connected pixels, joined as strips show that two groups are one."""

    def __init__(self) -> None:
        self.parent: list[int] = []
        self.sums: list[list[float]] = []  # pixels, sum, largest, row and column of it, y0, y1, x0, x1

    def add(self, sums: list[float]) -> int:
        self.parent.append(len(self.parent))
        self.sums.append(sums)
        return len(self.parent) - 1

    def root(self, at: int) -> int:
        while self.parent[at] != at:
            self.parent[at] = self.parent[self.parent[at]]
            at = self.parent[at]
        return at

    def join(self, one: int, other: int) -> None:
        one, other = sorted((self.root(one), self.root(other)))
        if one == other:
            return
        self.parent[other] = one
        a, b = self.sums[one], self.sums[other]
        best = a if (-a[2], a[3], a[4]) <= (-b[2], b[3], b[4]) else b
        self.sums[one] = [a[0] + b[0], a[1] + b[1], *best[2:5], min(a[5], b[5]), max(a[6], b[6]),
                          min(a[7], b[7]), max(a[8], b[8])]  # fmt: skip


def find_places(
    grid: Grid,
    read: Callable[[slice], tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]],
    *,
    date: str,
    most: int,
    least_pixels: int = 1,
) -> tuple[tuple[Place, ...], int]:
    """Group flagged pixels that touch, also at corners.

    Args:
        grid: Grid of the mask.
        read: Returns scores and mask of some rows.
        date: Date or dates that were looked at.
        most: Most places that are returned.
        least_pixels: Smallest number of pixels of a place.

    Returns:
        The places by falling score, and the number of all of them.
    """
    from scipy import ndimage

    groups = _Groups()
    above: npt.NDArray[np.int64] | None = None
    for y0 in range(0, grid.height, _STRIP):
        scores, mask = read(slice(y0, min(y0 + _STRIP, grid.height)))
        labels, count = ndimage.label(mask, np.ones((3, 3), int))
        numbers = np.full(count + 1, -1, np.int64)
        for at, box in enumerate(ndimage.find_objects(labels)):
            inside = labels[box] == at + 1
            values = np.where(inside, scores[box], -np.inf)
            row, column = np.unravel_index(int(values.argmax()), values.shape)
            numbers[at + 1] = groups.add(
                [float(inside.sum()), float(values[inside].sum(dtype=np.float64)), float(values.max()),
                 y0 + box[0].start + int(row), box[1].start + int(column),
                 y0 + box[0].start, y0 + box[0].stop, box[1].start, box[1].stop]
            )  # fmt: skip
        here = numbers[labels]
        if above is not None:
            for shift in (-1, 0, 1):
                upper = above[max(0, shift) : grid.width + min(0, shift)]
                lower = here[0, max(0, -shift) : grid.width + min(0, -shift)]
                for pair in np.unique(np.stack([upper, lower])[:, (upper >= 0) & (lower >= 0)], axis=1).T:
                    groups.join(int(pair[0]), int(pair[1]))
        above = here[-1]
    roots = [sums for at, sums in enumerate(groups.sums) if groups.root(at) == at and sums[0] >= least_pixels]
    roots.sort(key=lambda sums: (-sums[2], sums[3], sums[4]))
    return tuple(_place(grid, rank + 1, sums, date) for rank, sums in enumerate(roots[:most])), len(roots)


def _place(grid: Grid, rank: int, sums: list[float], date: str) -> Place:
    pixels, total, largest = sums[:3]
    row, column, y0, y1, x0, x1 = (int(value) for value in sums[3:])
    a, _, c, _, e, f = grid.transform
    x, y = c + (column + 0.5) * a, f + (row + 0.5) * e
    lon, lat = transformer_between(grid.crs, "OGC:CRS84").transform(x, y)
    return Place(
        rank, x, y, float(lon), float(lat), date, largest, total / pixels, int(pixels),
        pixels * abs(a * e) / grid.units_per_metre**2, (c + x0 * a, f + y1 * e, c + x1 * a, f + y0 * e), row, column,
    )  # fmt: skip
