"""Units of a CRS on the Earth: their length in metres at a place, and the turn after which x begins again.

A unit of EPSG:3857 is a metre at the equator and half a metre at 60° N; a degree of longitude shrinks in the same way.
And longitudes of 179.9 and -179.9 are neighbours, so a grid across the antimeridian counts on beyond 180.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import numpy.typing as npt
from pyproj import Geod, Transformer

from zarr_store.crs import parse_crs
from zarr_store.grid import Grid

__all__ = ["ground_scale", "ground_scale_at", "turn_of", "turn_towards", "turned_near"]

_NOMINAL = 0.01
"""Largest deviation from the nominal length of a unit that is not followed: that of UTM is below 0.2 %."""
_STEP_M = 100.0
"""Distance over which a scale is measured to each side, metres."""
_GEOD = Geod(ellps="WGS84")


def ground_scale(grid: Grid) -> tuple[float, float]:
    """Return the metres on the ground in one unit of a grid's CRS along (x, y), in the middle of the grid.

    >>> metres = Grid("EPSG:3857", (10, 0, 1_669_000, 0, -10, 8_400_000), (100, 100))  # near 60° N
    >>> [round(scale, 1) for scale in ground_scale(metres)]
    [0.5, 0.5]
    """
    left, bottom, right, top = grid.bounds
    return ground_scale_at(grid.crs, (left + right) / 2.0, (bottom + top) / 2.0)


@functools.lru_cache(maxsize=4096)
def ground_scale_at(crs: str, x: float, y: float) -> tuple[float, float]:
    """Return the metres on the ground in one unit of a CRS along (x, y), at a point in coordinates of the CRS.

    The nominal length is given where the true one is within 1 % of it, as everywhere in UTM, and where the point has no
    place on the Earth.
    """
    nominal = 1.0 / Grid(crs, (1.0, 0.0, 0.0, 0.0, -1.0, 0.0), (1, 1)).units_per_metre
    step = _STEP_M / nominal
    lon, lat = _to_lonlat(crs).transform([x - step, x + step, x, x], [y, y, y - step, y + step])
    if not (np.isfinite(lon).all() and np.isfinite(lat).all()):
        return nominal, nominal
    _, _, metres = _GEOD.inv([lon[0], lon[2]], [lat[0], lat[2]], [lon[1], lon[3]], [lat[1], lat[3]])
    along = (float(metres[0]) / (2 * step), float(metres[1]) / (2 * step))
    if not all(math.isfinite(scale) and scale > 0 for scale in along):
        return nominal, nominal
    if all(abs(scale / nominal - 1.0) <= _NOMINAL for scale in along):
        return nominal, nominal
    return along


@functools.lru_cache(maxsize=64)
def turn_of(crs: str) -> float:
    """Return the distance in units of a CRS after which x is at the same place again; 0 where there is none, as in UTM.

    >>> turn_of("EPSG:4326"), round(turn_of("EPSG:3857")), turn_of("EPSG:32633")
    (360.0, 40075017, 0.0)
    """
    parsed = parse_crs(crs)
    if parsed.is_geographic:
        return 2.0 * math.pi / parsed.axis_info[0].unit_conversion_factor if parsed.axis_info else 0.0
    operation = parsed.coordinate_operation
    if operation is None or parsed.ellipsoid is None or not parsed.is_projected:
        return 0.0
    words = operation.method_name.lower()
    if not ("mercator" in words or "cylindrical" in words) or "transverse" in words or "oblique" in words:
        return 0.0  # x is no multiple of the longitude
    x, _ = Transformer.from_crs("EPSG:4326", parsed, always_xy=True).transform([-1.0, 1.0], [0.0, 0.0])
    return float(abs(x[1] - x[0])) * 180.0


def turn_towards(grid: Grid, target: Grid) -> Grid:
    """Return the grid, moved by whole turns to the side of the antimeridian on which `target` lies; both share a CRS.

    >>> east = Grid("EPSG:4326", (0.5, 0, 179, 0, -0.5, 10), (4, 8))  # 179 … 183
    >>> turn_towards(Grid("EPSG:4326", (0.5, 0, -180, 0, -0.5, 10), (4, 4)), east).bounds
    (180.0, 8.0, 182.0, 10.0)
    """
    turn = turn_of(grid.crs)
    if not turn or grid.crs != target.crs:
        return grid
    turns = round((_middle(target) - _middle(grid)) / turn)
    a, b, c, d, e, f = grid.transform
    return Grid(grid.crs, (a, b, c + turns * turn, d, e, f), grid.shape) if turns else grid


def turned_near(x: npt.NDArray[np.float64], middle: float, turn: float) -> npt.NDArray[np.float64]:
    """Return coordinates, each moved by whole turns to be nearest to `middle`; unchanged where `turn` is 0."""
    return x - np.round((x - middle) / turn) * turn if turn else x


def _middle(grid: Grid) -> float:
    return (grid.bounds[0] + grid.bounds[2]) / 2.0


@functools.lru_cache(maxsize=64)
def _to_lonlat(crs: str) -> Transformer:
    return Transformer.from_crs(crs, "EPSG:4326", always_xy=True)
