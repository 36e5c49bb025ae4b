"""Clipping: which pixels lie in the area of `--geometry`. The result for a pixel never depends on the window.

A pixel whose centre lies outside the area has no data (status 0). Points and lines have no area, so they only select
scenes and a box, as `--bbox` does.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely
from pyproj import Transformer
from shapely.affinity import translate
from shapely.geometry import box, mapping, shape
from shapely.geometry.base import BaseGeometry

from ingest.pixels.grid_area import MANY_VERTICES, GridArea, is_grid_area, sha_of
from zarr_store.grid import Grid
from zarr_store.ground import turn_of

__all__ = ["area_of", "clip_on", "clip_text", "inside_of", "is_outside", "reduced"]

_STEP_DEG = 0.01
"""Longest edge of a polygon before it is projected, degrees.

A straight line in degrees is a curve in metres. Cut every kilometre, it is within 3 cm of that curve at latitudes below
50°.
"""
_FEW_VERTICES = 1_000
"""Number of vertices that a reduced geometry may have."""
_ROWS = 256
"""Rows that are tested at once."""


def clip_text(geometry: Mapping[str, Any] | None) -> str | None:
    """Return the text in which tasks keep an area; None where the geometry has no area.

    >>> clip_text({"type": "Point", "coordinates": [15.9, 45.8]}) is None
    True
    """
    if geometry is None or not shape(dict(geometry)).area:
        return None
    return json.dumps(geometry, sort_keys=True, separators=(",", ":"))


def clip_on(clip: str | None, grid: Grid) -> str | None:
    """Return the text in which the tasks of a cube keep an area: short also where it has very many vertices.

    Args:
        clip: The area, from `clip_text`.
        grid: Grid of the cube.
    """
    if clip is None or is_grid_area(clip) or shapely.get_num_coordinates(shape(json.loads(clip))) <= MANY_VERTICES:
        return clip
    return GridArea.of(clip, _area_on(clip, grid.crs), grid).to_text()


def reduced(geometry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the geometry that a plan keeps among its settings: of very many vertices, only what a later search needs.

    It covers the whole geometry and a little more, and names its digest, so that it is never taken for the whole.
    """
    whole = shape(dict(geometry))
    if "sha256" in geometry or shapely.get_num_coordinates(whole) <= MANY_VERTICES or not whole.area:
        return dict(geometry)
    tolerance = 1e-4
    rough = whole
    while shapely.get_num_coordinates(rough) > _FEW_VERTICES and tolerance < 10:
        rough = shapely.simplify(whole, tolerance).buffer(2 * tolerance, quad_segs=1, join_style="mitre")
        rough = shapely.intersection(shapely.simplify(rough, tolerance / 2), box(-180, -90, 180, 90))
        tolerance *= 2
    result: dict[str, Any] = json.loads(json.dumps(mapping(shapely.set_precision(rough, 1e-6))))
    return result | {"sha256": sha_of(clip_text(geometry) or "")}


def inside_of(clip: str | None, grid: Grid) -> npt.NDArray[np.bool_] | None:
    """Return the pixels of `grid` whose centre lies in the area; None where all of them do.

    Args:
        clip: The area, from `clip_text`; None for everywhere.
        grid: Any window of the cube's grid.

    Returns:
        (y, x).
    """
    if clip is None:
        return None
    if is_grid_area(clip):
        return GridArea.from_text(clip).inside(grid)
    area = _area_on(clip, grid.crs)
    left, bottom, right, top = grid.bounds
    window = box(left, bottom, right, top)
    if area.contains(window):
        return None
    inside = np.zeros(grid.shape, bool)
    if not area.intersects(window):
        return inside
    x, y = grid.x(), grid.y()
    for first in range(
        0, grid.height, _ROWS
    ):  # the coordinates of a whole shard at once would take more memory than its pixels
        rows = y[first : first + _ROWS]
        inside[first : first + _ROWS] = shapely.contains_xy(area, x[None, :], rows[:, None])
    return inside


def is_outside(clip: str | None, grid: Grid) -> bool:
    """Return whether `grid` and the area have nothing in common."""
    if is_grid_area(clip):
        return GridArea.from_text(clip or "").is_outside(grid)
    return clip is not None and not _area_on(clip, grid.crs).intersects(box(*grid.bounds))


def area_of(clip: str, crs: str) -> float:
    """Return the size of the area in square units of `crs`."""
    return float(_area_on(clip, crs).area)


@functools.lru_cache(maxsize=8)
def _area_on(clip: str, crs: str) -> BaseGeometry:
    area = shape(json.loads(clip))
    if not area.is_valid:
        area = shapely.make_valid(area)
    to_crs = Transformer.from_crs("EPSG:4326", crs, always_xy=True)

    def project(xy: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return np.column_stack(to_crs.transform(xy[:, 0], xy[:, 1]))

    moved: BaseGeometry = shapely.transform(shapely.segmentize(area, _STEP_DEG), project)
    if turn := turn_of(crs):
        # a grid across the antimeridian counts on, beyond 180 degrees
        moved = shapely.union_all([translate(moved, xoff=by) for by in (-turn, 0.0, turn)])
    if not moved.is_valid:
        moved = shapely.make_valid(moved)
    shapely.prepare(moved)
    return moved
