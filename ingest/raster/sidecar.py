"""Read the georeference of a raw JPEG 2000 codestream from the NAME.aux.xml beside it.

A codestream has no room for a georeference, so GDAL keeps it in a sidecar. A sidecar may hold much more: overviews
under any name, masks, metadata in any domain; and GDAL trusts all of it. So the sidecar is read here, and GDAL gets a
new document with only the coordinate reference system, the transform and the nodata value.
"""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from zarr_store.crs import parse_crs
from zarr_store.errors import InvalidInput

__all__ = ["MAX_SIDECAR_BYTES", "georeference_only"]

MAX_SIDECAR_BYTES = 1 << 20
"""Largest sidecar that is read, in bytes."""
_WKT_OR_CODE = re.compile(r"[A-Z][A-Z_]{2,30}\s*\[|EPSG:\d{1,7}$")
"""Accepted forms of a coordinate reference system; any other form may name a file."""


def georeference_only(data: bytes) -> bytes:
    """Reduce a sidecar to the georeference and the nodata value.

    Raises:
        InvalidInput: The document is not a sidecar of GDAL, or states something impossible.
    """
    if len(data) > MAX_SIDECAR_BYTES:
        raise InvalidInput(f"NAME.aux.xml has more than {MAX_SIDECAR_BYTES} bytes, which no georeference needs")
    try:
        text = data.decode("utf-8-sig")
        if "<!DOCTYPE" in text or "<!ENTITY" in text:
            raise InvalidInput("NAME.aux.xml declares a document type, which no sidecar of GDAL does")
        root = ElementTree.fromstring(text)
        parts = [*_system(root), *_transform(root), *_nodata(root)]
    except (UnicodeDecodeError, ElementTree.ParseError, ValueError, RecursionError) as error:
        if isinstance(error, InvalidInput):
            raise
        raise InvalidInput(f"NAME.aux.xml beside the file cannot be read: {error}") from error
    return f"<PAMDataset>{''.join(parts)}</PAMDataset>".encode()


def _system(root: ElementTree.Element) -> list[str]:
    wkt = (root.findtext("SRS") or "").strip()
    if not wkt:
        return []
    if not _WKT_OR_CODE.match(wkt):
        raise InvalidInput(
            f"NAME.aux.xml: expected a coordinate reference system as WKT or EPSG code, got {wkt[:60]!r}"
        )
    parse_crs(wkt)
    return [f"<SRS>{escape(wkt)}</SRS>"]


def _transform(root: ElementTree.Element) -> list[str]:
    text = root.findtext("GeoTransform")
    if text is None:
        return []
    numbers = [float(part) for part in text.split(",")]
    if len(numbers) != 6 or not all(map(math.isfinite, numbers)):
        raise InvalidInput(f"NAME.aux.xml: expected six numbers as GeoTransform, got {text[:80]!r}")
    return [f"<GeoTransform>{', '.join(map(repr, numbers))}</GeoTransform>"]


def _nodata(root: ElementTree.Element) -> list[str]:
    text = root.findtext("PAMRasterBand/NoDataValue")
    return (
        [] if text is None else [f'<PAMRasterBand band="1"><NoDataValue>{float(text)!r}</NoDataValue></PAMRasterBand>']
    )
