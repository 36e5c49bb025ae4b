"""`load_area` reads the polygons of --aoi or the box of --bbox onto the grid of a cube, for maps of a part of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from zarr_store.errors import InvalidInput

if TYPE_CHECKING:
    from jaxtrain.inference.area import Area

__all__ = ["load_area"]

_PARTS = 64
"""Edges are cut so that no piece is longer than this part of the area's larger side."""


def load_area(run: Path, cube: str, *, aoi: Path | None, bbox: str | None) -> Area | None:
    """Read which part of a cube to map; return None for the whole cube.

    Args:
        run: The run directory, which names the collection.
        cube: The cube, whose grid the area is on.
        aoi: File with polygons in any CRS.
        bbox: West, south, east, north in degrees.

    Raises:
        InvalidInput: The file or the box cannot be used, holds no polygon, or lies outside the cube.
    """
    if aoi is None and bbox is None:
        return None
    if aoi is not None and bbox is not None:
        raise InvalidInput("--aoi and --bbox both name the area; give one of them")
    import shapely
    from shapely.geometry import box, shape

    from ingest.request.geometry import load_geometry
    from ingest.request.settings import make_config
    from jaxtrain.inference.area import Area
    from jaxtrain.runs.rundir import load_card
    from zarr_store.crs import transformer_between
    from zarr_store.read import open_cube

    if aoi is not None:
        name, geometry = f"--aoi {aoi}", shape(load_geometry(aoi))
    else:
        west, south, east, north = make_config(None, {"bbox": bbox}).selection.bbox or (0.0, 0.0, 0.0, 0.0)
        if west > east:
            raise InvalidInput(f"--bbox {bbox} crosses the antimeridian: give --aoi with polygons on both sides of it")
        name, geometry = f"--bbox {bbox}", box(west, south, east, north)
    grid = open_cube(cube).spec(load_card(run).config.data.collection).grid
    west, south, east, north = geometry.bounds
    # a straight edge in degrees is a curve in metres
    finer = shapely.segmentize(geometry, max(east - west, north - south, 1e-9) / _PARTS)
    move = transformer_between("EPSG:4326", grid.crs).transform
    placed = shapely.transform(finer, lambda xy: np.stack(move(xy[:, 0], xy[:, 1]), axis=-1))
    polygons = list(_polygons(placed))
    if not polygons:
        raise InvalidInput(f"{name} holds no polygon, got a {geometry.geom_type}; give the outline of the area")
    return Area.on_grid(polygons, grid, name)


def _polygons(geometry: Any) -> Iterator[list[Any]]:
    """Yield the rings of each polygon of a geometry, in coordinates of its CRS."""
    import shapely

    for part in getattr(geometry, "geoms", [geometry]):
        if part.geom_type == "Polygon" and not part.is_empty:
            yield [shapely.get_coordinates(ring) for ring in (part.exterior, *part.interiors)]
        elif hasattr(part, "geoms"):
            yield from _polygons(part)
