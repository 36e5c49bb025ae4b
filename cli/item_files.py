"""Files of found items: items.json (an ItemCollection) or items.parquet (stac-geoparquet), usable as SOURCE."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit, urlunsplit

from zarr_store.errors import InvalidInput

if TYPE_CHECKING:
    from ingest.scenes.catalogue import CatalogueItem

__all__ = ["check_suffix", "portable", "write_items"]

_SUFFIXES = (".json", ".geojson", ".parquet")


def check_suffix(path: Path) -> None:
    """Refuse a file type that cannot be written, before anything is searched."""
    if path.suffix.lower() not in _SUFFIXES:
        raise InvalidInput(f"{path}: items are written as .json or .parquet, got {path.suffix or 'no suffix'!r}")


def portable(found: CatalogueItem) -> dict[str, Any]:
    """Return the item with absolute, unsigned hrefs: relative ones would no longer lead to the files."""
    item = dict(found.item)
    assets = item.get("assets") or {}
    item["assets"] = {key: {**asset, "href": _absolute(asset, found.base)} for key, asset in assets.items()}
    item["links"] = [{**link, "href": _absolute(link, found.base)} for link in item.get("links") or []]
    return {key: _without_credentials(value) for key, value in item.items()}


def _without_credentials(value: Any) -> Any:
    """Return `value` with every address in it unsigned: alternate assets and extensions have further addresses."""
    from ingest.trust.redact import redact_value

    if isinstance(value, str):
        return redact_value(value) if "://" in value else value
    if isinstance(value, Mapping):
        return {key: _without_credentials(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_credentials(part) for part in value]
    return value


def _absolute(link: Mapping[str, Any], base: str) -> str:
    from ingest.trust.redact import strip_signature

    href = _without_userinfo(strip_signature(str(link.get("href") or "")))
    base = _without_userinfo(base)
    if "://" in href or href.startswith("/"):
        return href
    return urljoin(base, href) if "://" in base else str(Path(base).parent.joinpath(href).resolve())


def _without_userinfo(href: str) -> str:
    if "://" not in href:
        return href
    parts = urlsplit(href)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def write_items(items: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write the items; the file appears complete or not at all."""
    from zarr_store.durable import write_file

    if path.suffix.lower() == ".parquet":
        from ingest.scenes.geoparquet import write_items as write_parquet

        packed = io.BytesIO()
        write_parquet(items, packed)
        write_file(path, packed.getvalue())
    else:
        write_file(path, json.dumps({"type": "FeatureCollection", "features": list(items)}, indent=1).encode())
