"""`CatalogueItem`: a STAC item as it was read, and reading items from files.

Files are static catalogues, collections, ItemCollections, single items and stac-geoparquet. Each item comes with the
place that it was read from, because relative hrefs start there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ingest.scenes.documents import Documents
from ingest.scenes.geoparquet import is_parquet, read_items
from ingest.trust.hrefs import is_url, resolve_href
from ingest.trust.redact import redact_url
from ingest.trust.waits import crew
from zarr_store.errors import InvalidInput
from zarr_store.regular import open_regular

__all__ = ["CatalogueItem", "iterate_items", "open_source"]

MAX_DOCUMENTS = 100_000
"""Largest number of documents of a static catalogue."""
MAX_DEPTH = 16
"""Largest number of levels of a static catalogue."""
_READERS = 8
"""Number of item documents read at once; each is one small request, and servers of static files can bear that."""


_RASTERS = {
    b"II*\0": "a TIFF", b"MM\0*": "a TIFF", b"II+\0": "a TIFF", b"MM\0+": "a TIFF",
    b"\0\0\0\x0cjP  ": "a JPEG 2000 file", b"\xff\x4f\xff\x51": "a JPEG 2000 file", b"\xff\xd8\xff": "a JPEG file",
    b"\x89PNG": "a PNG file", b"\x89HDF": "an HDF5 or NetCDF file", b"CDF\x01": "a NetCDF file",
    b"CDF\x02": "a NetCDF file", b"PK\x03\x04": "a ZIP archive", b"%PDF": "a PDF file",
}  # fmt: skip
"""First bytes of files that people give in place of a catalogue."""


@dataclass(frozen=True)
class CatalogueItem:
    """A STAC item as the catalogue holds it.

    Attributes:
        item: The item as JSON.
        base: URL or path of the document that it was read from.
        item_assets: `item_assets` of its collection.
    """

    item: Mapping[str, Any]
    base: str
    item_assets: Mapping[str, Any] = field(default_factory=dict)


def open_source(documents: Documents) -> tuple[str, Any]:
    """Open SOURCE and return its location and document; the document is None for a Parquet file.

    Raises:
        InvalidInput: The file is absent or is not JSON.
        AccessError: The server could not be reached.
    """
    source = documents.source
    if is_url(source):
        return source, documents.read(source)
    path = Path(source).expanduser()
    if path.is_dir():
        inside = [path / name for name in ("catalog.json", "collection.json") if (path / name).is_file()]
        if not inside:
            raise InvalidInput(f"{source} is a folder without catalog.json or collection.json; name the file itself")
        path = inside[0]
    if not path.exists():
        raise InvalidInput(f"{source}: no such file; expected a STAC API URL, a catalogue, an item file or geoparquet")
    path = path.resolve()
    if is_parquet(path):
        return str(path), None
    _refuse_image(path, source)
    return str(path), documents.read(str(path))


def _refuse_image(path: Path, source: str) -> None:
    """Refuse a raster in place of a catalogue by its first bytes, before they are read as text."""
    try:
        with open_regular(path) as file:
            head = file.read(16)
    except OSError:
        return  # the reader of documents reports why
    kind = next((kind for mark, kind in _RASTERS.items() if head.startswith(mark)), None)
    if kind is not None:
        raise InvalidInput(
            f"{source} is {kind}, not a catalogue: expected a STAC API URL, catalog.json or collection.json, an item "
            "file or geoparquet that names such files as assets. Labels go into a cube with `terrashard labels`, "
            "labelled images into a sample store with `terrashard samples`"
        )


def iterate_items(
    documents: Documents, location: str, document: Any, *, wanted: tuple[str, ...], collection_ids: set[str]
) -> Iterator[CatalogueItem]:
    """Yield every item of a file or static catalogue, without reading collections that are not wanted.

    Args:
        documents: Reader of SOURCE.
        location: Location of the document, as `open_source` returns it.
        document: The document; None for a Parquet file.
        wanted: Ids of the requested collections; empty for all.
        collection_ids: Set that takes the ids of all collections in SOURCE, for the error about an unknown name.

    Raises:
        InvalidInput: The document is not STAC, or a link leads out of the catalogue or to something unreadable.
    """
    if document is None:
        items = read_items(location)
        collection_ids.update(str(item["collection"]) for item in items if item.get("collection"))
        yield from (CatalogueItem(item, location) for item in items)
        return
    kind = _kind(document)
    if kind == "Catalog":
        yield from _walk(documents, location, document, wanted=wanted, collection_ids=collection_ids)
        return
    if not kind:
        came = (
            f"type {document.get('type')!r}" if isinstance(document, Mapping) else f"a JSON {type(document).__name__}"
        )
        raise InvalidInput(
            f"{redact_url(location)}: expected a STAC catalogue, ItemCollection or item with assets, got {came}"
        )
    items = document["features"] if kind == "FeatureCollection" else [document]
    for number, item in enumerate(items, 1):
        if not isinstance(item, Mapping):
            item = {"id": f"feature {number}, which is not an object"}  # the search names it among what it leaves out
        if item.get("collection"):
            collection_ids.add(str(item["collection"]))
        yield CatalogueItem(item, location)


def _kind(document: Any) -> str:
    """Return "Catalog" (also for collections), "FeatureCollection", "Feature", or "" for any other document."""
    if not isinstance(document, Mapping):
        return ""
    kind = document.get("type")
    if kind == "FeatureCollection":
        return kind if isinstance(document.get("features"), list) else ""
    if kind == "Feature":
        return "Feature" if isinstance(document.get("assets"), Mapping) else ""
    # STAC 0.9 and 1.0.0-beta catalogues have no type
    return "Catalog" if isinstance(document.get("links"), list) and "id" in document else ""


def _walk(
    documents: Documents,
    location: str,
    document: Mapping[str, Any],
    *,
    wanted: tuple[str, ...],
    collection_ids: set[str],
) -> Iterator[CatalogueItem]:
    """Yield the items of a static catalogue, level by level."""
    queue = deque([(location, document, 0)])
    seen = {location}
    count = 0
    while queue:
        place, node, depth = queue.popleft()
        if depth > MAX_DEPTH:
            raise InvalidInput(
                f"{redact_url(place)}: catalogue is nested more than {MAX_DEPTH} levels deep; name a part of it"
            )
        is_collection = node.get("type") == "Collection" or "extent" in node
        if is_collection:
            collection_ids.add(str(node["id"]))
            if wanted and node["id"] not in wanted:
                continue
        item_assets = node.get("item_assets") if is_collection else None
        links: dict[str, list[str]] = {"item": [], "child": []}
        for link in node["links"]:
            rel = link.get("rel") if isinstance(link, Mapping) else None
            if rel not in links:
                continue
            href = resolve_href(link.get("href"), base=place, policy=documents.policy)
            if href not in seen:
                seen.add(href)
                links[rel].append(href)
        count += len(links["item"]) + len(links["child"])
        if count > MAX_DOCUMENTS:
            raise InvalidInput(f"{redact_url(place)}: more than {MAX_DOCUMENTS} documents; name a part or use its API")
        for href, item in _read_all(documents, links["item"]):
            if not isinstance(item, Mapping):
                item = {"id": redact_url(href)}  # the search names it among what it leaves out
            if item.get("collection"):
                collection_ids.add(str(item["collection"]))
            yield CatalogueItem(item, href, item_assets if isinstance(item_assets, Mapping) else {})
        for href, child in _read_all(documents, links["child"]):
            if _kind(child) != "Catalog":
                raise InvalidInput(
                    f"{redact_url(href)}: linked as a child, but it is not a catalogue; repair the catalogue"
                )
            queue.append((href, child, depth + 1))


def _read_all(documents: Documents, hrefs: list[str]) -> Iterator[tuple[str, Any]]:
    """Read documents in order; over HTTP several at once, in batches."""
    if not hrefs or not is_url(hrefs[0]):
        yield from ((href, documents.read(href)) for href in hrefs)
        return
    with crew(_READERS) as pool:
        for start in range(0, len(hrefs), 64):
            batch = hrefs[start : start + 64]
            yield from zip(batch, pool.map(documents.read, batch), strict=True)
