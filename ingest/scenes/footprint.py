"""Footprints of items in lon/lat, cut at the antimeridian, and whether they meet a region."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import shapely
from shapely import affinity
from shapely.errors import ShapelyError
from shapely.geometry import box, mapping, shape
from shapely.geometry.base import BaseGeometry

from zarr_store.errors import InvalidInput

__all__ = ["LonLatBox", "box_region", "flat_box", "footprint_of", "lonlat_box", "meets", "overlap_share", "to_geojson"]

LonLatBox = tuple[float, float, float, float]
"""Box as (west, south, east, north) in degrees; a box with west > east crosses the antimeridian."""

_FARTHEST = 1080.0
"""Largest longitude, in degrees: longitudes may be counted past the antimeridian, but at most three times around."""
_WORLD = box(-180, -90, 180, 90)


def footprint_of(item: Mapping[str, Any], where: str) -> tuple[BaseGeometry, LonLatBox]:
    """Return the footprint of an item, cut at the antimeridian where it crosses, and its box.

    A ring that spans more than half the globe is taken to cross the antimeridian: no scene is that wide, and catalogues
    write such rings without a cut. The bbox is used for an item without a geometry.

    Raises:
        InvalidInput: The item has neither a usable geometry nor a usable bbox.
    """
    raw, bounds = item.get("geometry"), item.get("bbox")
    try:
        with np.errstate(all="ignore"):  # values that are no numbers are refused below
            geometry = shape(raw) if raw else box_region(flat_box(bounds))
            parts = [_cut(part) for part in _polygons(geometry)]
            result = shapely.union_all(parts) if parts else geometry
    except (ShapelyError, KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise InvalidInput(f"{where}: geometry and bbox are unusable ({error}); leave the item out") from error
    if result.is_empty:
        raise InvalidInput(f"{where}: the footprint is empty; leave the item out")
    return result, lonlat_box(result)


def box_region(bounds: LonLatBox) -> BaseGeometry:
    """Return the area of a lon/lat box, in two parts if west > east."""
    west, south, east, north = bounds
    if west <= east:
        return box(west, south, east, north)
    return shapely.union_all([box(west, south, 180, north), box(-180, south, east, north)])


def meets(footprint: BaseGeometry, region: BaseGeometry | None) -> bool:
    """Return whether a footprint shares area with a region (touching edges do not count for areas)."""
    if region is None:
        return True
    for shift in (0.0, 360.0, -360.0):  # a region may be written as 170…190
        moved = affinity.translate(region, shift) if shift else region
        if footprint.intersects(moved) and not (footprint.area and moved.area and footprint.touches(moved)):
            return True
    return False


def overlap_share(left: BaseGeometry, right: BaseGeometry) -> float:
    """Return the shared area divided by the joint area: 1 for equal footprints, 0 for disjoint ones."""
    joint = shapely.union(left, right).area
    return float(shapely.intersection(left, right).area / joint) if joint else float(left.equals(right))


def to_geojson(geometry: BaseGeometry) -> dict[str, Any]:
    """Convert a geometry to GeoJSON with lists, as JSON gives it back."""
    result: dict[str, Any] = json.loads(json.dumps(mapping(geometry)))
    return result


def flat_box(bounds: object) -> LonLatBox:
    """Return the bbox of an item as (west, south, east, north); heights are left out.

    Raises:
        ValueError: It is not a list of four or six numbers.
    """
    if not isinstance(bounds, Sequence) or len(bounds) not in (4, 6):
        raise ValueError(f"expected a bbox of four or six numbers, got {bounds!r}")
    half = len(bounds) // 2
    return (float(bounds[0]), float(bounds[1]), float(bounds[half]), float(bounds[half + 1]))


def _polygons(geometry: BaseGeometry) -> list[BaseGeometry]:
    return [part for part in getattr(geometry, "geoms", [geometry]) if not part.is_empty]


def _cut(part: BaseGeometry) -> BaseGeometry:
    """Repair a polygon, and cut it in two where it crosses the antimeridian."""
    part = shapely.force_2d(part)
    west, _, east, _ = part.bounds
    if east - west > 180:
        # western longitudes move beyond 180°, so that the ring is whole; the cut moves them back
        part = shapely.transform(part, _unwrap)
    part = part if part.is_valid else shapely.make_valid(part)
    west, south, east, north = part.bounds
    if not all(math.isfinite(v) and abs(v) <= _FARTHEST for v in part.bounds):
        raise ValueError(f"it reaches to {west:g}, {south:g}, {east:g}, {north:g} degrees")
    if west >= -180 and east <= 180 and south >= -90 and north <= 90:
        return part
    pieces = [shapely.intersection(affinity.translate(part, shift), _WORLD) for shift in (-360.0, 0.0, 360.0)]
    return shapely.union_all(pieces)


def _unwrap(xy: Any) -> Any:
    moved = xy.copy()
    moved[moved[:, 0] < 0, 0] += 360.0
    return moved


def lonlat_box(geometry: BaseGeometry) -> LonLatBox:
    """Return the box of a geometry, with west > east if its parts lie on both sides of the antimeridian."""
    west, south, east, north = geometry.bounds
    parts = _polygons(geometry)
    left = [part.bounds for part in parts if part.bounds[2] <= 0]
    right = [part.bounds for part in parts if part.bounds[0] >= 0]
    if west == -180 and east == 180 and left and right and len(left) + len(right) == len(parts):
        west, east = min(bounds[0] for bounds in right), max(bounds[2] for bounds in left)
    return (float(west), float(south), float(east), float(north))
