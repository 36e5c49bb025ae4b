"""Checks what a file of polygons states as its CRS, before OGR opens it.

OGR follows some of these statements while it opens a file. A `crs` member of GeoJSON may be a link, which it fetches
with a client of its own. A name such as `+init=FILE:NAME` makes PROJ open that file. So the statement is read here
first, and a file whose statement is no plain code, name or WKT never reaches OGR.
"""

from __future__ import annotations

import json
import mmap
import re
import struct
from pathlib import Path
from typing import Any

from zarr_store.bounded import read_file
from zarr_store.crs import parse_crs, refuse_file_names
from zarr_store.errors import InvalidInput
from zarr_store.regular import open_regular

__all__ = ["check_stated_crs"]

_MOST_MEMBER = 1 << 16
_MOST_HEADER = 1 << 24
_MOST_PRJ = 1 << 16
_MEMBER = re.compile(
    rb"""(["'])(?:c|\\u00[46]3)(?:r|\\u00[57]2)(?:s|\\u00[57]3)(?:\\u0000[^"']*)?\1\s*(?=([^\s]?))""", re.IGNORECASE
)
"""A text that OGR takes for the name of a `crs` member, in all its spellings, and what follows it. OGR also reads
single quotes, any case, and a name only up to a NUL."""
_ORGANISATION = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,31}")
_CODE = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
_HEADER_CRS, _CRS_ORG, _CRS_WKT, _CRS_CODE_STRING = 10, 0, 4, 5
"""Positions of fields in FlatGeobuf's tables `Header` and `Crs`."""


def check_stated_crs(path: Path) -> None:
    """Refuse a file whose statement of its CRS would lead OGR to an address or to another file.

    Args:
        path: GeoJSON, FlatGeobuf or shapefile. Others state theirs where OGR does not look.

    Raises:
        InvalidInput: It does, or it cannot be understood.
        OSError: The file cannot be read.
    """
    suffix = path.suffix.lower()
    if suffix in (".geojson", ".json"):
        _check_geojson(path)
    elif suffix == ".fgb":
        _check_flatgeobuf(path)
    elif suffix == ".shp":
        for part in (path.with_suffix(".prj"), path.with_suffix(".PRJ")):
            if part.exists():
                _check_text(read_file(part, _MOST_PRJ).decode("utf-8", "replace"), part)


def _check_geojson(path: Path) -> None:
    with open_regular(path) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        for found in _MEMBER.finditer(text):
            if found[2] in (b",", b"}", b"]", b""):  # a value, not the name of a member
                continue
            if found[2] != b":":
                raise InvalidInput(f"{path}: expected ':' after \"crs\" at byte {found.start()}, got {found[2]!r}")
            _check_member(text[found.end() + 1 : found.end() + 1 + _MOST_MEMBER], path)


def _check_member(after: bytes, path: Path) -> None:
    """Check the value of one `crs` member; an attribute of a feature with that name too, if it is an object."""
    text = after.decode("utf-8", "replace").lstrip()
    if re.match(r'["\'\d-]|null|true|false', text):
        return
    try:
        value, _ = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f'{path}: its "crs" member cannot be read ({error}); state a name as EPSG:4326') from error
    kind, name = _named(value)
    if kind == "epsg" and isinstance(name, int):
        return
    if kind not in ("name", "epsg", "ogc") or not isinstance(name, str):
        raise InvalidInput(
            f"{path}: its CRS is stated as {json.dumps(value)[:120]}; links are not followed, state a name as EPSG:4326"
        )
    try:
        parse_crs(name)
    except InvalidInput as error:
        raise InvalidInput(f"{path}: {error}") from error


def _named(value: Any) -> tuple[str, Any]:
    """Return the type of a `crs` member in lower case, and what it names."""
    properties = value.get("properties") if isinstance(value, dict) else None
    kind = str(value.get("type")).lower() if isinstance(value, dict) else ""
    key = {"name": "name", "epsg": "code", "ogc": "urn"}.get(kind, "")
    # a second spelling of a name could be the one that OGR takes
    exact = isinstance(properties, dict) and set(value) == {"type", "properties"} and set(properties) == {key}
    return kind, properties[key] if exact and isinstance(properties, dict) else None


def _check_flatgeobuf(path: Path) -> None:
    with open_regular(path) as file:
        size = int.from_bytes(file.read(12)[8:], "little")
        if size > _MOST_HEADER:
            raise InvalidInput(f"{path}: a FlatGeobuf header of {size} bytes; at most {_MOST_HEADER} are read")
        header = file.read(size)
    try:
        (root,) = struct.unpack_from("<I", header)
        crs = _table(header, _field(header, root, _HEADER_CRS))
        org, wkt, code = (_text(header, crs, n) if crs else None for n in (_CRS_ORG, _CRS_WKT, _CRS_CODE_STRING))
    except (struct.error, ValueError) as error:
        raise InvalidInput(f"{path}: damaged FlatGeobuf header ({error}); write the file again") from error
    if (org and not _ORGANISATION.fullmatch(org)) or (code and not _CODE.fullmatch(code)):
        raise InvalidInput(
            f"{path}: its CRS is stated as {org or ''!r}, {code or ''!r}; expected an authority and a code, as EPSG "
            "and 4326"
        )
    _check_text(wkt or "", path)


def _field(data: bytes, table: int, number: int) -> int:
    """Return where a field of a flatbuffer's table is; 0 where it is not."""
    (back,) = struct.unpack_from("<i", data, table)
    size, at = 0, table - back
    if not 0 <= at < len(data):
        raise ValueError("a table without an outline")
    (size,) = struct.unpack_from("<H", data, at)
    (offset,) = struct.unpack_from("<H", data, at + 4 + 2 * number) if 4 + 2 * number < size else (0,)
    return table + offset if offset else 0


def _table(data: bytes, field: int) -> int:
    """Return where the table or text is that a field points to; 0 where there is no field."""
    return field + int(struct.unpack_from("<I", data, field)[0]) if field else 0


def _text(data: bytes, table: int, number: int) -> str | None:
    at = _table(data, _field(data, table, number))
    if not at:
        return None
    (size,) = struct.unpack_from("<I", data, at)
    if at + 4 + size > len(data):
        raise ValueError("a text that is cut off")
    return data[at + 4 : at + 4 + size].decode("utf-8", "replace")


def _check_text(text: str, path: Path) -> None:
    try:
        refuse_file_names(text)
    except InvalidInput as error:
        raise InvalidInput(f"{path}: {error}") from error
