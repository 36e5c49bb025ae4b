"""Regions: a file of GeoJSON, WKT, GeoParquet or GeoPackage, in any CRS, becomes one lon/lat geometry.

Edges are densified before they are reprojected, as a straight edge in metres is a curve in degrees. A geometry that
crosses the antimeridian is cut there.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyproj
import shapely
from pyproj.exceptions import ProjError
from shapely import affinity
from shapely.errors import ShapelyError
from shapely.geometry import box, mapping, shape
from shapely.geometry.base import BaseGeometry

from ingest.request.geopackage import open_geopackage
from zarr_store.bounded import load_json, read_file
from zarr_store.crs import parse_crs
from zarr_store.errors import InvalidInput
from zarr_store.regular import open_regular

log = logging.getLogger(__name__)

__all__ = ["bare_geometry", "cut_uncut", "load_geometry", "to_lonlat"]

_GEOMETRIES = {"Point", "MultiPoint", "LineString", "MultiLineString", "Polygon", "MultiPolygon", "GeometryCollection"}
_MAX_BYTES = 16 * 2**20
"""Largest file of a region, bytes."""
_MAX_DECODED = 16 * _MAX_BYTES
"""Largest decoded size of its rows, bytes."""
_MAX_ROWS = 100_000
"""Largest number of features in a file."""
_PARTS = 64
"""Edges are cut so that no piece is longer than this part of the region's larger side."""
_WORLD = box(-180, -90, 180, 90)


def load_geometry(path: str | Path) -> dict[str, Any]:
    """Read a file as one lon/lat geometry; several features are joined.

    Raises:
        InvalidInput: The file is unreadable or of an unknown format, or its CRS or coordinates cannot be used.
    """
    where = str(path)
    try:
        with open_regular(path) as stream:
            start, size = stream.read(16), os.fstat(stream.fileno()).st_size
    except OSError as error:
        raise InvalidInput(f"cannot read geometry file {path}: {error.strerror or error}") from error
    if size > _MAX_BYTES:
        raise InvalidInput(f"geometry file {path} has {size} bytes, more than {_MAX_BYTES}; simplify it")
    if start.startswith(b"PAR1"):
        return _joined(list(_parquet(path)), where)
    if start.startswith(b"SQLite format 3"):
        return _joined(list(_geopackage(path)), where)
    if Path(path).suffix.lower() in (".shp", ".zip", ".kml", ".gml", ".fgb"):
        raise InvalidInput(
            f"geometry file {path}: expected GeoJSON, WKT, GeoParquet or GeoPackage; convert it, e.g. with ogr2ogr"
        )
    data = read_file(path, _MAX_BYTES, f"geometry file {path}")
    if re.match(rb"\s*(SRID=\d+;)?\s*(MULTI)?(POINT|LINESTRING|POLYGON)|\s*(SRID=\d+;)?\s*GEOMETRYCOLLECTION", data):
        return _joined([_wkt(data, where)], where)
    try:
        document = load_json(data, where, most=_MAX_BYTES)
    except ValueError as error:
        if isinstance(error, InvalidInput):
            raise
        raise InvalidInput(f"geometry file {path} is not JSON: {error}") from error
    return bare_geometry(document, where)


def bare_geometry(data: Any, where: str) -> dict[str, Any]:
    """Take the geometry out of GeoJSON, check that it is not empty, and bring it to lon/lat.

    The CRS is that of the outdated `crs` member where GeoJSON has one.

    Args:
        data: GeoJSON geometry, Feature or FeatureCollection.
        where: Name of the source, for errors.

    Raises:
        InvalidInput: The data is not GeoJSON or empty, or its CRS or coordinates cannot be used.
    """
    crs = _stated_crs(data, where)
    try:
        geometry = _parse(data, where)
    except (ShapelyError, KeyError, TypeError, AttributeError, IndexError, ValueError, RecursionError) as error:
        if isinstance(error, InvalidInput):
            raise
        raise InvalidInput(f"{where}: not a valid GeoJSON geometry: {error}") from error
    return _joined([(geometry, crs)], where)


def to_lonlat(geometry: BaseGeometry, crs: str | None, where: str) -> BaseGeometry:
    """Reproject a geometry to lon/lat with densified edges, and cut it at the antimeridian.

    Args:
        geometry: Geometry with coordinates in the order x, y.
        crs: CRS in any form that pyproj understands; None means lon/lat.
        where: Name of the source, for errors.

    Raises:
        InvalidInput: The CRS is unknown, or the geometry lies outside its area.
    """
    try:
        source = parse_crs(crs) if crs is not None else None
        if source is not None and not _is_lonlat(source):
            west, south, east, north = geometry.bounds
            step = max(east - west, north - south) / _PARTS
            dense = shapely.segmentize(geometry, step) if step > 0 else geometry
            transformer = pyproj.Transformer.from_crs(source, "EPSG:4326", always_xy=True)
            geometry = shapely.transform(dense, lambda xy: _unwrapped(transformer, xy))
    except (ProjError, ShapelyError, ValueError) as error:
        raise InvalidInput(
            f"{where}: cannot be reprojected from CRS {crs!r} to longitude and latitude: {error}; state the CRS in the "
            "file, or reproject it to EPSG:4326"
        ) from error
    if geometry.is_empty or not np.isfinite(geometry.bounds).all():
        raise InvalidInput(f"{where}: the geometry is {'empty' if geometry.is_empty else f'outside of CRS {crs}'}")
    west, south, east, north = geometry.bounds
    if not (-360 <= west <= east <= 540 and -90 <= south <= north <= 90):
        raise InvalidInput(
            f"{where}: coordinates must be longitude and latitude in degrees, got bounds {geometry.bounds}; "
            "state the CRS in the file, or reproject it to EPSG:4326"
        )
    if west >= -180 and east <= 180:
        return geometry
    valid = geometry if geometry.is_valid else shapely.make_valid(geometry)
    parts = [shapely.intersection(affinity.translate(valid, shift), _WORLD) for shift in (-360.0, 0.0, 360.0)]
    return shapely.union_all([part for part in parts if not part.is_empty])


def cut_uncut(geometry: dict[str, Any]) -> dict[str, Any]:
    """Cut the parts of a lon/lat geometry that cross the antimeridian although they were written without a cut.

    An edge from 179° to -179° is taken to go the short way, over the antimeridian, as GeoJSON (RFC 7946) cannot write
    such an edge in one part. A part that reaches from -180° to 180° is left as it is: it is all around the Earth.
    """
    whole = shape(geometry)
    if whole.is_empty:
        return geometry
    parts = list(getattr(whole, "geoms", [whole]))
    crossing = [_longest_edge(part) > 180 and part.bounds[::2] != (-180.0, 180.0) for part in parts]
    if not any(crossing):
        return geometry
    moved = [shapely.transform(part, _go_on) if over else part for part, over in zip(parts, crossing, strict=True)]
    cut = to_lonlat(shapely.union_all([shapely.make_valid(part) for part in moved]), None, "geometry")
    west, _, east, _ = whole.bounds
    log.warning(
        "geometry: an edge between longitudes %g and %g is taken to go the short way, over the antimeridian; add "
        "--wrap (wrap=True) if it goes the long way", west, east,
    )  # fmt: skip
    result: dict[str, Any] = json.loads(json.dumps(mapping(cut)))
    return result


def _longest_edge(part: BaseGeometry) -> float:
    """Return the longest edge of a part along the longitude, in degrees."""
    rings = [part.exterior, *part.interiors] if isinstance(part, shapely.Polygon) else [part]
    steps = [np.abs(np.diff(shapely.get_coordinates(ring)[:, 0])) for ring in rings]
    return max((float(step.max()) for step in steps if len(step)), default=0.0)


def _go_on(xy: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Count western longitudes beyond 180°, so that a ring across the antimeridian is whole."""
    moved = xy.copy()
    moved[moved[:, 0] < 0, 0] += 360.0
    return moved


def _unwrapped(transformer: pyproj.Transformer, xy: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Reproject points to lon/lat; longitudes continue beyond 180 where a geometry crosses the antimeridian."""
    lon, lat = transformer.transform(xy[:, 0], xy[:, 1], errcheck=True)
    lon = np.asarray(lon)
    if len(lon) and lon.max() - lon.min() > 180:
        lon = np.where(lon < 0, lon + 360.0, lon)
    return np.stack([lon, np.asarray(lat)], axis=1)


def _is_lonlat(crs: pyproj.CRS) -> bool:
    return bool(crs.is_geographic and (crs.to_epsg() == 4326 or "CRS84" in crs.to_string()))


def _joined(parts: list[tuple[BaseGeometry, str | None]], where: str) -> dict[str, Any]:
    if not parts or all(part.is_empty for part, _ in parts):
        raise InvalidInput(f"{where}: the geometry is empty")
    moved = [to_lonlat(part, crs, where) for part, crs in parts if not part.is_empty]
    whole = moved[0] if len(moved) == 1 else shapely.union_all(moved)
    result: dict[str, Any] = json.loads(json.dumps(mapping(whole)))
    return result


def _parse(data: Any, where: str) -> BaseGeometry:
    kind = data.get("type") if isinstance(data, Mapping) else None
    if kind == "Feature":
        return _parse(data.get("geometry"), where)
    if kind == "FeatureCollection":
        return shapely.union_all([_parse(feature, where) for feature in data.get("features", [])])
    if kind not in _GEOMETRIES:
        raise InvalidInput(f"{where}: expected a GeoJSON geometry, Feature or FeatureCollection, got type {kind!r}")
    return shapely.force_2d(shape(data))


def _stated_crs(data: Any, where: str) -> str | None:
    stated = data.get("crs") if isinstance(data, Mapping) else None
    if stated is None:
        return None
    name = (stated.get("properties") or {}).get("name") if isinstance(stated, Mapping) else stated
    if not isinstance(name, str):
        raise InvalidInput(f"{where}: crs {str(stated)[:80]!r} is not understood; expected a name such as EPSG:32633")
    return name


def _wkt(data: bytes, where: str) -> tuple[BaseGeometry, str | None]:
    text = data.decode("utf-8", "replace").strip()
    srid = re.match(r"SRID=(\d+);", text)
    try:
        geometry = shapely.from_wkt(text[srid.end() :] if srid else text)
    except ShapelyError as error:
        raise InvalidInput(f"{where}: not valid WKT: {error}") from error
    return shapely.force_2d(geometry), f"EPSG:{srid.group(1)}" if srid else None


def _parquet(path: str | Path) -> Iterator[tuple[BaseGeometry, str | None]]:
    from ingest.request.parquet import open_geoparquet  # pyarrow is loaded only where a file needs it

    with open_geoparquet(path) as file:
        wkb, _ = file.read(most_rows=_MAX_ROWS, most_bytes=_MAX_DECODED)
    return _decoded(wkb, file.crs, path)


def _geopackage(path: str | Path) -> Iterator[tuple[BaseGeometry, str | None]]:
    with open_geopackage(path) as package:
        if len(package.layers) != 1:
            names = ", ".join(package.layers) or "none"
            raise InvalidInput(f"{path}: expected one layer of features, got {names}; keep one of them")
        layer = package.layer(package.layers[0])
        wkb, _ = package.read(layer, most=_MAX_ROWS)
    return _decoded(wkb, layer.crs, path)


def _decoded(
    wkb: npt.NDArray[np.object_], crs: str | None, path: str | Path
) -> Iterator[tuple[BaseGeometry, str | None]]:
    try:
        for value in wkb:
            if value is not None:
                yield shapely.force_2d(shapely.from_wkb(value)), crs
    except (ShapelyError, TypeError) as error:
        raise InvalidInput(f"{path}: a geometry cannot be decoded ({error})") from error
