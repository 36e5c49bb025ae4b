"""Polygons with a class out of files: GeoJSON, GeoPackage, FlatGeobuf and shapefiles by GDAL, GeoParquet by Arrow."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pyogrio
import pyproj
import shapely
from pyogrio.errors import DataLayerError, DataSourceError, FeatureError, FieldError, GeometryError
from pyproj.exceptions import ProjError
from shapely.errors import ShapelyError

from zarr_store.errors import InvalidInput, UnknownName
from zarr_store.grid import Grid

__all__ = ["VECTOR_SUFFIXES", "Features", "is_vector", "read_features"]

VECTOR_SUFFIXES = (".geojson", ".json", ".gpkg", ".fgb", ".shp", ".parquet", ".geoparquet")
_PARQUET = (".parquet", ".geoparquet")
_MOST_BYTES = 4 << 30
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
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise InvalidInput(f"{path} has more than {_MOST_BYTES >> 30} GiB; cut it to the ground of the cube first")
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror or error}") from error
    if attribute is None and numbers:
        raise InvalidInput(f"--values of polygons needs --attribute, which of {path} holds the number")
    wkb, values, crs = (
        _read_parquet(path, attribute) if path.suffix.lower() in _PARQUET else _read_gdal(path, attribute, layer)
    )
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


def _read_gdal(path: Path, attribute: str | None, layer: str | None) -> tuple[Any, Any, str]:
    try:
        layers = [str(name) for name in pyogrio.list_layers(path)[:, 0]]
        if layer is not None and layer not in layers:
            raise UnknownName.of("layer", layer, layers, f"{path} (--layer)")
        if layer is None and len(layers) != 1:
            raise InvalidInput(f"{path} has the layers {', '.join(layers) or 'none'}; name one with --layer")
        fields = [str(name) for name in pyogrio.read_info(path, layer=layer or layers[0])["fields"]]
        _check_attribute(attribute, fields, path)
        meta, _, geometry, columns = pyogrio.raw.read(
            path, layer=layer or layers[0], columns=[] if attribute is None else [attribute]
        )
    except (DataSourceError, DataLayerError, FeatureError, FieldError, GeometryError) as error:
        raise InvalidInput(f"{path} cannot be read as polygons: {error}") from error
    if not meta["crs"]:
        raise InvalidInput(f"{path} states no CRS; assign one, e.g. with ogr2ogr -a_srs EPSG:…")
    return geometry, columns[0] if columns else None, str(meta["crs"])


def _read_parquet(path: Path, attribute: str | None) -> tuple[Any, Any, str]:
    """GeoParquet 1.x: WKB and, as PROJJSON, the CRS; none stated is longitude and latitude."""
    try:
        file = pq.ParquetFile(path)
        about = json.loads((file.schema_arrow.metadata or {})[b"geo"])
        column = about["primary_column"]
        stated = about["columns"][column]
        if stated["encoding"] != "WKB":
            raise InvalidInput(f"{path}: geometries are encoded as {stated['encoding']}, expected WKB")
        _check_attribute(attribute, [n for n in file.schema_arrow.names if n != column], path)
        table = file.read(columns=[column] if attribute is None else [column, attribute])
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, InvalidInput):
            raise
        raise InvalidInput(f"{path} is not GeoParquet ({type(error).__name__}: {error})") from error
    crs = stated.get("crs", "OGC:CRS84")
    if crs is None:
        raise InvalidInput(f"{path} says that its CRS is not known; state it in the file")
    values = None if attribute is None else table[attribute].to_pandas().to_numpy(object)
    wkb = np.array(table[column].to_pylist(), object)
    return wkb, values, json.dumps(crs) if isinstance(crs, dict) else str(crs)


def _check_attribute(attribute: str | None, known: Sequence[str], path: Path) -> None:
    if attribute is not None and attribute not in known:
        raise UnknownName.of("attribute", attribute, known, f"{path} (--attribute)")


def _project(geometries: Geometries, crs: str, grid: Grid, path: Path) -> Geometries:
    try:
        source, target = pyproj.CRS.from_user_input(crs), pyproj.CRS(grid.crs)
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
