"""Read and write stac-geoparquet: one row per item, as the stac-geoparquet package, rustac and Planetary Computer do.

Properties are columns, `assets` and `bbox` are structs, `geometry` is WKB. Only pyarrow and shapely are needed. Fields
that a writer stored as JSON text are read, too.
"""

from __future__ import annotations

import datetime as dt
import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import shapely
from shapely.errors import ShapelyError
from shapely.geometry import mapping, shape

from ingest.request.parquet import decoded_batches
from zarr_store.errors import InvalidInput
from zarr_store.regular import check_regular, open_regular

__all__ = ["decoded_batches", "is_parquet", "read_items", "write_items"]

log = logging.getLogger(__name__)

_TOP = ("type", "stac_version", "stac_extensions", "id", "geometry", "bbox", "links", "assets", "collection")
_MAX_ROWS = 1_000_000
"""Largest number of items of a file."""


def is_parquet(path: str | Path) -> bool:
    """Return whether a local file begins as Parquet does."""
    try:
        with open_regular(path) as stream:
            return stream.read(4) == b"PAR1"
    except OSError:
        return False


def read_items(path: str | Path) -> list[dict[str, Any]]:
    """Read all items of a stac-geoparquet file.

    Raises:
        InvalidInput: The file is unreadable, too large, or no table of STAC items.
    """
    try:
        check_regular(path)
        file = pq.ParquetFile(path)
        lacking = {"id", "assets", "geometry"} - set(file.schema_arrow.names)
        if lacking:
            raise InvalidInput(
                f"{path}: expected stac-geoparquet, but the columns {', '.join(sorted(lacking))} are missing"
            )
        if file.metadata.num_rows > _MAX_ROWS:
            raise InvalidInput(f"{path}: {file.metadata.num_rows} rows are more than {_MAX_ROWS}; select fewer items")
        rows = [row for batch in decoded_batches(file, path) for row in batch.to_pylist()]
    except (pa.ArrowException, OSError) as error:
        raise InvalidInput(f"{path}: unreadable Parquet file ({error}); write or fetch it again") from error
    return [_item_or_name(row, f"{path}, row {number}") for number, row in enumerate(rows)]


def write_items(items: Iterable[Mapping[str, Any]], path: str | Path | BinaryIO) -> None:
    """Write items so that `read_items`, geopandas and rustac read them; nested fields keep their JSON shape."""
    rows = []
    for item in items:
        row = {name: item.get(name) for name in _TOP if name not in ("geometry", "bbox")}
        row["geometry"] = shapely.to_wkb(shape(item["geometry"])) if item.get("geometry") else None
        row["bbox"] = _struct_box(item.get("bbox"))
        for name, value in item["properties"].items():
            if name not in _TOP:
                # structs of mixed shape do not fit one column, so nested properties are JSON text
                row[name] = json.dumps(value) if isinstance(value, dict | list) else value
        row["assets"], row["links"] = json.dumps(item["assets"]), json.dumps(item.get("links", []))
        rows.append(row)
    names = sorted({name for row in rows for name in row}, key=lambda name: (name not in _TOP, name))
    columns = {name: _column([row.get(name) for row in rows]) for name in names}
    geo = {
        "version": "1.1.0",
        "primary_column": "geometry",
        "columns": {"geometry": {"encoding": "WKB", "geometry_types": []}},
    }
    table = pa.table(columns).replace_schema_metadata({"geo": json.dumps(geo)})
    pq.write_table(table, path, compression="zstd")


def _column(values: list[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):  # 1 in one item and "1" in another
        return pa.array([None if value is None else json.dumps(value) for value in values])


def _struct_box(bounds: Any) -> dict[str, float] | None:
    if not bounds:
        return None
    half = len(bounds) // 2
    names = ("xmin", "ymin", "xmax", "ymax")
    return dict(zip(names, (float(bounds[i]) for i in (0, 1, half, half + 1)), strict=True))


def _item_or_name(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the item of a row; if the row is not an item, what the search needs to name it as left out."""
    try:
        return _item(row, where)
    except InvalidInput as error:
        log.warning("%s", error)
        return {"id": str(row.get("id") or where), "collection": row.get("collection")}


def _item(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    item: dict[str, Any] = {"type": "Feature", "properties": {}}
    try:
        for name, value in row.items():
            if value is None:
                continue
            if name == "geometry":
                item[name] = json.loads(json.dumps(mapping(shapely.from_wkb(value))))
            elif name == "bbox":
                item[name] = [value[k] for k in ("xmin", "ymin", "xmax", "ymax")] if isinstance(value, dict) else value
            elif name in _TOP:
                item[name] = _plain(value)
            else:
                item["properties"][name] = _plain(value)
        item["assets"] = {key: asset for key, asset in item["assets"].items() if asset}
    except (ShapelyError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise InvalidInput(f"{where}: not a STAC item ({error})") from error
    return item


def _plain(value: Any) -> Any:
    """Convert to JSON values: drop absent fields of structs, write maps and times as STAC does, parse JSON text."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        if value and all(isinstance(pair, tuple) and len(pair) == 2 for pair in value):  # an Arrow map
            return {key: _plain(inner) for key, inner in value if inner is not None}
        return [_plain(inner) for inner in value]
    if isinstance(value, dt.datetime):
        moment = value if value.tzinfo else value.replace(tzinfo=dt.UTC)
        return moment.astimezone(dt.UTC).isoformat().replace("+00:00", "Z")
    if isinstance(value, bytes):
        return json.loads(json.dumps(mapping(shapely.from_wkb(value))))  # proj:geometry
    if isinstance(value, str) and value[:1] in "[{" and value[-1:] in "]}":
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value
