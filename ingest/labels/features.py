"""Polygons with a class out of files: GeoJSON, GeoPackage, FlatGeobuf, shapefiles, GeoParquet, each by one reader."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pyproj
import shapely
from pyproj.exceptions import ProjError
from shapely.errors import ShapelyError

from ingest.labels.vectors import VECTOR_SUFFIXES, Table, check_attribute, check_start, read_table
from ingest.request.parquet import decoded_batches
from zarr_store.bounded import load_json
from zarr_store.crs import parse_crs
from zarr_store.errors import InvalidInput
from zarr_store.grid import Grid

__all__ = ["Features", "is_vector", "read_features"]

_PARQUET = (".parquet", ".geoparquet")
_MOST_ABOUT = 1 << 20
"""Bytes of what GeoParquet says of itself."""
_PARTS = 16
"""An edge longer than this part of the grid's size is cut before it is reprojected: a straight edge becomes a curve."""

Geometries = npt.NDArray[np.object_]


@dataclass(frozen=True)
class Features:
    """Polygons in the CRS of a grid.

    Attributes:
        geometries: shapely polygons, (features,).
        values: What the attribute says of each: text, or float64 numbers.
        left_out: Why features were left out, in words.
    """

    geometries: Geometries
    values: npt.NDArray[Any]
    left_out: tuple[str, ...]


def is_vector(path: Path) -> bool:
    """Whether a file's name is one of polygons."""
    return path.suffix.lower() in VECTOR_SUFFIXES


def read_features(
    path: Path, grid: Grid, *, attribute: str | None, layer: str | None = None, numbers: bool = False
) -> Features:
    """Read the polygons of a file that touch a grid.

    Args:
        path: The file.
        grid: Whose CRS is wanted, and beyond whose bounds nothing matters.
        attribute: Which one names the class, or holds the number; None where all polygons are one class.
        layer: Of a file of several layers.
        numbers: Whether numbers are wanted; else text.

    Raises:
        InvalidInput: The file cannot be read, has no polygons, no CRS, or none that touches the grid.
        UnknownName: It has no such layer or attribute.
    """
    check_start(path)
    if attribute is None and numbers:
        raise InvalidInput(f"--values of polygons needs --attribute, which of {path} holds the number")
    parquet = path.suffix.lower() in _PARQUET
    table = _read_parquet(path, attribute) if parquet else read_table(path, attribute, layer)
    wkb, values, crs = table.wkb, table.values, table.crs
    try:
        geometries = shapely.from_wkb(wkb, on_invalid="raise")
    except ShapelyError as error:
        raise InvalidInput(f"{path}: a geometry cannot be decoded ({error})") from error
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
            f"{path}: none of {len(moved)} polygons touches the ground {tuple(round(v, 4) for v in grid.bounds)} "
            f"of {grid.crs}; they lie at {tuple(np.round(np.array(bounds), 4).tolist())} in the same CRS"
        )
    if int((~near).sum()):
        left_out.append(f"{int((~near).sum())} polygons outside of the cube's ground")
    if numbers:
        try:
            found = values[near].astype(np.float64)
        except (TypeError, ValueError) as error:
            raise InvalidInput(f"{path}: attribute {attribute} holds no numbers ({error})") from error
        return Features(moved[near], found, tuple(left_out))
    return Features(moved[near], np.array([_text(v) for v in values[near]], object), tuple(left_out))


def _text(value: Any) -> str:
    number = isinstance(value, float) and value.is_integer()
    return str(int(value)) if number else str(value).strip()


def _read_parquet(path: Path, attribute: str | None) -> Table:
    """GeoParquet 1.x: WKB and, as PROJJSON, the CRS; none stated is longitude and latitude."""
    try:
        file = pq.ParquetFile(path)
        about = load_json((file.schema_arrow.metadata or {})[b"geo"], str(path), most=_MOST_ABOUT)
        column = about["primary_column"]
        stated = about["columns"][column]
        if stated["encoding"] != "WKB":
            raise InvalidInput(f"{path}: geometries are encoded as {stated['encoding']}, expected WKB")
        check_attribute(attribute, [n for n in file.schema_arrow.names if n != column], path)
        wanted = [column] if attribute is None else [column, attribute]
        rows = pa.Table.from_batches(
            decoded_batches(file, path, wanted), file.schema_arrow.empty_table().select(wanted).schema
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException) as error:
        if isinstance(error, InvalidInput):
            raise
        raise InvalidInput(f"{path} is not GeoParquet ({type(error).__name__}: {error})") from error
    crs = stated.get("crs", "OGC:CRS84")
    if crs is None:
        raise InvalidInput(f"{path} says that its CRS is not known; state it in the file")
    values = None if attribute is None else rows[attribute].to_pandas().to_numpy(object)
    wkb = np.array(rows[column].to_pylist(), object)
    return Table(wkb, values, json.dumps(crs) if isinstance(crs, dict) else str(crs))


def _project(geometries: Geometries, crs: str, grid: Grid, path: Path) -> Geometries:
    try:
        source, target = parse_crs(crs), pyproj.CRS(grid.crs)
        if source == target:
            return geometries
        transformer = pyproj.Transformer.from_crs(source, target, always_xy=True)
        back = pyproj.Transformer.from_crs(target, source, always_xy=True)
        west, south, east, north = back.transform_bounds(*grid.bounds, densify_pts=21)
        # far from the ground of the grid a projection may have no answer, and nothing there is wanted
        close = np.ones(len(geometries), bool)
        if west < east:
            close = shapely.intersects(geometries, shapely.box(west, south, east, north))
        forward: Any = transformer.transform
        moved = np.full(len(geometries), shapely.Polygon(), object)
        dense = shapely.segmentize(geometries[close], max(abs(east - west), north - south) / _PARTS)
        moved[close] = shapely.transform(dense, forward, interleaved=False)
    except (ProjError, ShapelyError, ValueError) as error:
        raise InvalidInput(f"{path}: cannot be brought from its CRS to {grid.crs}: {error}") from error
    return moved
