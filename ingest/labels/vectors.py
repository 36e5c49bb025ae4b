"""`read_table` reads a file of polygons with the reader of its format, on which its first bytes and name must agree.

OGR tries every driver on a file, whatever its name: a text that begins with `<OGRVRTDataSource` makes it read other
files and addresses. So the first bytes are checked before OGR opens the file, OGR has no other drivers
(`ingest.raster.drivers`), and it sees a folder that holds only the files of the format. GeoPackages are databases whose
views may call functions, so SQLite alone reads them, and only from a table. GeoPackage and GeoParquet have one reader
each for labels and for the regions of a search (`ingest.request`).
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyogrio
from pyogrio.errors import DataLayerError, DataSourceError, FeatureError, FieldError, GeometryError

from ingest.labels.stated_crs import check_stated_crs
from ingest.raster.drivers import limit_vector_drivers
from ingest.request.geopackage import open_geopackage
from ingest.request.parquet import open_geoparquet
from zarr_store.errors import InvalidInput, UnknownName
from zarr_store.regular import check_regular, open_regular

__all__ = ["VECTOR_SUFFIXES", "Table", "check_start", "read_table"]

VECTOR_SUFFIXES = (".geojson", ".json", ".gpkg", ".fgb", ".shp", ".parquet", ".geoparquet")
_MOST_BYTES = 4 << 30
"""Largest size of a file in bytes, and of the rows of a Parquet file once they are decoded."""
_MOST_TEXT_BYTES = 512 << 20
"""Largest size of GeoJSON in bytes, which is parsed as a whole and takes several times its size in memory."""
_START_BYTES = 4096
"""Number of bytes at the start of a file that are checked."""
_PARQUET = (".parquet", ".geoparquet")
_STARTS: dict[str, tuple[str, Callable[[bytes], bool]]] = {
    ".geojson": ("a JSON object", lambda start: start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"{"),
    ".gpkg": ("a GeoPackage", lambda start: start.startswith(b"SQLite format 3\0")),
    ".fgb": ("FlatGeobuf", lambda start: start.startswith(b"fgb\x03fgb")),
    ".shp": ("a shapefile", lambda start: start[:4] == (9994).to_bytes(4, "big")),
    ".parquet": ("Parquet", lambda start: start.startswith(b"PAR1")),
}
_STARTS |= {".json": _STARTS[".geojson"], ".geoparquet": _STARTS[".parquet"]}
_PARTS = {".shp": (".shx", ".dbf", ".prj", ".cpg")}
"""Suffixes of the files that belong to a file of this suffix; other files beside it are ignored."""


@dataclass(frozen=True)
class Table:
    """Features as a file has them: WKB, their values if an attribute was asked for, and the CRS as text for pyproj."""

    wkb: npt.NDArray[np.object_]
    values: npt.NDArray[Any] | None
    crs: str


def check_start(path: Path) -> None:
    """Refuse a file that is too large, or whose first bytes do not match the format of its name.

    Raises:
        InvalidInput: The file is absent, no regular file, too large, or of another format.
    """
    suffix = path.suffix.lower()
    try:
        with open_regular(path) as file:
            start, size = file.read(_START_BYTES), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror or error}") from error
    expected, fits = _STARTS[suffix]
    if not fits(start):
        raise InvalidInput(
            f"{path}: expected {expected}, as its name says, but the file begins with {start[:24]!r}; correct its name"
        )
    most = _MOST_TEXT_BYTES if expected == _STARTS[".geojson"][0] else _MOST_BYTES
    if size > most:
        raise InvalidInput(
            f"{path}: expected at most {most >> 20} MiB, got {size >> 20} MiB; cut it to the area of the cube"
        )


def read_table(path: Path, attribute: str | None, layer: str | None) -> Table:
    """Read the features of a GeoJSON, GeoPackage, FlatGeobuf, shapefile or GeoParquet file.

    Args:
        path: The file, which `check_start` has accepted.
        attribute: Column of values to read; None for none.
        layer: Layer of a file that has several.

    Raises:
        InvalidInput: The file cannot be read, states no CRS or one that leads elsewhere, or has several layers and none
            is named.
        UnknownName: It has no such layer or attribute.
    """
    if path.suffix.lower() == ".gpkg":
        return _read_geopackage(path, attribute, layer)
    if path.suffix.lower() in _PARQUET:
        return _read_geoparquet(path, attribute)
    limit_vector_drivers()
    try:
        check_stated_crs(path)
        with _in_own_folder(path) as file:
            chosen = _choose([str(name) for name in pyogrio.list_layers(file)[:, 0]], layer, path)
            fields = [str(name) for name in pyogrio.read_info(file, layer=chosen)["fields"]]
            _check_attribute(attribute, fields, path)
            meta, _, geometry, columns = pyogrio.raw.read(
                file, layer=chosen, columns=[] if attribute is None else [attribute]
            )
    except (DataSourceError, DataLayerError, FeatureError, FieldError, GeometryError) as error:
        # the rest of the message advises to name another driver, and there is none
        cause = str(error).partition("; It might help")[0].replace(str(file), str(path))
        raise InvalidInput(f"{path} cannot be read as polygons: {cause}") from error
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror or error}") from error
    if not meta["crs"]:
        raise InvalidInput(f"{path} states no CRS; assign one, e.g. with ogr2ogr -a_srs EPSG:…")
    return Table(geometry, columns[0] if columns else None, str(meta["crs"]))


@contextmanager
def _in_own_folder(path: Path) -> Iterator[Path]:
    """Link a file, and those that belong to it, into an empty folder, so that OGR sees nothing else.

    Raises:
        OSError: One of them is not a regular file.
    """
    with tempfile.TemporaryDirectory(prefix="terrashard-") as folder:
        # the layer gets the name of its file
        alone = Path(folder, re.sub(r"[^\w.-]", "_", path.stem) or "layer").with_suffix(path.suffix.lower())
        alone.symlink_to(path.resolve())
        for suffix in _PARTS.get(path.suffix.lower(), ()):
            part = next((p for p in (path.with_suffix(suffix), path.with_suffix(suffix.upper())) if p.exists()), None)
            if part is not None:
                check_regular(part)
                alone.with_suffix(suffix).symlink_to(part.resolve())
        yield alone


def _read_geopackage(path: Path, attribute: str | None, layer: str | None) -> Table:
    with open_geopackage(path) as package:
        chosen = package.layer(_choose(list(package.layers), layer, path))
        _check_attribute(attribute, [n for n in chosen.columns if n != chosen.geometry], path)
        wkb, values = package.read(chosen, attribute)
    if chosen.crs is None:
        raise InvalidInput(f"{path} states no CRS; assign one, e.g. with ogr2ogr -a_srs EPSG:…")
    return Table(wkb, values, chosen.crs)


def _read_geoparquet(path: Path, attribute: str | None) -> Table:
    with open_geoparquet(path) as file:
        _check_attribute(attribute, file.attributes, path)
        wkb, values = file.read(attribute, most_bytes=_MOST_BYTES)
    if file.crs is None:
        raise InvalidInput(f"{path} states that its CRS is unknown; assign one, e.g. with ogr2ogr -a_srs EPSG:…")
    return Table(wkb, values, file.crs)


def _choose(layers: Sequence[str], layer: str | None, path: Path) -> str:
    if layer is not None and layer not in layers:
        raise UnknownName.of("layer", layer, layers, f"{path} (--layer)")
    if layer is None and len(layers) != 1:
        raise InvalidInput(f"{path} has the layers {', '.join(layers) or 'none'}; name one with --layer")
    return layer or layers[0]


def _check_attribute(attribute: str | None, known: Sequence[str], path: Path) -> None:
    """Refuse an attribute that a file does not have; the error names the nearest one."""
    if attribute is not None and attribute not in known:
        raise UnknownName.of("attribute", attribute, known, f"{path} (--attribute)")
