"""`GeoPackage`: layers of features from a database that may come from a stranger.

A GeoPackage is an SQLite database. OGR's reader adds functions that send requests and read files, and a view in the
database may call them. So SQLite alone reads it here, and it may only read plain tables and call no function.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from zarr_store.errors import InvalidInput
from zarr_store.regular import check_regular

__all__ = ["GeoPackage", "PackageLayer", "open_geopackage"]

_ALLOWED = (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ)
_VIRTUAL = re.compile(r"\s*CREATE\s+VIRTUAL", re.IGNORECASE)
_LAYERS = (
    "SELECT g.table_name, g.column_name, s.organization, s.organization_coordsys_id, s.definition "
    "FROM gpkg_geometry_columns g JOIN gpkg_spatial_ref_sys s ON g.srs_id = s.srs_id"
)


@dataclass(frozen=True)
class PackageLayer:
    """One layer of features.

    Attributes:
        name: Name of its table.
        geometry: Name of the column of geometries.
        columns: Names of all columns.
        crs: CRS as text that pyproj understands; None where it is not stated.
    """

    name: str
    geometry: str
    columns: tuple[str, ...]
    crs: str | None


@contextmanager
def open_geopackage(path: str | Path) -> Iterator[GeoPackage]:
    """Open a GeoPackage for reading; a file that another program has not finished writing is refused.

    Raises:
        InvalidInput: The file cannot be read, here or inside the `with` block.
    """
    try:
        check_regular(path)
        for suffix in ("-wal", "-journal"):
            beside = Path(f"{path}{suffix}")
            if beside.exists() and beside.stat().st_size:
                raise InvalidInput(
                    f"{path}: {beside.name} holds changes that are not yet in it; close the program that writes it"
                )
        uri = f"{Path(path).resolve().as_uri()}?mode=ro&immutable=1"
        with closing(sqlite3.connect(uri, uri=True)) as database:
            database.execute("PRAGMA trusted_schema = OFF")
            database.set_authorizer(_authorise)
            yield GeoPackage(path, database)
    except (sqlite3.Error, ValueError, IndexError, TypeError) as error:
        if isinstance(error, InvalidInput):
            raise
        raise InvalidInput(f"{path}: unreadable GeoPackage ({error})") from error
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror or error}") from error


class GeoPackage:
    """The layers of an open GeoPackage."""

    def __init__(self, path: str | Path, database: sqlite3.Connection) -> None:
        self._path = path
        self._database = database
        self._rows = {str(row[0]): row for row in database.execute(_LAYERS).fetchall()}

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers that have geometries."""
        return tuple(self._rows)

    def layer(self, name: str) -> PackageLayer:
        """Return a layer with its columns.

        Raises:
            InvalidInput: The layer is not a table but a view or a virtual table.
        """
        _, geometry, organisation, code, definition = self._rows[name]
        entries = self._database.execute("SELECT type, sql FROM sqlite_master WHERE name = ?", (name,)).fetchall()
        if len(entries) != 1 or entries[0][0] != "table" or _VIRTUAL.match(str(entries[0][1])):
            raise InvalidInput(
                f"{self._path}: layer {name} is a view or a virtual table, expected a table; export it as a table"
            )
        cursor = self._database.execute(f"SELECT * FROM {_quoted(name)} LIMIT 0")
        columns = tuple(str(entry[0]) for entry in cursor.description)
        if geometry not in columns:
            raise InvalidInput(f"{self._path}: layer {name} has no column {geometry}, where its geometries should be")
        crs = f"EPSG:{code}" if str(organisation).upper() == "EPSG" else str(definition)
        return PackageLayer(name, str(geometry), columns, None if crs == "undefined" else crs)

    def read(
        self, layer: PackageLayer, attribute: str | None = None, *, most: int | None = None
    ) -> tuple[npt.NDArray[np.object_], npt.NDArray[np.object_] | None]:
        """Read the geometries of all features as WKB (None where a feature has none), and one attribute of each.

        Args:
            layer: The layer.
            attribute: Column to read beside the geometries; None for no column.
            most: Largest number of features; None for no limit.

        Raises:
            InvalidInput: The layer has more features than `most`.
        """
        names = [layer.geometry] + ([] if attribute is None else [attribute])
        limit = "" if most is None else f" LIMIT {most + 1}"
        select = f"SELECT {', '.join(map(_quoted, names))} FROM {_quoted(layer.name)}{limit}"
        rows = self._database.execute(select).fetchall()
        if most is not None and len(rows) > most:
            raise InvalidInput(f"{self._path}: layer {layer.name} has more than {most} features; select fewer of them")
        wkb, values = np.empty(len(rows), object), np.empty(len(rows), object)
        for number, row in enumerate(rows):
            wkb[number], values[number] = None if row[0] is None else _wkb_of(row[0]), row[-1]
        return wkb, None if attribute is None else values


def _authorise(action: int, first: str | None, second: str | None, database: str | None, source: str | None) -> int:
    """Allow SQLite to read tables; `source` names a view or trigger that wants to read, and none may."""
    return sqlite3.SQLITE_OK if action in _ALLOWED and source is None else sqlite3.SQLITE_DENY


def _quoted(name: object) -> str:
    return '"' + str(name).replace('"', '""') + '"'


def _wkb_of(blob: bytes) -> bytes:
    """Return the WKB of a geometry, which follows a header whose length depends on its envelope."""
    if blob[:2] != b"GP":
        raise ValueError("a geometry does not start with GP")
    envelope = (blob[3] >> 1) & 0b111
    return blob[8 + (0, 32, 48, 48, 64)[envelope] :]
