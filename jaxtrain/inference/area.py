"""`Area` is the part of a grid that a map is made of: the pixels whose centres lie inside polygons."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from zarr_store.errors import InvalidInput
from zarr_store.grid import Grid

__all__ = ["Area"]

Ring = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Area:
    """Polygons in pixels of a grid.

    Attributes:
        polygons: Rings of each polygon as (x, y), in pixels from the corner of the grid: the outer one, then holes.
    """

    polygons: tuple[tuple[Ring, ...], ...]

    @classmethod
    def on_grid(cls, polygons: Iterable[Sequence[Any]], grid: Grid, name: str) -> Self:
        """Take polygons in the CRS of a grid.

        Args:
            polygons: Rings of each polygon, arrays (N, 2) of (x, y).
            grid: The grid.
            name: The source of the polygons, for the message.

        Raises:
            InvalidInput: No pixel centre of the grid lies inside a polygon.
        """
        back = ~grid.affine

        def ring(points: Any) -> Ring:
            x, y = np.asarray(points, float)[:, :2].T
            columns, rows = back.a * x + back.b * y + back.c, back.d * x + back.e * y + back.f
            return tuple(zip(columns.tolist(), rows.tolist(), strict=True))

        made = cls(tuple(tuple(ring(points) for points in rings) for rings in polygons))
        height, width = grid.shape
        if not any(made.mask(y, min(y + 512, height), 0, width).any() for y in range(0, height, 512)):
            raise InvalidInput(
                f"{name} covers no pixel of the cube, whose grid is {height}×{width} pixels of {grid.crs} with the "
                f"bounds {', '.join(f'{bound:g}' for bound in grid.bounds)}; give an area that overlaps them"
            )
        return made

    def to_list(self) -> list[Any]:
        """Return the JSON form."""
        return [[[list(point) for point in ring] for ring in rings] for rings in self.polygons]

    @classmethod
    def from_list(cls, data: Iterable[Any]) -> Self:
        """Make the area from its JSON form, which `to_list` returns."""
        return cls(tuple(tuple(tuple((float(x), float(y)) for x, y in ring) for ring in rings) for rings in data))

    @cached_property
    def _edges(self) -> list[npt.NDArray[np.float64]]:
        """Edges of each polygon, (N, 4): x and y of the upper end, then of the lower one; level edges are left out."""
        found = []
        for rings in self.polygons:
            edges = []
            for ring in rings:
                points = np.array(ring)
                edges.append(np.concatenate([points, np.roll(points, -1, axis=0)], axis=1))
            every = np.concatenate(edges)
            every = np.where((every[:, 1] > every[:, 3])[:, None], every[:, [2, 3, 0, 1]], every)
            found.append(every[every[:, 1] != every[:, 3]])
        return found

    def mask(self, y0: int, y1: int, x0: int, x1: int) -> npt.NDArray[np.bool_]:
        """Return which pixels of a box have their centre inside a polygon, (y1 - y0, x1 - x0).

        A centre is inside where a line to it from the left crosses the rings an odd number of times.
        """
        inside = np.zeros((y1 - y0, x1 - x0), bool)
        for edges in self._edges:
            # an edge crosses the rows of centres from its upper end on, and before its lower end
            first = np.maximum(np.ceil(edges[:, 1] - 0.5), y0).astype(np.int64)
            last = np.minimum(np.ceil(edges[:, 3] - 0.5), y1).astype(np.int64)
            chosen = (last > first) & (np.minimum(edges[:, 0], edges[:, 2]) < x1)
            if not chosen.any():
                continue
            edges, first, count = edges[chosen], first[chosen], (last - first)[chosen]
            edge = np.repeat(np.arange(len(edges)), count)
            row = np.arange(len(edge)) - np.repeat(np.cumsum(count) - count, count) + np.repeat(first, count)
            upper_x, upper_y, lower_x, lower_y = edges[edge].T
            x = upper_x + (row + 0.5 - upper_y) * (lower_x - upper_x) / (lower_y - upper_y)
            column = np.clip(np.ceil(x - 0.5), x0, x1).astype(np.int64)  # the first centre right of the crossing
            crossings = np.zeros((y1 - y0, x1 - x0 + 1), np.int32)
            np.add.at(crossings, (row - y0, column - x0), 1)
            inside |= crossings.cumsum(axis=1)[:, :-1] % 2 == 1
        return inside
