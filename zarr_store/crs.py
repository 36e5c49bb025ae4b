"""`parse_crs` reads a coordinate reference system from untrusted text, which may not name files.

PROJ opens files that the text of a CRS names: grids of datum shifts (`+nadgrids=…`, PARAMETERFILE in WKT, parameters
in PROJJSON), models of deformations (`+model=…`) and lists of definitions (`+init=FILE:NAME`). Items, rasters, polygons
and cubes state a CRS, so a name in it would make PROJ open any path, and wait for it if it is a pipe. What PROJ's own
database knows is not touched.
"""

from __future__ import annotations

import functools
import json
import re

from pyproj import CRS, Transformer
from pyproj.exceptions import CRSError

from zarr_store.errors import InvalidInput

__all__ = ["parse_crs", "refuse_file_names", "transformer_between"]

_TEXT = re.compile(
    r"grids\s*=\s*(?!@null(?:[\s\"']|$))|PARAMETERFILE|PROJ4_GRIDS|\b(?:init|file|model)\s*=", re.IGNORECASE
)
_INIT = re.compile(r"\+?init\s*=\s*epsg:\d+\s*(\+type=crs)?", re.IGNORECASE)
"""The old spelling of a code (+init=epsg:…); it looks like a file name, but names none of the user's files."""


def parse_crs(value: object) -> CRS:
    """Return the CRS of a code, WKT, PROJJSON or PROJ string, as pyproj understands it.

    Raises:
        InvalidInput: It is not known to PROJ, or names a file.
    """
    text = json.dumps(value) if isinstance(value, dict) else str(value)
    refuse_file_names(text)
    try:
        parsed = CRS.from_user_input(value)
        if "PARAMETERFILE" in parsed.to_wkt():
            raise _named(text)
    except CRSError as error:
        raise InvalidInput(f"unknown CRS {text[:200]!r}: expected e.g. EPSG:32633 ({error})") from error
    return parsed


def refuse_file_names(text: str) -> None:
    """Refuse WKT or a PROJ string that names a file, without parsing it; only `parse_crs` checks PROJJSON.

    Raises:
        InvalidInput: It names one.
    """
    if _TEXT.search(text) and not _INIT.fullmatch(text.strip()):
        raise _named(text)


@functools.lru_cache(maxsize=128)
def transformer_between(source: str, target: str) -> Transformer:
    """Return the transformer of (x, y) from one CRS to another; it is kept, as PROJ needs a millisecond to make one."""
    return Transformer.from_crs(source, target, always_xy=True)


def _named(text: str) -> InvalidInput:
    return InvalidInput(f"CRS {text[:80]!r} names a file of a datum shift or of definitions; state it as EPSG:<code>")
