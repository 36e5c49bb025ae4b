"""`AssetFile`: the file behind an href: its first bytes, and a way to fetch the others.

Bytes of local files, HTTP servers and buckets are all fetched without GDAL: its client follows redirects to any host
and does not wait for its turn at a rate limit.
"""

from __future__ import annotations

import functools
import io
import logging
import os
from collections.abc import Collection, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO
from urllib.parse import urlsplit

from ingest.raster.download import MAX_SPAN_BYTES, fetch, fetch_head, fetch_whole, head_cache
from ingest.raster.drivers import TIFF_MAGIC
from ingest.raster.faults import PermanentError, TransientError, cause_of
from ingest.raster.kept import kept_bytes
from ingest.raster.ranges import Head, RangeFile, Span
from ingest.trust.redact import redact_url
from zarr_store.bounded import read_file
from zarr_store.errors import InvalidInput
from zarr_store.regular import open_regular

if TYPE_CHECKING:
    from ingest.raster.limits import Access

__all__ = [
    "AssetFile",
    "file_version",
    "file_versions",
    "find_asset_file",
    "find_mask_beside",
    "open_asset_file",
    "read_local_sidecar",
]

log = logging.getLogger(__name__)

_MAGIC_BYTES = 64
"""Number of first bytes that choose the driver."""
_SCHEMES = ("http", "https", "s3")
_MOST_ASKED = 12
"""Number of requests for the version of a file before it counts as replaced."""


@dataclass(frozen=True)
class AssetFile:
    """A file that exists and may be read.

    Attributes:
        path: The local path, or the href.
        remote: Whether the file is read over a network.
        magic: First bytes of the file.
        size: Size of the file in bytes; None where the server does not state it.
        content: Bytes of the file; None for an empty file.
        version: Key that only this version of the file has; None where versions cannot be told apart.
    """

    path: str
    remote: bool
    magic: bytes
    size: int | None
    content: RangeFile | None
    version: Hashable


def find_asset_file(href: str, access: Access, *, fresh: bool, keep: bool = False) -> AssetFile:
    """Find the file behind an href; no redirect to another host is followed.

    Args:
        href: Absolute URL (http, https, s3) or absolute local path.
        access: Limits and retries.
        fresh: Whether to request the head again although it is cached.
        keep: Whether to keep what is fetched of a remote file, for a later use of the file.

    Raises:
        PermanentError, TransientError: The file is absent, was refused, or its first bytes are those of no raster.
    """
    scheme = urlsplit(href).scheme if "://" in href else ""
    if scheme in _SCHEMES:
        return _find_remote(href, access, fresh, keep)
    if scheme or not Path(href).is_absolute() or href.startswith("/vsi"):
        raise PermanentError("expected an http(s) or s3 URL or an absolute local path")
    return _find_local(href)


def file_version(href: str, access: Access) -> str | None:
    """Return the version of the file at `href` now, as one server states it; None where it is unknown."""
    versions = file_versions(href, access)
    return None if versions is None else next(iter(versions))


def file_versions(href: str, access: Access, known: Collection[str] = ()) -> frozenset[str] | None:
    """Return the versions of the file at `href` now, comparable to the `RangeFile.version` of a file that was read.

    Args:
        href: Absolute URL or local path.
        access: Limits and retries.
        known: Versions that were seen before. Servers behind one name may state different ones of the same file, so
            the file is asked for until all of them have come again, or another one comes again and again.

    Returns:
        None where the version is unknown: the file is absent or was refused.
    """
    if urlsplit(href).scheme in _SCHEMES:
        seen: set[str] = set()
        try:
            for _ in range(_MOST_ASKED):
                seen.add(fetch_head(href, access, apart=bool(seen))[1].version)
                if seen.issuperset(known):
                    break
        except (PermanentError, TransientError, OSError, ValueError) as error:  # also where the host is no valid name
            log.info("%s: %s", redact_url(href), cause_of(error, href))
            return None
        return frozenset(seen)
    if "://" in href or href.startswith("/vsi"):
        return None
    try:
        identity = _identity(os.stat(href))
    except OSError:
        return None
    return frozenset({_local_head(href, b"", identity).version})


def open_asset_file(asset_file: AssetFile) -> io.RawIOBase | BinaryIO:
    """Open a fresh handle of the file, for GDAL.

    Raises:
        FileNotFoundError: A local file was replaced; the error of its content states that.
    """
    file = asset_file.content
    assert file is not None, "an empty file has no format"
    if asset_file.remote:
        return file.open(asset_file.path)
    stream = open_regular(asset_file.path)
    if (asset_file.path, *_identity(os.fstat(stream.fileno()))) == asset_file.version:
        return stream
    stream.close()
    file.error = TransientError("the file was replaced while it was read")
    raise FileNotFoundError(asset_file.path)


def read_local_sidecar(path: str, limit: int) -> bytes | None:
    """Read NAME.aux.xml beside a local file; None where there is none.

    Raises:
        PermanentError: It is not a regular file, or is larger than `limit` bytes.
    """
    try:
        return read_file(f"{path}.aux.xml", limit, "NAME.aux.xml beside the file")
    except FileNotFoundError:
        return None
    except InvalidInput as error:
        raise PermanentError(str(error)) from error
    except OSError as error:
        raise PermanentError(f"NAME.aux.xml beside the file: {error.strerror or error}") from error


def find_mask_beside(href: str) -> str | None:
    """Return the name of a mask that lies beside a local file, which no reader here opens; None where there is none."""
    path = Path(f"{href}.msk")
    return path.name if "://" not in href and path.is_file() else None


def _find_remote(href: str, access: Access, fresh: bool, keep: bool) -> AssetFile:
    known, kept = head_cache(os.getpid()), kept_bytes(os.getpid())
    if fresh:  # the last attempt may have failed on bytes that were kept
        kept.drop(href)
    head = None if fresh else known.get(href) or kept.head(href)
    url = head.url if head is not None else ""
    if head is None:
        url, head = fetch_head(href, access)
        if head.ranges and head.data.startswith(TIFF_MAGIC):
            known.put(href, head)
    if keep and head.ranges:
        kept.keep_head(href, head)
    magic = head.data[:_MAGIC_BYTES]
    if head.ranges and head.size:
        version = (href, head.version) if head.etag else None
        file = RangeFile(
            head,
            functools.partial(fetch, href, head, access),
            parts=kept.parts(href, head),
            keep=functools.partial(kept.keep_part, href, head.version) if keep else None,
            identity=version,
        )
        return AssetFile(href, True, magic, head.size, file, version)
    return AssetFile(href, True, magic, head.size, RangeFile(*fetch_whole(url, access)), None)


def _find_local(path: str) -> AssetFile:
    try:
        with open_regular(path) as stream:
            magic, identity = stream.read(_MAGIC_BYTES), _identity(os.fstat(stream.fileno()))
    except OSError as error:
        raise PermanentError(error.strerror or type(error).__name__) from error
    head = _local_head(path, magic, identity)
    if not head.size:
        return AssetFile(path, False, magic, 0, None, None)
    version = (path, *identity)
    file = RangeFile(head, functools.partial(_read_local, path, identity), remote=False, identity=version)
    return AssetFile(path, False, magic, head.size, file, version)


def _local_head(path: str, magic: bytes, identity: tuple[int, int, int, int]) -> Head:
    _, _, size, written_ns = identity
    return Head(path, magic, size, f"written {written_ns}", True, 0.0)


def _identity(stat: os.stat_result) -> tuple[int, int, int, int]:
    """Return what changes when a local file is replaced or written: device, inode, size and time of the last write."""
    return (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)


def _read_local(path: str, identity: tuple[int, int, int, int], span: Span) -> bytes:
    """Read bytes of a local file; fewer where it ends earlier."""
    if span[1] - span[0] > MAX_SPAN_BYTES:
        raise PermanentError(
            f"{span[1] - span[0]} bytes of the file are needed at once; at most {MAX_SPAN_BYTES} are read"
        )
    try:
        with open_regular(path) as stream:
            if _identity(os.fstat(stream.fileno())) != identity:
                raise TransientError("the file was replaced while it was read")
            return os.pread(stream.fileno(), span[1] - span[0], span[0])
    except OSError as error:
        raise PermanentError(error.strerror or type(error).__name__) from error
