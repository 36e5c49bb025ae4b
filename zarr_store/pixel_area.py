"""`PixelAreas` gives the area on the ground of the pixels of a grid, for areas of classes and polygons."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from pyproj import CRS, Proj

from zarr_store.grid import Grid

__all__ = ["PixelAreas"]

Floats = npt.NDArray[np.float64]

_DISTORTED = 0.01
"""Largest error of the nominal area that is accepted. UTM stays below 0.3 % in its zone; Web Mercator does not."""
_NODES = 17
"""Places along a row, and along a column, at which the scale of a projection is computed."""


@dataclass(frozen=True)
class PixelAreas:
    """Areas of pixels in square metres.

    - In degrees: the area on the ellipsoid between the parallels and meridians of the pixel.
    - In a projection: width × height, as is usual for UTM; where that is wrong by more than 1 % anywhere on the grid,
      as in Web Mercator, it is divided by the projection's areal scale.

    Args:
        grid: The grid.

    >>> PixelAreas(Grid("EPSG:32633", (10.0, 0.0, 6e5, 0.0, -10.0, 5e6), (2, 3))).rows(0, 1)
    array([[100.]])
    """

    grid: Grid

    def rows(self, start: int, stop: int) -> Floats:
        """Return the areas of rows start … stop − 1, of shape (rows or 1, columns or 1), which broadcasts to theirs."""
        if self._crs.is_geographic:
            return self._between_parallels(start, stop)
        if self._scale is None:
            return np.full((1, 1), self._nominal)
        return self._nominal / self._scale_of(start, stop)

    @cached_property
    def _crs(self) -> CRS:
        return CRS.from_user_input(self.grid.crs)

    @cached_property
    def _nominal(self) -> float:
        """Width × height of a pixel of a projection, m²."""
        width, height = self.grid.resolution
        return width * height / self.grid.units_per_metre**2

    def _between_parallels(self, start: int, stop: int) -> Floats:
        _, _, _, _, e, f = self.grid.transform
        unit = self._crs.axis_info[0].unit_conversion_factor  # radians in a unit of the CRS
        edges = np.clip((f + e * np.arange(start, stop + 1)) * unit, -math.pi / 2, math.pi / 2)
        ellipsoid = self._crs.ellipsoid
        assert ellipsoid is not None
        major, minor = ellipsoid.semi_major_metre, ellipsoid.semi_minor_metre
        below = _area_from_equator(np.sin(edges), major, minor)
        areas: Floats = (below[:-1] - below[1:]) * self.grid.transform[0] * unit
        return areas[:, np.newaxis]

    @cached_property
    def _scale(self) -> tuple[Floats, Floats, Floats] | None:
        """Areal scale at some rows and columns; None where it is 1 within the accepted error."""
        height, width = self.grid.shape
        at_y, at_x = np.linspace(0, height, _NODES), np.linspace(0, width, _NODES)
        a, _, c, _, e, f = self.grid.transform
        proj = Proj(self._crs)
        lon, lat = proj(*np.meshgrid(c + a * at_x, f + e * at_y), inverse=True)
        scale = np.asarray(proj.get_factors(lon, lat, errcheck=False).areal_scale, np.float64)
        if not np.isfinite(scale).all() or np.abs(scale - 1).max() <= _DISTORTED:
            return None
        return at_y, at_x, scale

    def _scale_of(self, start: int, stop: int) -> Floats:
        """Interpolate the areal scale at the pixels of some rows."""
        assert self._scale is not None
        at_y, at_x, scale = self._scale
        rows, columns = np.arange(start, stop) + 0.5, np.arange(self.grid.width) + 0.5
        by_row = np.stack([np.interp(rows, at_y, scale[:, at]) for at in range(_NODES)], axis=1)
        return np.stack([np.interp(columns, at_x, row) for row in by_row])


def _area_from_equator(sine: Any, major: float, minor: float) -> Any:
    """Return the area between the equator and a parallel, per radian of longitude, m².

    Formula: Snyder (1987), Map Projections: A Working Manual, eq. 3-12, times a²/2.
    """
    squared = 1 - (minor / major) ** 2
    if squared <= 0:
        return major**2 * sine
    e = math.sqrt(squared)
    q = (1 - squared) * (sine / (1 - squared * sine**2) + np.arctanh(e * sine) / e)
    return major**2 / 2 * q
