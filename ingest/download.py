"""Getting bytes of a remote file: its head, spans of it, or the whole; signed, bounded, retried and checked.

Every answer is judged before it is used: its status, its range, its length, whether the file is still the one whose
head is known, and where it came from. No redirect to another host is followed.
"""

from __future__ import annotations

import functools
import io
import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

import urllib3

from ingest.buckets import bucket_url
from ingest.connections import PatientRetry, PrivatePeerError, check_peers
from ingest.hrefs import redact_logs
from ingest.ranges import HEAD_BYTES, MOST_AT_ONCE, Head, HeadCache, RangeFile, Span
from ingest.rates import Crowd, wait_for_turn
from ingest.sign import STORAGE_HOSTS, signed
from zarr_store.errors import AccessError, InvalidInput

if TYPE_CHECKING:
    from ingest.access import Access

__all__ = [
    "DRIVERS",
    "TIFF",
    "PermanentError",
    "TransientError",
    "cause_of",
    "fetch",
    "fetch_whole",
    "heads",
    "innermost",
    "peek",
    "redact",
    "stream_whole",
    "with_sidecar",
]

DRIVERS = (
    (b"II*\x00", "GTiff"),
    (b"MM\x00*", "GTiff"),
    (b"II+\x00", "GTiff"),
    (b"MM\x00+", "GTiff"),
    (b"\x00\x00\x00\x0cjP  \r\n\x87\n", "JP2OpenJPEG"),
    (b"\xff\x4f\xff\x51", "JP2OpenJPEG"),  # raw codestream: files named .tif in the wild hold one
)
"""What a file begins with, and the one GDAL driver that may read it."""
TIFF = tuple(start for start, name in DRIVERS if name == "GTiff")
_RETRIED_STATUS = (408, 425, 429, 500, 502, 503, 504)
_BUSY = (429, 503)
_crowd = Crowd()
_MOST_WHOLE = 256 << 20
_MOST_SIDECAR = 1 << 20


class PermanentError(Exception):
    """A fault that the next attempt would meet again."""


class TransientError(Exception):
    """A fault that may be gone at the next attempt."""


def peek(href: str, access: Access) -> tuple[str, Head]:
    pool = _pool(os.getpid(), access)
    plain = href
    # what a bucket refuses once it refuses again: it is signed anew each time
    renewed = href.startswith("s3://") or (access.sign == "none" and not access.sign_rules)
    url = _signed(href, access, pool)
    for _ in range(4):
        wait_for_turn(plain, access.rates)
        try:
            with _crowd.place(url) as told_busy:
                reply = pool.request(
                    "GET", url, headers={"Range": f"bytes=0-{HEAD_BYTES - 1}"}, redirect=False, preload_content=False
                )
                told_busy(_was_busy(reply))
        except PrivatePeerError as error:
            raise PermanentError(str(error)) from error
        except urllib3.exceptions.HTTPError as error:
            raise TransientError(innermost(error)) from error
        try:
            if reply.status in (301, 302, 303, 307, 308):
                target = urljoin(url, reply.headers.get("Location", ""))
                if urlsplit(target).netloc != urlsplit(url).netloc:
                    raise PermanentError(f"redirect to another host ({urlsplit(target).hostname}) is not followed")
                url = plain = target
                continue
            if reply.status == 403 and not renewed:
                url, renewed = _signed(href, access, pool, renew=True), True
                continue
            if reply.status not in (200, 206):
                kind = TransientError if reply.status in _RETRIED_STATUS else PermanentError
                advice = _advice(url, access) if reply.status in (401, 403, 404, 409) else ""
                raise kind(f"HTTP {reply.status} {reply.reason or ''}".strip() + advice)
            ranges = reply.status == 206
            data = reply.read(HEAD_BYTES if ranges else 64, decode_content=False)
            magic = data[:64]
            whole = reply.headers.get("Content-Range", "").rpartition("/")[2] or reply.headers.get("Content-Length", "")
            if not any(magic.startswith(start) for start, _ in DRIVERS):
                kind_text = reply.headers.get("Content-Type", "an unnamed type").partition(";")[0]
                raise PermanentError(f"not a TIFF or JPEG 2000 file (got {kind_text}, it begins with {magic[:24]!r})")
            size = int(whole) if whole.isdigit() else None
            return url, Head(plain, data, size, _version(reply), ranges, HeadCache.deadline())
        except urllib3.exceptions.HTTPError as error:
            raise TransientError(innermost(error)) from error
        finally:
            reply.close()
    raise PermanentError("more than three redirects")


def fetch(href: str, head: Head, access: Access, span: Span) -> bytes:
    """Some bytes of a file whose head is known; faults are permanent or transient, as those of opening.

    Raises:
        TransientError: Among others where the file is no longer the one whose head is known.
    """
    pool = _pool(os.getpid(), access)
    start, stop = span
    headers = {"Range": f"bytes={start}-{stop - 1}"}
    for renew in (False, True):
        url = _signed(head.url, access, pool, renew=renew)
        wait_for_turn(head.url, access.rates)
        try:
            with _crowd.place(url) as told_busy:
                reply = pool.request("GET", url, headers=headers, redirect=False, decode_content=False)
                told_busy(_was_busy(reply))
        except urllib3.exceptions.HTTPError as error:
            raise TransientError(innermost(error)) from error
        if reply.status != 403 or url == head.url:
            break
    if reply.status != 206:
        kind = PermanentError if 400 <= reply.status < 500 and reply.status not in _RETRIED_STATUS else TransientError
        raise kind(f"HTTP {reply.status} {reply.reason or ''}".strip())
    etag, told = _version(reply), reply.headers.get("Content-Range", "")
    if (etag != head.etag and None not in (etag, head.etag)) or told not in (
        f"bytes {start}-{stop - 1}/{head.size}",
        f"bytes {start}-{stop - 1}/*",
    ):
        heads(os.getpid()).drop(href)
        raise TransientError("the file was replaced while it was read")
    if len(reply.data) != stop - start:
        raise TransientError(f"the answer broke off after {len(reply.data)} of {stop - start} bytes")
    return reply.data


def fetch_whole(url: str, access: Access) -> tuple[Head, Callable[[Span], bytes]]:
    """A file of a server that answers no ranges, fetched once; GDAL itself would follow redirects to any host."""
    try:
        reply = _pool(os.getpid(), access).request("GET", url, redirect=False, preload_content=False)
        try:
            if reply.status != 200:
                raise TransientError(f"HTTP {reply.status} {reply.reason or ''}".strip())
            data = reply.read(_MOST_WHOLE + 1, decode_content=False)
        finally:
            reply.close()
    except urllib3.exceptions.HTTPError as error:
        raise TransientError(innermost(error)) from error
    if len(data) > _MOST_WHOLE:
        raise PermanentError(
            f"the server answers no range requests, and the file is larger than the {_MOST_WHOLE >> 20} MiB that are "
            "read as a whole"
        )

    def beyond(span: Span) -> bytes:
        raise TransientError(f"the file ends at {len(data)} bytes, {span[1]} are needed")

    return Head(url, data, len(data), _version(reply), False, 0.0), beyond


def stream_whole(href: str, access: Access, take: Callable[[bytes], Any]) -> None:
    """Hand a file to `take` piece by piece, all of it; nothing is kept.

    Raises:
        PermanentError, TransientError: As `peek`, or the file broke off, or was replaced since its head was seen.
    """
    _, head = peek(href, access)
    pool = _pool(os.getpid(), access)
    wait_for_turn(head.url, access.rates)
    try:
        reply = pool.request("GET", _signed(head.url, access, pool), redirect=False, preload_content=False)
        try:
            if reply.status != 200:
                raise TransientError(f"HTTP {reply.status} {reply.reason or ''}".strip())
            if _version(reply) != head.etag:
                raise TransientError("the file was replaced while it was read")
            came = 0
            for piece in reply.stream(1 << 20, decode_content=False):
                came += len(piece)
                take(piece)
        finally:
            reply.close()
    except urllib3.exceptions.HTTPError as error:
        raise TransientError(innermost(error)) from error
    if head.size is not None and came != head.size:
        raise TransientError(f"the answer broke off after {came} of {head.size} bytes")


def with_sidecar(file: RangeFile, href: str, access: Access) -> Callable[..., io.RawIOBase | io.BytesIO]:
    """Opens the file, and beside it NAME.aux.xml, where the georeference of a raw codestream is."""
    parts = urlsplit(href)
    beside = parts._replace(path=f"{parts.path}.aux.xml").geturl()
    sidecar: list[bytes | None] = []

    def fetch() -> bytes | None:
        pool = _pool(os.getpid(), access)
        reply = pool.request("GET", _signed(beside, access, pool), redirect=False, preload_content=False)
        try:
            return reply.read(_MOST_SIDECAR, decode_content=True) if reply.status == 200 else None
        finally:
            reply.close()

    def opener(path: str, mode: str = "rb") -> io.RawIOBase | io.BytesIO:
        if not path.endswith(".aux.xml"):
            return file.open(path, mode)
        if not sidecar:
            sidecar.append(fetch())
        if sidecar[0] is None:
            raise FileNotFoundError(path)
        return io.BytesIO(sidecar[0])

    return opener


@functools.lru_cache(maxsize=2)
def heads(pid: int) -> HeadCache:
    """One per process, as `_pool`."""
    return HeadCache()


def _version(reply: urllib3.BaseHTTPResponse) -> str | None:
    """What changes when a remote file is replaced, if the server says it."""
    return reply.headers.get("ETag") or reply.headers.get("Last-Modified")


def _was_busy(reply: urllib3.BaseHTTPResponse) -> bool:
    """Whether the host asked for patience, now or on an attempt that urllib3 repeated."""
    history = reply.retries.history if reply.retries is not None else ()
    return any(status in _BUSY for status in (reply.status, *(one.status for one in history)))


def _advice(url: str, access: Access) -> str:
    if access.sign == "none" and (urlsplit(url).hostname or "").endswith(STORAGE_HOSTS):
        return " (files of Planetary Computer need --sign planetary-computer)"
    return ""


def _signed(href: str, access: Access, pool: urllib3.PoolManager, *, renew: bool = False) -> str:
    try:
        if href.startswith("s3://"):
            return bucket_url(href, access.bucket_rules, pool, pay=access.requester_pays)
        return signed(href, access.sign, pool, renew=renew, rules=access.sign_rules)
    except InvalidInput as error:
        raise PermanentError(str(error)) from error
    except AccessError as error:
        raise TransientError(str(error)) from error


@functools.lru_cache(maxsize=4)
def _pool(pid: int, access: Access) -> urllib3.PoolManager:
    """One pool per process (`pid` keys the cache, as sockets do not survive a fork)."""
    redact_logs()
    names = access.private_names
    manager = urllib3.PoolManager(
        timeout=urllib3.Timeout(connect=access.connect_timeout_s, read=max(access.low_speed_s, 1)),
        retries=PatientRetry(
            total=max(0, access.attempts - 1),
            redirect=False,
            status_forcelist=_RETRIED_STATUS,
            backoff_factor=access.backoff_s,
            backoff_max=16 * access.backoff_s,
            backoff_jitter=access.backoff_s,
            respect_retry_after_header=True,
            raise_on_status=False,
            connect=1,  # a closed port or unknown host is known at once: fail fast
        ),
        maxsize=MOST_AT_ONCE,
    )
    return check_peers(manager, lambda name: names is None or name in names)


def redact(text: str) -> str:
    """Drop queries, fragments and user information from every URL in `text`; they may be secrets."""
    text = re.sub(r"((?:https?|s3)://)[^/\s'\"@]*@", r"\1", text)
    return re.sub(r"((?:https?://|s3://|/vsi\w+/)[^\s'\"?#]*)[?#][^\s'\"]*", r"\1", text)


def cause_of(error: BaseException | None, href: str) -> str:
    """A cause without secrets and without the folder the file lies in."""
    text = str(error).replace(href, href.rpartition("/")[2]) if error else "unknown"
    return " ".join(redact(text).split())[:300]


def innermost(error: BaseException) -> str:
    """The text of the deepest cause: rasterio says "Read failed. See previous exception for details."."""
    while error.__cause__ is not None:
        error = error.__cause__
    reason = getattr(error, "reason", None)
    return str(reason if isinstance(reason, Exception) else error) or type(error).__name__
