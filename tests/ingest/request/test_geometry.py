"""Regions from files of several formats, in any CRS, over the antimeridian."""

from __future__ import annotations

import json
import sqlite3
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyproj
import pytest
import shapely
from shapely.geometry import box, mapping, shape

from ingest.plan.target import region_lonlat
from ingest.request.config import IngestConfig
from ingest.request.geometry import load_geometry, to_lonlat
from ingest.request.settings import make_config
from zarr_store.errors import InvalidInput

UTM_BOX = box(500_000, 5_000_000, 600_000, 5_100_000)


def lonlat(geometry: Any) -> Any:
    transformer = pyproj.Transformer.from_crs(32633, 4326, always_xy=True)
    return shapely.transform(geometry, lambda xy: np.column_stack(transformer.transform(*xy.T)))


def expected() -> Any:
    return lonlat(shapely.segmentize(UTM_BOX, 500))


def write(kind: str, folder: Path) -> Path:
    path = folder / f"region.{kind}"
    if kind == "geojson":
        crs = {"type": "name", "properties": {"name": "urn:ogc:def:crs:EPSG::32633"}}
        path.write_text(json.dumps({"type": "FeatureCollection", "crs": crs,
                                    "features": [{"type": "Feature", "geometry": mapping(UTM_BOX)}]}))  # fmt: skip
    elif kind == "wkt":
        path.write_text(f"SRID=32633;{UTM_BOX.wkt}\n")
    elif kind == "parquet":
        crs = pyproj.CRS(32633).to_json_dict()
        geo = {"version": "1.1.0", "primary_column": "shape", "columns": {"shape": {"encoding": "WKB", "crs": crs}}}
        table = pa.table({"shape": [UTM_BOX.wkb, None], "name": ["a", "b"]})
        pq.write_table(table.replace_schema_metadata({"geo": json.dumps(geo)}), path)
    else:
        with sqlite3.connect(path) as database:
            columns = "srs_id, organization, organization_coordsys_id, definition"
            database.execute(f"CREATE TABLE gpkg_spatial_ref_sys ({columns})")
            database.execute("INSERT INTO gpkg_spatial_ref_sys VALUES (32633, 'EPSG', 32633, '')")
            database.execute("CREATE TABLE gpkg_geometry_columns (table_name, column_name, srs_id)")
            database.execute("INSERT INTO gpkg_geometry_columns VALUES ('my \"fields\"', 'geom', 32633)")
            database.execute('CREATE TABLE "my ""fields""" (fid INTEGER PRIMARY KEY, geom BLOB)')
            blob = b"GP" + bytes([0, 0b0011]) + struct.pack("<i4d", 32633, 5e5, 6e5, 5e6, 5.1e6) + UTM_BOX.wkb
            database.execute('INSERT INTO "my ""fields""" (geom) VALUES (?)', (blob,))
        database.close()
    return path


@pytest.mark.parametrize("kind", ["geojson", "wkt", "parquet", "gpkg"])
def test_every_format_gives_the_same_ground(kind: str, tmp_path: Path) -> None:
    got = shape(load_geometry(write(kind, tmp_path)))
    joint = shapely.union(got, expected()).area
    assert shapely.intersection(got, expected()).area / joint > 0.9999
    # corners alone would miss the curve of the northern edge
    corners = lonlat(UTM_BOX)
    assert shapely.intersection(corners, expected()).area / joint < 0.9999
    asked = make_config(None, {"geometry": tmp_path / f"region.{kind}"})
    assert asked.selection.geometry is not None
    assert shape(asked.selection.geometry).equals(got)


def test_what_crosses_the_antimeridian_is_cut() -> None:
    fiji = box(700_000, 8_000_000, 900_000, 8_200_000)  # zone 60 south, beyond its edge
    with pytest.raises(InvalidInput, match="state the CRS in the file"):  # as a GeoPackage without a CRS has it
        to_lonlat(fiji, 'LOCAL_CS["Undefined SRS",LOCAL_DATUM["unknown",32767],UNIT["unknown",0]]', "x")
    got = to_lonlat(fiji, "EPSG:32760", "x")
    assert isinstance(got, shapely.MultiPolygon)
    assert got.bounds[0] == -180
    assert got.bounds[2] == 180
    assert all(part.bounds[2] - part.bounds[0] < 3 for part in got.geoms)
    region = region_lonlat(IngestConfig(geometry=mapping(got)))
    assert region is not None
    assert 178 < region[0] < 180 < region[2] < 183
    asked = IngestConfig(geometry=mapping(box(179, -18, 181, -17))).selection.geometry
    assert asked is not None
    beyond = shape(asked)
    assert beyond.area == pytest.approx(2.0)
    assert beyond.bounds[2] <= 180


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.geojson", b'{"type": "Point", "coordinates": [500000, 5000000]}', "degrees"),
        ("a.geojson", b'{"type": "Point", "coordinates": [1, 2], "crs": "EPSG:999999"}', "CRS 'EPSG:999999'"),
        ("a.geojson", b'{"type": "Point", "coordinates": [1, 2], "crs": {"type": "link"}}', "not understood"),
        ("a.geojson", b'{"type": "Polygon", "coordinates": []}', "empty"),
        ("a.wkt", b"POLYGON ((0 0, 1 1", "not valid WKT"),
        ("a.shp", b"\x00\x00\x27\x0a", "convert it"),
        ("a.parquet", b"PAR1 and nothing", "unreadable GeoParquet"),
        ("a.gpkg", b"SQLite format 3\x00" + bytes(100), "unreadable GeoPackage"),
        ("a.txt", b"hello", "not JSON"),
    ],
)
def test_files_that_are_no_region(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InvalidInput, match=message):
        load_geometry(path)
