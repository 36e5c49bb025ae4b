"""Getting bytes of a remote file: its head, spans of it, or the whole; signed, bounded, retried and checked.

Every answer is judged before it is used: its status, its range, its length, whether the file is still the one whose
head is known, and where it came from. No redirect to another host is followed.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

import urllib3

from ingest.raster.faults import DRIVERS, PermanentError, TransientError, innermost
from ingest.raster.ranges import HEAD_BYTES, MOST_AT_ONCE, Head, HeadCache, Span
from ingest.trust.answers import TooLongError, read_answer, read_start
from ingest.trust.buckets import bucket_url
from ingest.trust.connections import PatientRetry, PrivatePeerError, check_peers
from ingest.trust.redact import redact_logs
from ingest.trust.sign import STORAGE_HOSTS, signed
from ingest.trust.waits import pause
from ingest.worker.rates import Crowd, wait_for_turn
from zarr_store.errors import AccessError, InvalidInput

if TYPE_CHECKING:
    from ingest.raster.limits import Access

__all__ = [
    "MOST_SPAN",
    "fetch",
    "fetch_whole",
    "heads",
    "peek",
    "read_beside",
    "stream_whole",
]

_RETRIED_STATUS = (408, 425, 429, 500, 502, 503, 504)
_BUSY = (429, 503)
_crowd = Crowd()
MOST_SPAN = 1 << 30
"""Of one request; the blocks of a window that lie beside each other are one."""
_MOST_WHOLE = 256 << 20
_MOST_STREAMED = 64 << 30
"""Of a file whose size its server does not tell; ten times the largest scene."""


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
            data = read_start(reply, HEAD_BYTES if ranges else 64)
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
    if stop - start > MOST_SPAN:
        raise PermanentError(f"{stop - start} bytes of the file are wanted at once; at most {MOST_SPAN} are read")
    headers = {"Range": f"bytes={start}-{stop - 1}"}
    for attempt in range(max(1, access.attempts)):
        try:
            return _fetch_once(href, head, access, pool, span, headers)
        except _BrokenOffError as error:
            if attempt + 1 >= access.attempts:
                raise TransientError(str(error)) from error
            pause(access.backoff_s * 2 ** min(attempt, 4))
    raise AssertionError("unreachable")


class _BrokenOffError(Exception):
    """An answer was good as far as it came."""


def _fetch_once(
    href: str, head: Head, access: Access, pool: urllib3.PoolManager, span: Span, headers: dict[str, str]
) -> bytes:
    start, stop = span
    for renew in (False, True):
        url = _signed(head.url, access, pool, renew=renew)
        wait_for_turn(head.url, access.rates)
        try:
            with _crowd.place(url) as told_busy:
                reply = pool.request("GET", url, headers=headers, redirect=False, preload_content=False)
                told_busy(_was_busy(reply))
        except urllib3.exceptions.HTTPError as error:
            raise TransientError(innermost(error)) from error
        if reply.status != 403 or url == head.url or renew:
            break
        reply.close()
    try:
        if reply.status != 206:
            raise _refused(reply)
        etag, told = _version(reply), reply.headers.get("Content-Range", "")
        if (etag != head.etag and None not in (etag, head.etag)) or told not in (
            f"bytes {start}-{stop - 1}/{head.size}",
            f"bytes {start}-{stop - 1}/*",
        ):
            heads(os.getpid()).drop(href)
            raise TransientError("the file was replaced while it was read")
        data = read_answer(reply, stop - start)
    except TooLongError as error:
        raise TransientError(f"the server sends more than the {stop - start} bytes it was asked for") from error
    except urllib3.exceptions.ProtocolError as error:  # also an answer that is shorter than it says
        raise _BrokenOffError(innermost(error)) from error
    except urllib3.exceptions.HTTPError as error:
        raise TransientError(innermost(error)) from error
    finally:
        reply.close()
    if len(data) != stop - start:
        raise TransientError(f"the answer broke off after {len(data)} of {stop - start} bytes")
    return data


def _refused(reply: urllib3.BaseHTTPResponse) -> PermanentError | TransientError:
    kind = PermanentError if 400 <= reply.status < 500 and reply.status not in _RETRIED_STATUS else TransientError
    return kind(f"HTTP {reply.status} {reply.reason or ''}".strip())


def fetch_whole(url: str, access: Access) -> tuple[Head, Callable[[Span], bytes]]:
    """A file of a server that answers no ranges, fetched once; GDAL itself would follow redirects to any host."""
    try:
        reply = _pool(os.getpid(), access).request("GET", url, redirect=False, preload_content=False)
        try:
            if reply.status != 200:
                raise TransientError(f"HTTP {reply.status} {reply.reason or ''}".strip())
            data = read_answer(reply, _MOST_WHOLE)
        finally:
            reply.close()
    except TooLongError as error:
        raise PermanentError(
            f"the server answers no range requests, and the file is larger than the {_MOST_WHOLE >> 20} MiB that are "
            "read as a whole"
        ) from error
    except urllib3.exceptions.HTTPError as error:
        raise TransientError(innermost(error)) from error

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
            came, most = 0, _MOST_STREAMED if head.size is None else head.size
            for piece in reply.stream(1 << 20, decode_content=False):
                came += len(piece)
                if came > most:
                    raise TransientError(f"the server sends more than the {most} bytes that the file has")
                take(piece)
        finally:
            reply.close()
    except urllib3.exceptions.HTTPError as error:
        raise TransientError(innermost(error)) from error
    if head.size is not None and came != head.size:
        raise TransientError(f"the answer broke off after {came} of {head.size} bytes")


def read_beside(href: str, access: Access, most: int) -> bytes | None:
    """NAME.aux.xml beside a remote file, where the georeference of a raw codestream is; None where there is none.

    Raises:
        TransientError: Whether there is one cannot be known.
        PermanentError: It is larger than `most` bytes.
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
            return read_answer(reply, most) if reply.status == 200 else None
        finally:
            reply.close()
    except PrivatePeerError as error:
        raise PermanentError(str(error)) from error
    except TooLongError as error:
        raise PermanentError(f"NAME.aux.xml has more than {most} bytes, which no georeference needs") from error
    except urllib3.exceptions.HTTPError as error:
        raise TransientError(innermost(error)) from error


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
            read=min(1, max(0, access.attempts - 1)),  # who is slow is asked again later, as the whole is repeated
        ),
        maxsize=MOST_AT_ONCE,
    )
    return check_peers(manager, lambda name: names is None or name in names)
