"""`open_source_file` provides a local file for a raster that a user names by path, by URL, or in a STAC item.

A file behind a URL is fetched whole into a temporary file, so that it is read and checked like a local one, and so that
its digest is known. Which hosts and folders an item may name is decided as for the items of an ingest.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ingest.raster.download import stream_whole
from ingest.raster.faults import PermanentError, TransientError
from ingest.raster.limits import Access
from ingest.request.config import IngestConfig
from ingest.scenes.documents import Documents
from ingest.trust.hrefs import is_url, refuse_private_address, resolve_href
from ingest.trust.providers import PROVIDERS
from ingest.trust.redact import redact_url
from zarr_store.errors import AccessError, InvalidInput
from zarr_store.regular import open_regular

__all__ = ["SourceFile", "digest_of", "open_source_file"]

_RASTER_TYPES = ("image/tiff", "image/vnd.stac.geotiff")
_ATTEMPTS = 3


@dataclass(frozen=True)
class SourceFile:
    """A raster that a user named.

    Attributes:
        path: The local file; a temporary one for a URL.
        name: Name for messages, without secrets.
        sha256: Digest of its bytes.
        stated: What the STAC item states about its numbers: nodata, scale, offset and unit.
        where: Record of the file for the origin of a layer: file, and url, or item and asset.
    """

    path: Path
    name: str
    sha256: str
    stated: Mapping[str, Any]
    where: Mapping[str, str]


@contextmanager
def open_source_file(source: str, config: IngestConfig, *, asset: str | None = None) -> Iterator[SourceFile]:
    """Yield a raster as a local file, which exists until the block ends.

    Args:
        source: Path or URL of a GeoTIFF, or of a STAC item.
        config: Trust, timeouts and retries.
        asset: Asset of the item; None for its only raster.

    Raises:
        InvalidInput: The file is absent, or the item has no such asset, or names a place that is not allowed.
        AccessError: The server cannot be reached, or refuses.
    """
    if not _is_item(source):
        if asset is not None:
            raise InvalidInput(
                f"--asset {asset} names an asset of a STAC item, but {redact_url(source)} is a raster; omit --asset"
            )
        with _as_local_file(source, source, config) as path:
            shown = redact_url(source) if is_url(source) else source
            where = {"file": _file_name(source), **({"url": shown} if is_url(source) else {})}
            yield SourceFile(path, shown, digest_of(path, shown), {}, where)
        return
    with Documents(source, config) as documents:
        item = documents.read(documents.source)
    if not isinstance(item, dict) or item.get("type") != "Feature" or not isinstance(item.get("assets"), dict):
        raise InvalidInput(f"{redact_url(source)} is not a STAC item with assets; expected a GeoTIFF, or one STAC item")
    key = _choose_asset(item["assets"], asset, redact_url(source))
    chosen = item["assets"][key]
    hosts = [host for rule in (*config.trust.providers, *PROVIDERS) for host in rule.hosts]
    policy = config.trust.href_policy(source, hosts)
    base = source if is_url(source) else str(Path(source).expanduser().resolve())
    href = resolve_href(chosen.get("href"), base=base, policy=policy)
    if is_url(href):
        with suppress(AccessError):
            refuse_private_address(href, policy)
    with _as_local_file(href, source, config) as path:
        where = {"file": _file_name(href), "item": str(item.get("id", "")), "asset": key}
        yield SourceFile(path, redact_url(href), digest_of(path, redact_url(href)), _stated_numbers(chosen), where)


def digest_of(path: Path, shown: str | None = None) -> str:
    """Return the SHA-256 of a file.

    Raises:
        InvalidInput: It cannot be read.
    """
    try:
        with open_regular(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InvalidInput(f"cannot read {shown or path}: {error.strerror or error}") from error


def _is_item(source: str) -> bool:
    return source.partition("?")[0].lower().endswith((".json", ".geojson"))


@contextmanager
def _as_local_file(href: str, source: str, config: IngestConfig) -> Iterator[Path]:
    """Yield the file itself, or a temporary copy of what a URL gives."""
    if not is_url(href):
        yield Path(href).expanduser()
        return
    access = Access.of(config, source)
    with tempfile.TemporaryDirectory(prefix="terrashard-") as folder:
        path = Path(folder, _file_name(href))
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                with path.open("wb") as file:
                    stream_whole(href, access, file.write)
                break
            except TransientError as error:
                if attempt == _ATTEMPTS:
                    raise AccessError(f"{redact_url(href)} could not be read in {attempt} attempts: {error}") from error
            except PermanentError as error:
                raise AccessError(f"{redact_url(href)} could not be read: {error}") from error
        yield path


def _choose_asset(assets: Mapping[str, Any], asked: str | None, where: str) -> str:
    """Return the key of the asset to read: the one that the user named, or the only raster of the item."""
    rasters = [
        key
        for key, one in assets.items()
        if isinstance(one, dict)
        and str(one.get("type", "")).startswith(_RASTER_TYPES)
        and not {"thumbnail", "overview", "metadata"} & set(one.get("roles") or ())
    ]
    if asked is not None:
        if not isinstance(assets.get(asked), dict):
            raise InvalidInput(f"{where} has no asset {asked!r}; it has {', '.join(map(str, assets)) or 'none'}")
        return asked
    if len(rasters) != 1:
        found = ", ".join(rasters) or "none; " + (", ".join(map(str, assets)) or "no assets")
        raise InvalidInput(f"{where} has {len(rasters)} rasters ({found}); name one with --asset KEY")
    return rasters[0]


def _stated_numbers(asset: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an item states about the numbers of an asset (extension raster, or bands of STAC 1.1)."""
    bands = asset.get("raster:bands") or asset.get("bands")
    band = bands[0] if isinstance(bands, list) and bands and isinstance(bands[0], dict) else {}
    found: dict[str, Any] = {}
    for name, keys in {
        "nodata": ("nodata",), "scale": ("scale", "raster:scale"), "offset": ("offset", "raster:offset"),
        "unit": ("unit",),
    }.items():  # fmt: skip
        value = next((holder[key] for key in keys for holder in (band, asset) if holder.get(key) is not None), None)
        if value is None:
            continue
        if name == "unit":
            found[name] = str(value)
            continue
        with suppress(TypeError, ValueError):  # "nan" is what a file of floats has anyway
            found[name] = float(value)
    return found


def _file_name(href: str) -> str:
    return href.partition("?")[0].rstrip("/").rpartition("/")[2] or "raster"
