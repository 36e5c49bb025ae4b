"""`read_features` gives polygons with their classes or values in the CRS of a grid (`vectors.py` reads the files)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyproj
import shapely
from pyproj.exceptions import ProjError
from shapely.errors import ShapelyError

from ingest.labels.vectors import VECTOR_SUFFIXES, check_start, read_table
from zarr_store.crs import parse_crs
from zarr_store.errors import InvalidInput
from zarr_store.grid import Grid

__all__ = ["Features", "is_vector", "read_features"]

_PARTS = 16
"""Number of parts of the grid's size into which edges are cut before reprojection makes curves of them."""

Geometries = npt.NDArray[np.object_]


@dataclass(frozen=True)
class Features:
    """Polygons in the CRS of a grid.

    Attributes:
        geometries: Array (features,) of shapely polygons.
        values: Value of the attribute for each polygon: text, or float64.
        left_out: One line for each reason why features were left out.
    """

    geometries: Geometries
    values: npt.NDArray[Any]
    left_out: tuple[str, ...]


def is_vector(path: Path) -> bool:
    """Return whether the suffix of a file is that of a vector format."""
    return path.suffix.lower() in VECTOR_SUFFIXES


def read_features(
    path: Path, grid: Grid, *, attribute: str | None, layer: str | None = None, numbers: bool = False
) -> Features:
    """Read the polygons of a file that touch a grid.

    Args:
        path: The file.
        grid: The grid, whose CRS the polygons get; those outside its bounds are left out.
        attribute: Attribute that names the class or holds the number; None where all polygons are one class.
        layer: Layer of a file that has several.
        numbers: Whether the values are numbers; else they are text.

    Raises:
        InvalidInput: The file cannot be read, states no CRS, or has no polygon that touches the grid.
        UnknownName: The file has no such layer or attribute.
    """
    check_start(path)
    if attribute is None and numbers:
        raise InvalidInput(f"--values with polygons needs --attribute, the attribute of {path} that holds the number")
    table = read_table(path, attribute, layer)
    wkb, values, crs = table.wkb, table.values, table.crs
    try:
        geometries = shapely.from_wkb(wkb, on_invalid="raise")
    except (ShapelyError, TypeError) as error:
        raise InvalidInput(
            f"{path}: a geometry cannot be decoded ({error}); repair the file, e.g. with ogr2ogr"
        ) from error
    values = np.full(len(geometries), "labelled", object) if values is None else values
    polygons = np.isin(shapely.get_type_id(geometries), (3, 6))
    left_out = []
    if not polygons.all():
        left_out.append(f"{int((~polygons).sum())} of {len(polygons)} features that are no polygons")
    known = np.array([v is not None and v == v and str(v).strip() != "" for v in values], bool)
    if (polygons & ~known).any():
        left_out.append(f"{int((polygons & ~known).sum())} polygons without {attribute}")
    chosen = polygons & known
    moved = _project(geometries[chosen], crs, grid, path)
    values = values[chosen]
    near = shapely.intersects(moved, shapely.box(*grid.bounds))
    if not near.any():
        bounds = shapely.total_bounds(moved) if len(moved) else ()
        raise InvalidInput(
            f"{path}: none of {len(moved)} polygons touches the cube at {tuple(round(v, 4) for v in grid.bounds)} in "
            f"{grid.crs}; in this CRS they lie at {tuple(np.round(np.array(bounds), 4).tolist())}"
        )
    if int((~near).sum()):
        left_out.append(f"{int((~near).sum())} polygons outside the cube")
    if numbers:
        try:
            found = values[near].astype(np.float64)
        except (TypeError, ValueError) as error:
            raise InvalidInput(
                f"{path}: attribute {attribute} holds no numbers ({error}); choose another --attribute, or leave "
                "--values out"
            ) from error
        return Features(moved[near], found, tuple(left_out))
    return Features(moved[near], np.array([_text(v) for v in values[near]], object), tuple(left_out))


def _text(value: Any) -> str:
    number = isinstance(value, float) and value.is_integer()
    return str(int(value)) if number else str(value).strip()


def _project(geometries: Geometries, crs: str, grid: Grid, path: Path) -> Geometries:
    try:
        source, target = parse_crs(crs), pyproj.CRS(grid.crs)
        if source == target:
            return geometries
        transformer = pyproj.Transformer.from_crs(source, target, always_xy=True)
        back = pyproj.Transformer.from_crs(target, source, always_xy=True)
        west, south, east, north = back.transform_bounds(*grid.bounds, densify_pts=21)
        # far from the grid a projection may have no answer, and nothing there is needed
        close = np.ones(len(geometries), bool)
        if west < east:
            close = shapely.intersects(geometries, shapely.box(west, south, east, north))
        forward: Any = transformer.transform
        moved = np.full(len(geometries), shapely.Polygon(), object)
        dense = shapely.segmentize(geometries[close], max(abs(east - west), north - south) / _PARTS)
        moved[close] = shapely.transform(dense, forward, interleaved=False)
    except (ProjError, ShapelyError, ValueError) as error:
        raise InvalidInput(f"{path}: its polygons cannot be reprojected to {grid.crs}: {error}") from error
    return moved
