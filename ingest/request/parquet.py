"""Rows of Parquet files, a few at a time and within bounds of memory; features are read and written as GeoParquet."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from shapely.geometry.base import BaseGeometry

from zarr_store.bounded import load_json
from zarr_store.crs import parse_crs
from zarr_store.durable import write_file
from zarr_store.errors import InvalidInput

__all__ = ["GeoParquet", "decoded_batches", "open_geoparquet", "write_geoparquet"]

_MOST_DECODED = 1 << 30
"""Largest size of all decoded rows, bytes; those of 100,000 scenes take about 800 MB."""
_ROWS_AT_ONCE = 32
"""Rows that are decoded at once."""


def decoded_batches(
    file: pq.ParquetFile, path: str | Path, columns: list[str] | None = None, most: int | None = None
) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a Parquet file a few at a time, while they stay within a limit on memory.

    A file may state a false size, and one text of a dictionary may appear in a million rows. So the size is counted as
    rows are decoded.

    Args:
        file: The open file.
        path: Path of the file, for errors.
        columns: Names of the columns to read; None for all.
        most: Largest size of all decoded rows, bytes.

    Raises:
        InvalidInput: The rows take more memory, as the file states or as it turns out.
    """
    most = _MOST_DECODED if most is None else most
    wanted = None if columns is None else set(columns)
    metadata = file.metadata
    stated = sum(
        chunk.total_uncompressed_size
        for group in range(metadata.num_row_groups)
        for chunk in (metadata.row_group(group).column(i) for i in range(metadata.num_columns))
        if wanted is None or chunk.path_in_schema.partition(".")[0] in wanted
    )
    came = 0
    for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=columns) if stated <= most else ():
        came += batch.get_total_buffer_size() if came == 0 else batch.nbytes
        if came > most:
            break
        yield batch
    if max(stated, came) > most:
        raise InvalidInput(f"{path}: its rows take more than {most >> 20} MiB once decoded; select fewer of them")


@dataclass(frozen=True)
class GeoParquet:
    """The features of an open GeoParquet file (1.x, geometries encoded as WKB).

    Attributes:
        path: The file, for errors.
        file: The open file.
        geometry: Name of the column of geometries.
        crs: Text that pyproj understands; None where the file says that its CRS is unknown.
    """

    path: str | Path
    file: pq.ParquetFile
    geometry: str
    crs: str | None

    @property
    def attributes(self) -> list[str]:
        """Names of the columns beside the geometries."""
        return [name for name in self.file.schema_arrow.names if name != self.geometry]

    def read(
        self, attribute: str | None = None, *, most_rows: int | None = None, most_bytes: int = _MOST_DECODED
    ) -> tuple[npt.NDArray[np.object_], npt.NDArray[np.object_] | None]:
        """Read the WKB of all features, None for those without a geometry, and the value that each has of an attribute.

        Args:
            attribute: The column of values; None for none.
            most_rows: Largest number of features.
            most_bytes: Largest number of bytes in memory.

        Raises:
            InvalidInput: The file holds more.
        """
        if most_rows is not None and self.file.metadata.num_rows > most_rows:
            raise InvalidInput(f"{self.path}: more than {most_rows} features; simplify it")
        columns = [self.geometry] + ([] if attribute is None else [attribute])
        wkb: list[bytes | None] = []
        values: list[object] = []
        for batch in decoded_batches(self.file, self.path, columns, most_bytes):
            wkb += batch.column(self.geometry).to_pylist()
            values += [] if attribute is None else batch.column(attribute).to_pylist()
        return _objects(wkb), None if attribute is None else _objects(values)


@contextmanager
def open_geoparquet(path: str | Path) -> Iterator[GeoParquet]:
    """Open a GeoParquet file; no CRS in it means longitude and latitude (OGC:CRS84), as the format has it.

    Raises:
        InvalidInput: The file is not GeoParquet, or cannot be read, also in the block.
    """
    try:
        with pq.ParquetFile(path) as file:
            geo = load_json((file.schema_arrow.metadata or {}).get(b"geo", b"{}"), where=str(path))
            name = geo.get("primary_column")
            column = (geo.get("columns") or {}).get(name)
            if not column or column.get("encoding") != "WKB" or name not in file.schema_arrow.names:
                encoding = column.get("encoding") if column else None
                raise InvalidInput(
                    f"{path}: expected GeoParquet with a column of WKB, got column {name!r} of encoding {encoding!r}; "
                    "convert it, e.g. with ogr2ogr"
                )
            crs = column.get("crs", "OGC:CRS84")
            yield GeoParquet(path, file, name, crs if crs is None or isinstance(crs, str) else json.dumps(crs))
    except (pa.ArrowException, OSError, ValueError, AttributeError, TypeError) as error:
        if isinstance(error, InvalidInput):
            raise
        raise InvalidInput(f"{path}: unreadable GeoParquet ({error})") from error


def write_geoparquet(
    path: str | Path, geometries: Sequence[BaseGeometry], columns: Mapping[str, Sequence[Any]], *, crs: str
) -> None:
    """Write features as GeoParquet 1.1, with geometries as WKB; the file appears whole.

    Args:
        path: The file.
        geometries: One for each feature.
        columns: The attributes by name, each with one value for each feature.
        crs: CRS of the geometries.
    """
    about = {"encoding": "WKB", "geometry_types": sorted({one.geom_type for one in geometries}),
             "crs": parse_crs(crs).to_json_dict()}  # fmt: skip
    geo = {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": about}}
    table = pa.table({name: pa.array(list(values)) for name, values in columns.items()}
                     | {"geometry": pa.array([one.wkb for one in geometries], pa.binary())})  # fmt: skip
    made = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({"geo": json.dumps(geo)}), made)
    write_file(Path(path), made.getvalue())


def _objects(items: list[object] | list[bytes | None]) -> npt.NDArray[np.object_]:
    array = np.empty(len(items), object)
    array[:] = items
    return array
