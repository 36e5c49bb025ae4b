"""`outline_of` is the edge of a grid in longitude and latitude, as GeoJSON and STAC want it.

Edges of a projected grid are curved there, so the ring has points between the corners. A grid over the antimeridian has
two parts, and one over a pole reaches up to it (RFC 7946, section 3.1.9).
"""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from zarr_store.crs import transformer_between
from zarr_store.grid import Grid

__all__ = ["outline_of"]

_PARTS = 24
"""Parts of each edge: along 100 km of UTM the ring is less than 10 m from the true edge."""
_DIGITS = 7
"""Decimals of degrees: about a centimetre."""


def outline_of(grid: Grid) -> tuple[dict[str, Any], list[float]] | None:
    """Return the edge of a grid as a GeoJSON geometry, and its box (west, south, east, north) in degrees.

    West is larger than east where the grid crosses the antimeridian.

    Args:
        grid: The grid.

    Returns:
        Geometry and box; None where the grid has points without a place on the Earth.

    >>> fiji = Grid("EPSG:4326", (1.0, 0, 179, 0, -1.0, -16), (2, 2))
    >>> shape, box = outline_of(fiji)
    >>> shape["type"], box
    ('MultiPolygon', [179.0, -18.0, -179.0, -16.0])
    """
    import shapely

    ring = _ring(grid)
    if ring is None:
        return None
    longitude = np.unwrap(ring[:, 0], period=360.0)
    turns = round(float(longitude[-1] - longitude[0]) / 360.0)
    points = np.stack([longitude, ring[:, 1]], axis=1)
    if turns:  # the ring goes around a pole
        pole = 90.0 if ring[:, 1].mean() > 0 else -90.0
        points = np.concatenate([points, [[longitude[-1], pole], [longitude[0], pole]]])
    whole = shapely.make_valid(shapely.Polygon(points))
    middle = (whole.bounds[0] + whole.bounds[2]) / 2.0
    home = -360.0 * round(middle / 360.0)
    world = shapely.box(-180.0, -90.0, 180.0, 90.0)
    pieces = [
        shapely.intersection(shapely.transform(whole, partial(np.add, (home + turn, 0.0))), world)
        for turn in (-360.0, 0.0, 360.0)
    ]
    parts = [part for piece in pieces for part in getattr(piece, "geoms", [piece]) if part.area > 0]
    if not parts:
        return None
    joined = shapely.set_precision(shapely.union_all(parts), 10.0**-_DIGITS)
    joined = shapely.orient_polygons(joined)
    geometry: dict[str, Any] = json.loads(shapely.to_geojson(joined))
    return {"type": geometry["type"], "coordinates": _rounded(geometry["coordinates"])}, _box(joined)


def _ring(grid: Grid) -> npt.NDArray[np.float64] | None:
    """Return the edge from the upper left corner, closed, as (longitude, latitude); None where it leaves the Earth."""
    left, bottom, right, top = grid.bounds
    along = np.arange(_PARTS) / _PARTS
    none, whole = along * 0.0, along * 0.0 + 1.0
    end = np.zeros(1)
    x = left + (right - left) * np.concatenate([none, along, whole, 1.0 - along, end])
    y = top - (top - bottom) * np.concatenate([along, whole, 1.0 - along, none, end])
    longitude, latitude = transformer_between(grid.crs, "EPSG:4326").transform(x, y)
    ring = np.stack([np.asarray(longitude, np.float64), np.asarray(latitude, np.float64)], axis=1)
    return ring if np.isfinite(ring).all() and (np.abs(ring[:, 1]) <= 90.0 + 1e-9).all() else None


def _box(geometry: Any) -> list[float]:
    """Return the box of parts between -180° and 180°; those at its two ends are one area over the antimeridian."""
    west, south, east, north = geometry.bounds
    parts = [part.bounds for part in getattr(geometry, "geoms", [geometry])]
    eastern = [bounds for bounds in parts if bounds[2] >= 180.0 - 1e-9]
    western = [bounds for bounds in parts if bounds[0] <= -180.0 + 1e-9]
    if len(parts) > 1 and eastern and western and len(eastern) + len(western) == len(parts):
        west, east = min(bounds[0] for bounds in eastern), max(bounds[2] for bounds in western)
    return [round(float(value), _DIGITS) for value in (west, south, east, north)]


def _rounded(value: Any) -> Any:
    return round(value, _DIGITS) if isinstance(value, float | int) else [_rounded(one) for one in value]
