"""Fetch bytes of a remote file: its head, spans of it, or the whole; signed, bounded, retried and checked.

Every answer is checked before it is used: its status, its range, its length, its sender, and that the file is still the
one whose head is known. No redirect to another host is followed.
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

import urllib3

from ingest.raster.drivers import DRIVERS_BY_MAGIC, OTHER_MAGIC
from ingest.raster.faults import PermanentError, TransientError, UnsupportedError, describe_fault
from ingest.raster.kept import kept_bytes
from ingest.raster.ranges import HEAD_BYTES, MAX_REQUESTS, Head, HeadCache, Span
from ingest.trust.answers import TooLongError, read_answer, read_start
from ingest.trust.buckets import bucket_url
from ingest.trust.connections import PatientRetry, PrivatePeerError, check_peers
from ingest.trust.presigned import find_signed
from ingest.trust.redact import redact_logs
from ingest.trust.sign import STORAGE_HOSTS, signed
from ingest.trust.waits import pause
from ingest.worker.rates import Crowd, wait_for_turn
from zarr_store.errors import AccessError, InvalidInput

if TYPE_CHECKING:
    from ingest.raster.limits import Access

__all__ = [
    "MAX_SPAN_BYTES",
    "ReplacedError",
    "fetch",
    "fetch_head",
    "fetch_whole",
    "head_cache",
    "is_same_version",
    "read_remote_sidecar",
    "stream_whole",
]

_RETRIED_STATUS = (408, 425, 429, 500, 502, 503, 504)
"""HTTP statuses after which a request is sent again."""
_BUSY = (429, 503)
"""HTTP statuses by which a host asks for fewer requests."""
_MOST_ASKED = 32
"""Largest number of requests for a span where servers state different versions of the file."""
_SURE = 12
"""How often one other version must answer before the file counts as replaced: of two servers, one in 4,096 reads."""
_TELLING_VERSIONS = 3
"""Largest number of other versions of equal bytes that a server may state; with more, versions tell nothing."""
_crowd = Crowd()
MAX_SPAN_BYTES = 1 << 30
"""Largest number of bytes of one request; blocks of a window that lie beside each other are one request."""
_MAX_WHOLE_BYTES = 256 << 20
"""Largest file that is fetched whole, from servers that answer no range requests."""
_MAX_STREAMED_BYTES = 64 << 30
"""Largest number of bytes that are streamed of a file of unknown size; ten times the largest scene."""


def fetch_head(href: str, access: Access, *, apart: bool = False) -> tuple[str, Head]:
    """Fetch the first bytes of a file.

    Args:
        href: Absolute URL.
        access: Limits and retries.
        apart: Whether to leave the connection afterwards, so that the next request may reach another server.

    Returns:
        The signed address that answered, and the head.

    Raises:
        PermanentError: The file is absent or refused, is not a raster, or its server redirects to another host.
        TransientError: The server cannot be reached or failed.
    """
    pool = _pool(os.getpid(), access)
    plain = href
    # a bucket's refusal is final: each of its requests is signed again
    renewed = href.startswith("s3://") or (access.sign == "none" and not access.sign_rules)
    url = _signed(href, access, pool)
    headers = {"Range": f"bytes=0-{HEAD_BYTES - 1}"} | ({"Connection": "close"} if apart else {})
    for _ in range(4):
        wait_for_turn(plain, access.rates)
        try:
            with _crowd.place(url) as report_busy:
                reply = pool.request("GET", url, headers=headers, redirect=False, preload_content=False)
                report_busy(_was_busy(reply))
        except PrivatePeerError as error:
            raise PermanentError(str(error)) from error
        except urllib3.exceptions.HTTPError as error:
            raise TransientError(describe_fault(error)) from error
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
                advice = _advice(url, href, access) if reply.status in (401, 403, 404, 409) else ""
                raise kind(f"HTTP {reply.status} {reply.reason or ''}".strip() + advice)
            ranges = reply.status == 206
            data = read_start(reply, HEAD_BYTES if ranges else 64)
            magic = data[:64]
            whole = reply.headers.get("Content-Range", "").rpartition("/")[2] or reply.headers.get("Content-Length", "")
            if not any(magic.startswith(start) for start, _ in DRIVERS_BY_MAGIC):
                kind_text = reply.headers.get("Content-Type", "an unnamed type").partition(";")[0]
                kind = UnsupportedError if magic.startswith(OTHER_MAGIC) else PermanentError
                raise kind(f"not a TIFF or JPEG 2000 file (got {kind_text}, it begins with {magic[:24]!r})")
            size = int(whole) if whole.isdigit() else None
            return url, Head(plain, data, size, _version(reply), ranges, HeadCache.deadline())
        except urllib3.exceptions.HTTPError as error:
            raise TransientError(describe_fault(error)) from error
        finally:
            reply.close()
    raise PermanentError("more than three redirects")


def fetch(href: str, head: Head, access: Access, span: Span) -> bytes:
    """Fetch bytes of a file whose head is known.

    Raises:
        PermanentError: The server refuses, or the span is too long.
        TransientError: The server failed, or the file is no longer the one whose head is known.
    """
    pool = _pool(os.getpid(), access)
    start, stop = span
    if stop - start > MAX_SPAN_BYTES:
        raise PermanentError(f"{stop - start} bytes of the file are needed at once; at most {MAX_SPAN_BYTES} are read")
    headers = {"Range": f"bytes={start}-{stop - 1}"}
    for attempt in range(max(1, access.attempts)):
        try:
            return _fetch_of_version(href, head, access, pool, span, headers)
        except _BrokenOffError as error:
            if attempt + 1 >= access.attempts:
                raise TransientError(str(error)) from error
            pause(access.backoff_s * 2 ** min(attempt, 4))
    raise AssertionError("unreachable")


class _BrokenOffError(Exception):
    """An answer that was good until it broke off."""


def _fetch_of_version(
    href: str, head: Head, access: Access, pool: urllib3.PoolManager, span: Span, headers: dict[str, str]
) -> bytes:
    """Fetch a span of the version of a file whose head is known.

    Servers behind one name may state different versions of the same file. Then the version that is known answers again,
    and all answers are equal. A file that was replaced has another version from then on.

    Raises:
        TransientError: The file was replaced.
    """
    others: Counter[str] = Counter()
    before: bytes | None = None
    for _ in range(_MOST_ASKED):
        # another connection may lead to another server
        asked = headers | {"Connection": "close"} if others else headers
        version, data = _fetch_once(href, head, access, pool, span, asked)
        if before is not None and data != before:
            break
        if is_same_version(version, head.etag):
            return data
        before = data
        others[version or ""] += 1
        if len(others) > _TELLING_VERSIONS:  # each answer has another version, so that they tell nothing
            again = fetch_head(href, access)[1]
            if (again.data, again.size) == (head.data, head.size):
                return data
            break
        if max(others.values()) >= _SURE:
            break
    head_cache(os.getpid()).drop(href)
    kept_bytes(os.getpid()).drop(href)
    raise TransientError("the file was replaced while it was read")


def is_same_version(one: str | None, other: str | None) -> bool:
    """Return whether two stated versions may be one; an absent version or a weak mark is no difference.

    >>> is_same_version('W/"a"', '"a"'), is_same_version(None, '"a"'), is_same_version('"b"', '"a"')
    (True, True, False)
    """
    return one is None or other is None or one.removeprefix("W/") == other.removeprefix("W/")


def _fetch_once(
    href: str, head: Head, access: Access, pool: urllib3.PoolManager, span: Span, headers: dict[str, str]
) -> tuple[str | None, bytes]:
    """Fetch a span once; return the version that the server states, or None, and the bytes."""
    start, stop = span
    for renew in (False, True):
        url = _signed(head.url, access, pool, renew=renew)
        wait_for_turn(head.url, access.rates)
        try:
            with _crowd.place(url) as report_busy:
                reply = pool.request("GET", url, headers=headers, redirect=False, preload_content=False)
                report_busy(_was_busy(reply))
        except urllib3.exceptions.HTTPError as error:
            raise TransientError(describe_fault(error)) from error
        if reply.status != 403 or url == head.url or renew:
            break
        reply.close()
    try:
        if reply.status != 206:
            raise _refused(reply)
        version, content_range = _version(reply), reply.headers.get("Content-Range", "")
        if content_range not in (f"bytes {start}-{stop - 1}/{head.size}", f"bytes {start}-{stop - 1}/*"):
            head_cache(os.getpid()).drop(href)
            kept_bytes(os.getpid()).drop(href)
            raise TransientError("the file was replaced while it was read")
        data = read_answer(reply, stop - start)
    except TooLongError as error:
        raise TransientError(f"the server sends more than the {stop - start} bytes it was asked for") from error
    except urllib3.exceptions.ProtocolError as error:  # also an answer that is shorter than it states
        raise _BrokenOffError(describe_fault(error)) from error
    except urllib3.exceptions.HTTPError as error:
        raise TransientError(describe_fault(error)) from error
    finally:
        reply.close()
    if len(data) != stop - start:
        raise TransientError(f"the answer broke off after {len(data)} of {stop - start} bytes")
    return version, data


def _refused(reply: urllib3.BaseHTTPResponse) -> PermanentError | TransientError:
    kind = PermanentError if 400 <= reply.status < 500 and reply.status not in _RETRIED_STATUS else TransientError
    return kind(f"HTTP {reply.status} {reply.reason or ''}".strip())


def fetch_whole(url: str, access: Access) -> tuple[Head, Callable[[Span], bytes]]:
    """Fetch a whole file from a server that answers no range requests; GDAL would follow redirects to any host.

    Returns:
        A head that holds the whole file, and a function that raises when bytes beyond its end are needed.
    """
    try:
        reply = _pool(os.getpid(), access).request("GET", url, redirect=False, preload_content=False)
        try:
            if reply.status != 200:
                raise TransientError(f"HTTP {reply.status} {reply.reason or ''}".strip())
            data = read_answer(reply, _MAX_WHOLE_BYTES)
        finally:
            reply.close()
    except TooLongError as error:
        raise UnsupportedError(
            f"the server answers no range requests, and the file is larger than the {_MAX_WHOLE_BYTES >> 20} MiB that "
            "are read as a whole"
        ) from error
    except urllib3.exceptions.HTTPError as error:
        raise TransientError(describe_fault(error)) from error

    def beyond(span: Span) -> bytes:
        raise TransientError(f"the file ends at {len(data)} bytes, {span[1]} are needed")

    return Head(url, data, len(data), _version(reply), False, 0.0), beyond


class ReplacedError(TransientError):
    """A file that has another version than a moment ago."""


def stream_whole(href: str, access: Access, take: Callable[[bytes], Any], *, any_version: bool = False) -> None:
    """Pass all bytes of a file to `take`, piece by piece, and keep none.

    Args:
        href: Absolute URL.
        access: Limits and retries.
        take: Function that gets each piece.
        any_version: Whether the version may be another one than that of the head; all bytes come in one answer.

    Raises:
        PermanentError, TransientError: An error of `fetch_head`, or the file broke off or was replaced meanwhile.
    """
    _, head = fetch_head(href, access)
    pool = _pool(os.getpid(), access)
    try:
        wait_for_turn(head.url, access.rates)
        reply = pool.request("GET", _signed(head.url, access, pool), redirect=False, preload_content=False)
        try:
            if reply.status != 200:
                raise TransientError(f"HTTP {reply.status} {reply.reason or ''}".strip())
            if not any_version and not is_same_version(_version(reply), head.etag):
                raise ReplacedError("the file was replaced while it was read")
            received, limit = 0, _MAX_STREAMED_BYTES if head.size is None else head.size
            for piece in reply.stream(1 << 20, decode_content=False):
                received += len(piece)
                if received > limit:
                    raise TransientError(f"the server sends more than the {limit} bytes that the file has")
                take(piece)
        finally:
            reply.close()
    except urllib3.exceptions.HTTPError as error:
        raise TransientError(describe_fault(error)) from error
    if head.size is not None and received != head.size:
        raise TransientError(f"the answer broke off after {received} of {head.size} bytes")


def read_remote_sidecar(href: str, access: Access, limit: int) -> bytes | None:
    """Read NAME.aux.xml beside a remote file, which holds the georeference of a raw codestream; None if there is none.

    Raises:
        TransientError: The server does not say whether there is one.
        PermanentError: It is larger than `limit` bytes.
    """
    parts = urlsplit(href)
    beside = parts._replace(path=f"{parts.path}.aux.xml").geturl()
    pool = _pool(os.getpid(), access)
    wait_for_turn(beside, access.rates)
    try:
        reply = pool.request("GET", _signed(beside, access, pool), redirect=False, preload_content=False)
        try:
            if reply.status in _RETRIED_STATUS:
                raise TransientError(f"HTTP {reply.status} {reply.reason or ''} for NAME.aux.xml".strip())
            return read_answer(reply, limit) if reply.status == 200 else None
        finally:
            reply.close()
    except PrivatePeerError as error:
        raise PermanentError(str(error)) from error
    except TooLongError as error:
        raise PermanentError(f"NAME.aux.xml has more than {limit} bytes, which no georeference needs") from error
    except urllib3.exceptions.HTTPError as error:
        raise TransientError(describe_fault(error)) from error


@functools.lru_cache(maxsize=2)
def head_cache(pid: int) -> HeadCache:
    """Return the cache of heads of the remote files that this process read last; `pid` makes it one per process."""
    return HeadCache()


def _version(reply: urllib3.BaseHTTPResponse) -> str | None:
    """Return the version of a remote file, which changes with the file; None if its server states none."""
    return reply.headers.get("ETag") or reply.headers.get("Last-Modified")


def _was_busy(reply: urllib3.BaseHTTPResponse) -> bool:
    """Return whether the host asked for fewer requests, now or on an attempt that urllib3 repeated."""
    history = reply.retries.history if reply.retries is not None else ()
    return any(status in _BUSY for status in (reply.status, *(one.status for one in history)))


def _advice(url: str, href: str, access: Access) -> str:
    if find_signed(href, access.signed_hrefs) != href:
        return (
            " (the catalogue signed this address, and its signature is not accepted now: repeat the command on SOURCE)"
        )
    if access.sign == "none" and (urlsplit(url).hostname or "").endswith(STORAGE_HOSTS):
        return " (files of Planetary Computer need --sign planetary-computer)"
    return ""


def _signed(href: str, access: Access, pool: urllib3.PoolManager, *, renew: bool = False) -> str:
    try:
        if href.startswith("s3://"):
            return bucket_url(href, access.bucket_rules, pool, pay=access.requester_pays)
        given = find_signed(href, access.signed_hrefs)
        if given != href and not renew:
            return given
        return signed(href, access.sign, pool, renew=renew, rules=access.sign_rules)
    except InvalidInput as error:
        raise PermanentError(str(error)) from error
    except AccessError as error:
        raise TransientError(str(error)) from error


@functools.lru_cache(maxsize=4)
def _pool(pid: int, access: Access) -> urllib3.PoolManager:
    """Return the connections of one process; `pid` is a key of the cache, as sockets do not survive a fork."""
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
            connect=1,  # a closed port or an unknown host fails at once
            read=min(1, max(0, access.attempts - 1)),  # a slow server is asked again later, by `with_asset`
        ),
        maxsize=MAX_REQUESTS,
    )
    return check_peers(manager, lambda name: names is None or name in names)
