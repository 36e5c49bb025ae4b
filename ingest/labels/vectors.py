"""Polygons out of a file by exactly one reader, which the file's first bytes and its name must agree on.

OGR tries every driver on a file, whatever its name says: a text that begins with `<OGRVRTDataSource` reads other files
and addresses. So the first bytes are looked at before OGR is, OGR has no other drivers (`ingest.raster.drivers`), and it is
given a folder in which nothing lies but the files that belong to the format. GeoPackages are databases whose views may
call functions: they are read by SQLite alone, and only from a table.
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
from zarr_store.errors import InvalidInput, UnknownName
from zarr_store.regular import check_regular, open_regular

__all__ = ["VECTOR_SUFFIXES", "Table", "check_attribute", "check_start", "read_table"]

VECTOR_SUFFIXES = (".geojson", ".json", ".gpkg", ".fgb", ".shp", ".parquet", ".geoparquet")
_MOST_BYTES = 4 << 30
_MOST_TEXT_BYTES = 512 << 20
"""Of GeoJSON, which is parsed as a whole and takes several times its size in memory."""
_START_BYTES = 4096
_STARTS: dict[str, tuple[str, Callable[[bytes], bool]]] = {
    ".geojson": ("a JSON object", lambda start: start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"{"),
    ".gpkg": ("a GeoPackage", lambda start: start.startswith(b"SQLite format 3\0")),
    ".fgb": ("FlatGeobuf", lambda start: start.startswith(b"fgb\x03fgb")),
    ".shp": ("a shapefile", lambda start: start[:4] == (9994).to_bytes(4, "big")),
    ".parquet": ("Parquet", lambda start: start.startswith(b"PAR1")),
}
_STARTS |= {".json": _STARTS[".geojson"], ".geoparquet": _STARTS[".parquet"]}
_PARTS = {".shp": (".shx", ".dbf", ".prj", ".cpg")}
"""Files that belong to one of this name; others beside it are not looked at."""


@dataclass(frozen=True)
class Table:
    """Features as they are in a file: WKB, one value each or None, and the CRS as text that pyproj understands."""

    wkb: npt.NDArray[np.object_]
    values: npt.NDArray[Any] | None
    crs: str


def check_start(path: Path) -> None:
    """Refuse a file whose first bytes are not of the format that its name says, or that is too large to be read.

    Raises:
        InvalidInput: It is absent, no regular file, too large, or something else.
    """
    suffix = path.suffix.lower()
    try:
        with open_regular(path) as file:
            start, size = file.read(_START_BYTES), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror or error}") from error
    expected, fits = _STARTS[suffix]
    if not fits(start):
        raise InvalidInput(f"{path}: expected {expected}, as its name says, but it begins with {start[:24]!r}")
    most = _MOST_TEXT_BYTES if expected == _STARTS[".geojson"][0] else _MOST_BYTES
    if size > most:
        raise InvalidInput(f"{path} has more than {most >> 20} MiB; cut it to the ground of the cube first")


def read_table(path: Path, attribute: str | None, layer: str | None) -> Table:
    """Features of a GeoJSON, GeoPackage, FlatGeobuf or shapefile.

    Args:
        path: The file; `check_start` has seen it.
        attribute: Which column of values is wanted.
        layer: Of a file with several.

    Raises:
        InvalidInput: The file cannot be read, states no CRS or one that leads elsewhere, or has several layers and none
            is named.
        UnknownName: It has no such layer or attribute.
    """
    if path.suffix.lower() == ".gpkg":
        return _read_geopackage(path, attribute, layer)
    limit_vector_drivers()
    try:
        check_stated_crs(path)
        with _alone(path) as file:
            chosen = _choose([str(name) for name in pyogrio.list_layers(file)[:, 0]], layer, path)
            fields = [str(name) for name in pyogrio.read_info(file, layer=chosen)["fields"]]
            check_attribute(attribute, fields, path)
            meta, _, geometry, columns = pyogrio.raw.read(
                file, layer=chosen, columns=[] if attribute is None else [attribute]
            )
    except (DataSourceError, DataLayerError, FeatureError, FieldError, GeometryError) as error:
        # what follows is advice to name another driver, of which there is none
        cause = str(error).partition("; It might help")[0].replace(str(file), str(path))
        raise InvalidInput(f"{path} cannot be read as polygons: {cause}") from error
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror or error}") from error
    if not meta["crs"]:
        raise InvalidInput(f"{path} states no CRS; assign one, e.g. with ogr2ogr -a_srs EPSG:…")
    return Table(geometry, columns[0] if columns else None, str(meta["crs"]))


@contextmanager
def _alone(path: Path) -> Iterator[Path]:
    """The file, and those that belong to it, by themselves in a folder of their own: links, so nothing is copied.

    Raises:
        OSError: One of them is no regular file.
    """
    with tempfile.TemporaryDirectory(prefix="terrashard-") as folder:
        # a layer is named by its file
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
        check_attribute(attribute, [n for n in chosen.columns if n != chosen.geometry], path)
        wkb, values = package.read(chosen, attribute)
    if chosen.crs is None:
        raise InvalidInput(f"{path} states no CRS; assign one, e.g. with ogr2ogr -a_srs EPSG:…")
    return Table(wkb, values, chosen.crs)


def _choose(layers: Sequence[str], layer: str | None, path: Path) -> str:
    if layer is not None and layer not in layers:
        raise UnknownName.of("layer", layer, layers, f"{path} (--layer)")
    if layer is None and len(layers) != 1:
        raise InvalidInput(f"{path} has the layers {', '.join(layers) or 'none'}; name one with --layer")
    return layer or layers[0]


def check_attribute(attribute: str | None, known: Sequence[str], path: Path) -> None:
    """Refuse an attribute that a file does not have; the nearest one is named."""
    if attribute is not None and attribute not in known:
        raise UnknownName.of("attribute", attribute, known, f"{path} (--attribute)")
