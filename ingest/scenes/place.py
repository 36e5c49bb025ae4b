"""`Place`: where an item lies, by its geometry, and by what else it states where the geometry cannot be right.

Catalogues exist whose geometries have latitude and longitude swapped. The grid that the item states for its files, its
box and its MGRS tile are witnesses. None of them has a veto: what they disagree on becomes a note, and the file that is
opened later decides.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import shapely
from pyproj.exceptions import ProjError
from shapely.errors import ShapelyError
from shapely.geometry import box, shape
from shapely.geometry.base import BaseGeometry

from ingest.scenes.footprint import LonLatBox, box_region, flat_box, footprint_of, lonlat_box, meets
from ingest.scenes.identity import product_names, tile_of
from ingest.scenes.stated_grid import stated_grid
from zarr_store.errors import InvalidInput
from zarr_store.grid import Grid, check_on_earth

__all__ = ["Place", "mirrored_footprint", "place_of"]

_BANDS = "CDEFGHJKLMNPQRSTUVWX"
"""Latitude bands of MGRS, from 80° south, each 8° high but for the last."""
_BBOX = "its bbox"
"""Name of the weakest evidence, a box that is often made from the geometry."""
_TILE_MARGIN = 2.0
"""Distance in degrees that a tile may reach out of the zone and band that it is named after."""


class Place(NamedTuple):
    """The place of an item, in lon/lat.

    Attributes:
        footprint: The footprint.
        bounds: Its box.
        reach: The footprint, and where else the item says that it lies; only what it misses is certain to be missed.
        note: A sentence where the item contradicts itself.
    """

    footprint: BaseGeometry
    bounds: LonLatBox
    reach: BaseGeometry
    note: str = ""


def place_of(item: Mapping[str, Any], where: str) -> Place:
    """Find where an item lies.

    Raises:
        InvalidInput: The item has neither a usable geometry nor a usable bbox.
    """
    refusal: InvalidInput | None = None
    try:
        footprint, bounds = footprint_of(item, where)
        witness = _witness(item)
        if witness is None or meets(footprint, witness[0]):
            return Place(footprint, bounds, footprint)
    except InvalidInput as error:
        witness, refusal = _witness(item) if item.get("geometry") else None, error
        if witness is None:
            raise
    area, name = witness
    turned = _turned(item, where)
    if turned is not None and meets(turned, area):
        note = f"its geometry has latitude and longitude swapped: {name} lies where the swapped one does, which is used"
        return Place(turned, lonlat_box(turned), turned, note)
    if refusal is not None:
        raise refusal
    note = f"its geometry and {name} lie apart; the file decides"
    return Place(footprint, bounds, shapely.union_all([footprint, area]), note)


def mirrored_footprint(item: Mapping[str, Any], where: str) -> BaseGeometry | None:
    """Return the footprint with latitude and longitude swapped, where only the files can tell whether they are.

    Returns:
        The footprint; None where the item states a grid or a tile, or where the swapped geometry lies nowhere.
    """
    witness = _witness(item)
    return _turned(item, where) if witness is None or witness[1] == _BBOX else None


def _witness(item: Mapping[str, Any]) -> tuple[BaseGeometry, str] | None:
    """Return the area that the most reliable statement besides the geometry gives, and its name; None for none."""
    properties = item.get("properties")
    properties = properties if isinstance(properties, Mapping) else {}
    assets = item.get("assets")
    for key, asset in (assets if isinstance(assets, Mapping) else {}).items():
        grid = stated_grid(asset, properties, f"asset {key!r}", []) if isinstance(asset, Mapping) else None
        if grid is not None and (area := _area(grid)) is not None:
            return area, "the grid of its files"
    tile = tile_of(properties, product_names(item)) if isinstance(item.get("id"), str) else None
    if tile is not None:
        return _tile_cell(tile), f"tile {tile}"
    try:
        stated = box_region(flat_box(item.get("bbox")))
    except (ValueError, TypeError):
        return None
    return (stated, _BBOX) if stated.area else None


@functools.lru_cache(maxsize=4096)
def _area(grid: Grid) -> BaseGeometry | None:
    """Return the lon/lat box of a grid; None where it has no place on Earth. The same tiles come back on every date."""
    try:
        check_on_earth(grid)
        return box_region(grid.lonlat_bounds())
    except (InvalidInput, ProjError, ShapelyError, ValueError):
        return None


def _tile_cell(tile: str) -> BaseGeometry:
    """Return the lon/lat area of an MGRS tile's zone and latitude band, with a margin, even past ±180°."""
    west, south = (int(tile[:2]) - 1) * 6.0 - 180.0, _BANDS.index(tile[2]) * 8.0 - 80.0
    height = 12.0 if tile[2] == "X" else 8.0
    return box(west - _TILE_MARGIN, south - _TILE_MARGIN, west + 6 + _TILE_MARGIN, south + height + _TILE_MARGIN)


def _turned(item: Mapping[str, Any], where: str) -> BaseGeometry | None:
    """Return the footprint of an item whose geometry names latitude first; None if that is not a footprint either."""
    try:
        with np.errstate(all="ignore"):  # values that are no numbers are refused below
            flipped = shapely.transform(shapely.force_2d(shape(item["geometry"])), lambda xy: xy[:, ::-1])
        turned, _ = footprint_of({"geometry": shapely.geometry.mapping(flipped)}, where)
    except (InvalidInput, ShapelyError, KeyError, TypeError, ValueError, AttributeError, IndexError):
        return None
    return turned
