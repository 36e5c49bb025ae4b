"""`write_polygons` writes the patches of a map as GeoParquet, GeoJSON or GeoPackage; a file appears whole or never.

Specs: GeoParquet 1.1.0 (geoparquet.org), RFC 7946 for GeoJSON: longitude and latitude of WGS 84, exterior rings
counterclockwise.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely
from pyproj import CRS

from ingest.products.layer import ClassLayer
from ingest.products.outlines import Drawn, draw_patches, simplify
from ingest.products.patches import Patches, find_patches
from zarr_store.crs import transformer_between
from zarr_store.errors import AccessError, InvalidInput, NoSpace, NothingFound, space_advice
from zarr_store.store import check_room, space_number, translate_os_errors

__all__ = ["SUFFIXES", "beside", "check_vector_target", "write_polygons"]

SUFFIXES = (".parquet", ".geojson", ".gpkg")
_DIGITS = 7
"""Decimals of degrees in GeoJSON: 1 cm."""
_LAYER = "classes"
_ROW_BYTES = 100
"""Bytes of a feature in a GeoPackage beside its geometry, with its part of the index, roughly."""

Columns = dict[str, npt.NDArray[Any]]


def check_vector_target(path: Path) -> None:
    """Refuse a target whose name is of no format that is written.

    Raises:
        InvalidInput: It is one.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise InvalidInput(f"--polygons needs a file named *{', *'.join(SUFFIXES)}, got {path}")
    if path.is_dir():
        raise InvalidInput(f"--polygons {path} is a folder; name a file in it")


def write_polygons(layer: ClassLayer, path: Path, *, min_area: float = 0.0, tolerance: float = 0.0) -> dict[str, Any]:
    """Write the patches of a map as polygons with class, name, area (m²) and mean confidence (per cent).

    Args:
        layer: The classes.
        path: The file; its suffix names the format. Replaced if it exists.
        min_area: Minimum mapping unit, m²: smaller patches go into their largest neighbour.
        tolerance: Simplify borders, neighbours together, by this much in units of the CRS; 0: pixel edges.

    Returns:
        path, polygons, merged.

    Raises:
        InvalidInput: The target or a number cannot be used.
        NothingFound: The map holds no class anywhere.
        NoSpace: The disk is full.
    """
    check_vector_target(path)
    for option, number in (("--min-area", min_area), ("--simplify", tolerance)):
        if not (np.isfinite(number) and number >= 0):
            raise InvalidInput(f"{option} {number}: expected a number from 0 up")
    patches = find_patches(layer, min_area=min_area)
    if not len(patches):
        raise NothingFound(f"no pixel of the map has a class, so {path.name} would hold no polygon")
    drawn: Iterator[Drawn] = draw_patches(layer, patches)
    if tolerance:
        drawn = iter(simplify(list(drawn), tolerance, min(layer.grid.resolution)))
    write = {".parquet": _write_parquet, ".geojson": _write_geojson, ".gpkg": _write_geopackage}[path.suffix.lower()]
    with translate_os_errors(str(path)), beside(path) as part:
        write(layer, patches, drawn, part)
    return {"path": str(path), "polygons": len(patches), "merged": patches.merged}


def _columns(layer: ClassLayer, patches: Patches, part: Drawn) -> Columns:
    value = patches.value[part.patch]
    return {
        "class": value.astype(np.int32),
        "name": np.array(layer.names, object)[value],
        "area_m2": patches.area[part.patch].round(3),
        "confidence": patches.confidence[part.patch].round(2),
    }


def _write_parquet(layer: ClassLayer, patches: Patches, drawn: Iterator[Drawn], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    box = pa.struct([(name, pa.float64()) for name in ("xmin", "ymin", "xmax", "ymax")])
    schema = pa.schema([("class", pa.int32()), ("name", pa.string()), ("area_m2", pa.float64()),
                        ("confidence", pa.float64()), ("bbox", box), ("geometry", pa.binary())])  # fmt: skip
    bounds, kinds = np.array([np.inf, np.inf, -np.inf, -np.inf]), set()
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for part in drawn:
            corners = shapely.bounds(part.shape)
            kinds |= set(np.unique(shapely.get_type_id(part.shape)).tolist())
            bounds = np.concatenate([np.minimum(bounds[:2], corners.min(axis=0)[:2]),
                                     np.maximum(bounds[2:], corners.max(axis=0)[2:])])  # fmt: skip
            arrays = [pa.array(column, schema.field(name).type, from_pandas=True)
                      for name, column in _columns(layer, patches, part).items()]  # fmt: skip
            arrays += [pa.StructArray.from_arrays(list(corners.T.copy()), fields=list(box)),
                       pa.array(shapely.to_wkb(part.shape), pa.binary())]  # fmt: skip
            writer.write_table(pa.table(arrays, schema=schema))
        writer.add_key_value_metadata({"geo": json.dumps(_geo(layer, bounds, kinds), sort_keys=True)})


def _geo(layer: ClassLayer, bounds: npt.NDArray[np.float64], kinds: set[int]) -> dict[str, Any]:
    names = {3: "Polygon", 6: "MultiPolygon"}
    return {
        "version": "1.1.0",
        "primary_column": "geometry",
        "columns": {
            "geometry": {
                "encoding": "WKB",
                "geometry_types": [names[kind] for kind in sorted(kinds)],
                "crs": CRS.from_user_input(layer.grid.crs).to_json_dict(),
                "orientation": "counterclockwise",
                "bbox": bounds.tolist(),
                "covering": {"bbox": {name: ["bbox", name] for name in ("xmin", "ymin", "xmax", "ymax")}},
            }
        },
    }


def _write_geojson(layer: ClassLayer, patches: Patches, drawn: Iterator[Drawn], path: Path) -> None:
    move = transformer_between(layer.grid.crs, "EPSG:4326").transform

    def place(xy: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return np.stack(move(xy[:, 0], xy[:, 1]), axis=-1).round(_DIGITS)

    with path.open("w", encoding="utf-8") as file:
        file.write('{"type": "FeatureCollection", "features": [')
        comma = "\n"
        for part in drawn:
            placed = shapely.orient_polygons(shapely.transform(part.shape, place))
            columns = _columns(layer, patches, part)
            for row, text in enumerate(shapely.to_geojson(placed)):
                about = {name: _plain(column[row]) for name, column in columns.items()}
                file.write(f'{comma}{{"type": "Feature", "properties": {json.dumps(about, ensure_ascii=False)}, '
                           f'"geometry": {text}}}')  # fmt: skip
                comma = ",\n"
        file.write("\n]}\n")


def _plain(value: Any) -> Any:
    """Return a value as JSON has it; null for none."""
    plain = value.item() if isinstance(value, np.generic) else value
    return None if plain != plain else plain


def _write_geopackage(layer: ClassLayer, patches: Patches, drawn: Iterator[Drawn], path: Path) -> None:
    import pyogrio
    from pyogrio._err import CPLE_BaseError
    from pyogrio.errors import DataLayerError, DataSourceError
    from pyogrio.raw import write as write_features

    before = pyogrio.get_gdal_config_option("OGR_CURRENT_DATE")
    # the time of writing would make other bytes each time
    pyogrio.set_gdal_config_options({"OGR_CURRENT_DATE": "2000-01-01T00:00:00.000Z"})
    size = 0
    try:
        for number, part in enumerate(drawn):
            columns = _columns(layer, patches, part)
            shapes = np.asarray(shapely.to_wkb(part.shape), object)
            size = _size_of(path) + sum(map(len, shapes)) + _ROW_BYTES * len(shapes)
            write_features(
                str(path), shapes, list(columns.values()), list(columns),
                layer=_LAYER, driver="GPKG", crs=layer.grid.crs, geometry_type="Unknown", append=number > 0,
            )  # fmt: skip
        if not _has_index(path):  # GDAL makes it at the end, and is silent where it cannot
            raise DataLayerError("its spatial index could not be made")
    except (DataSourceError, DataLayerError, CPLE_BaseError) as error:  # it seldom says that a disk is full
        # SQLite takes its changes back, which frees room; it needed that of the changed pages and of the old ones,
        # and the index, which comes last, adds up to a half
        size = max(size, _size_of(path) * 3 // 2)
        check_room(path.parent, path.name, size=size, room=size)
        if advice := space_advice(space_number(error)):
            raise NoSpace(f"no space left for {path.name}; {advice} and repeat the command") from error
        raise AccessError(
            f"cannot write {path.name}: {error}; check the folder, and that it has room for {size} bytes"
        ) from error
    finally:
        pyogrio.set_gdal_config_options({"OGR_CURRENT_DATE": before})


def _size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _has_index(path: Path) -> bool:
    query = "SELECT count(*) FROM gpkg_extensions WHERE extension_name = 'gpkg_rtree_index'"
    try:
        with contextlib.closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as base:
            return bool(base.execute(query).fetchone()[0])
    except sqlite3.Error:
        return False


@contextlib.contextmanager
def beside(path: Path) -> Iterator[Path]:
    """Yield a file in a folder of its own beside the target, which takes its place when the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    try:
        part = folder / path.name
        yield part
        os.replace(part, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
