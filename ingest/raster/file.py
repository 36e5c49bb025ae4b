"""`FoundFile`: what is behind an href, by its first bytes, and the way to the others.

Bytes are had by our own means, over HTTP, from buckets and of local files: GDAL's client follows redirects to any host
and cannot be told to wait.
"""

from __future__ import annotations

import functools
import io
import logging
import os
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO
from urllib.parse import urlsplit

from ingest.raster.download import MOST_SPAN, fetch, fetch_whole, heads, peek
from ingest.raster.faults import TIFF, PermanentError, TransientError, cause_of
from ingest.raster.ranges import Head, RangeFile, Span
from ingest.trust.redact import redact_url
from zarr_store.bounded import read_file
from zarr_store.errors import InvalidInput
from zarr_store.regular import open_regular

if TYPE_CHECKING:
    from ingest.raster.limits import Access

__all__ = ["FoundFile", "file_version", "find", "open_found", "read_near"]

log = logging.getLogger(__name__)

_MAGIC_BYTES = 64
_SCHEMES = ("http", "https", "s3")


@dataclass(frozen=True)
class FoundFile:
    """A file that is there.

    Attributes:
        path: The local path, or the href.
        remote: Whether a network lies between.
        magic: Its first bytes.
        size: Of the file, if it is known.
        file: Its bytes; None of an empty file.
        version: What tells this version of the file from every other; None where that cannot be known.
    """

    path: str
    remote: bool
    magic: bytes
    size: int | None
    file: RangeFile | None
    version: Hashable


def find(href: str, access: Access, *, fresh: bool) -> FoundFile:
    """Look at a file; no redirect to another host is followed.

    Args:
        href: Absolute URL (http, https, s3) or absolute local path.
        access: Limits and retries.
        fresh: Ask anew for what is known from before.

    Raises:
        PermanentError, TransientError: It is not there, or refused, or no raster by its first bytes.
    """
    scheme = urlsplit(href).scheme if "://" in href else ""
    if scheme in _SCHEMES:
        return _find_remote(href, access, fresh)
    if scheme or not Path(href).is_absolute() or href.startswith("/vsi"):
        raise PermanentError("expected an http(s) or s3 URL or an absolute local path")
    return _find_local(href)


def file_version(href: str, access: Access) -> str | None:
    """What tells the file at `href` from others of that name now, as `RangeFile.version` says it of one that is read.

    Returns:
        None where it cannot be known: the file is gone or refused.
    """
    if urlsplit(href).scheme in _SCHEMES:
        try:
            return peek(href, access)[1].version
        except (PermanentError, TransientError, OSError, ValueError) as error:  # also hosts that are no names
            log.info("%s: %s", redact_url(href), cause_of(error, href))
            return None
    if "://" in href or href.startswith("/vsi"):
        return None
    try:
        identity = _identity(os.stat(href))
    except OSError:
        return None
    return _local_head(href, b"", identity).version


def open_found(found: FoundFile) -> io.RawIOBase | BinaryIO:
    """A fresh handle of the file, for GDAL."""
    file = found.file
    assert file is not None, "an empty file has no format"
    if found.remote:
        return file.open(found.path)
    stream = open_regular(found.path)
    if (found.path, *_identity(os.fstat(stream.fileno()))) == found.version:
        return stream
    stream.close()
    file.error = TransientError("the file was replaced while it was read")
    raise FileNotFoundError(found.path)


def read_near(path: str, most: int) -> bytes | None:
    """NAME.aux.xml beside a local file; None where there is none.

    Raises:
        PermanentError: It is no regular file, or larger than `most` bytes.
    """
    try:
        return read_file(f"{path}.aux.xml", most, "NAME.aux.xml beside the file")
    except FileNotFoundError:
        return None
    except InvalidInput as error:
        raise PermanentError(str(error)) from error
    except OSError as error:
        raise PermanentError(f"NAME.aux.xml beside the file: {error.strerror or error}") from error


def _find_remote(href: str, access: Access, fresh: bool) -> FoundFile:
    known = heads(os.getpid())
    head = None if fresh else known.get(href)
    url = head.url if head is not None else ""
    if head is None:
        url, head = peek(href, access)
        if head.ranges and head.data.startswith(TIFF):
            known.put(href, head)
    magic = head.data[:_MAGIC_BYTES]
    if head.ranges and head.size:
        file = RangeFile(head, functools.partial(fetch, href, head, access))
        return FoundFile(href, True, magic, head.size, file, (href, head.version) if head.etag else None)
    return FoundFile(href, True, magic, head.size, RangeFile(*fetch_whole(url, access)), None)


def _find_local(path: str) -> FoundFile:
    try:
        with open_regular(path) as stream:
            magic, identity = stream.read(_MAGIC_BYTES), _identity(os.fstat(stream.fileno()))
    except OSError as error:
        raise PermanentError(error.strerror or type(error).__name__) from error
    head = _local_head(path, magic, identity)
    if not head.size:
        return FoundFile(path, False, magic, 0, None, None)
    file = RangeFile(head, functools.partial(_read_local, path, identity), remote=False)
    return FoundFile(path, False, magic, head.size, file, (path, *identity))


def _local_head(path: str, magic: bytes, identity: tuple[int, int, int, int]) -> Head:
    _, _, size, written_ns = identity
    return Head(path, magic, size, f"written {written_ns}", True, 0.0)


def _identity(found: os.stat_result) -> tuple[int, int, int, int]:
    """What changes when a local file is replaced or written to: device, inode, size, time of the last write."""
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def _read_local(path: str, identity: tuple[int, int, int, int], span: Span) -> bytes:
    """Some bytes of a local file; fewer where it ends before."""
    if span[1] - span[0] > MOST_SPAN:
        raise PermanentError(f"{span[1] - span[0]} bytes of the file are wanted at once; at most {MOST_SPAN} are read")
    try:
        with open_regular(path) as stream:
            if _identity(os.fstat(stream.fileno())) != identity:
                raise TransientError("the file was replaced while it was read")
            return os.pread(stream.fileno(), span[1] - span[0], span[0])
    except OSError as error:
        raise PermanentError(error.strerror or type(error).__name__) from error
