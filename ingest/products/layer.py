"""`ClassLayer` is a finished map of classes as the products see it: read in strips, so that memory stays bounded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from zarr_store.grid import Grid
from zarr_store.pixel_area import PixelAreas

__all__ = ["STRIP", "ClassLayer"]

STRIP = 512
"""Rows of a strip: those of a chunk of a map."""

ReadRows = Callable[[slice], npt.NDArray[Any]]


@dataclass(frozen=True)
class ClassLayer:
    """One date of a map of classes.

    Attributes:
        grid: Its grid.
        names: Class names, by value.
        colours: (red, green, blue) of each class.
        nodata: Value of pixels without a class.
        read: Reads rows of the classes, (rows, x).
        confidence: Reads rows of the confidence in per cent, (rows, x); None where the map has none.
    """

    grid: Grid
    names: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]
    nodata: int
    read: ReadRows
    confidence: ReadRows | None = None

    def strips(self) -> Iterator[slice]:
        """Yield the rows of each strip, from north to south."""
        for row in range(0, self.grid.height, STRIP):
            yield slice(row, min(row + STRIP, self.grid.height))

    def areas(self) -> npt.NDArray[np.float64]:
        """Return the mapped area of each class on the ground, square metres."""
        pixel, found = PixelAreas(self.grid), np.zeros(len(self.names))
        for rows in self.strips():
            classes = self.read(rows)
            has = classes < len(self.names)
            weight = np.broadcast_to(pixel.rows(rows.start, rows.stop), classes.shape)
            found += np.bincount(classes[has], weights=weight[has], minlength=len(self.names))
        return found
