"""One limit of requests per second for all workers together, where a provider bears only so many.

The scheduler hands out turns: it keeps, per provider, the moment of the next free one, and tells a worker how long to
wait for its own. Nothing is leased, so a worker that dies leaves nothing locked. Without a cluster (search, probing
headers) the same rule holds inside the process.
"""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import urllib3
from distributed.diagnostics.plugin import SchedulerPlugin
from distributed.utils import sync

from ingest.providers import PROVIDERS

__all__ = ["LimitedFile", "RateKeeper", "Turns", "bind_worker", "limit_of", "wait_for_turn"]

RateLimits = tuple[tuple[str, float], ...]
"""(host, requests per second), the user's own; they win over the provider's rule."""

_HANDLER = "terrashard_turn"
_BLOCK = 1 << 18
_KEPT_BLOCKS = 32
_bound: list[Any] = []


class Turns:
    """Moments at which requests may be sent: evenly spaced, first come first served."""

    def __init__(self) -> None:
        self._next: dict[str, float] = {}
        self._lock = threading.Lock()

    def take(self, name: str, rate: float, count: int = 1, *, now: float | None = None) -> float:
        """Reserve `count` turns; how long to wait for the first of them, seconds.

        >>> turns = Turns()
        >>> [turns.take("cdse", 5.0, now=100.0) for _ in range(3)]
        [0.0, 0.2, 0.4]
        """
        moment = time.monotonic() if now is None else now
        with self._lock:
            start = max(moment, self._next.get(name, moment))
            self._next[name] = start + count / rate
        return round(start - moment, 6)


_here = Turns()


class RateKeeper(SchedulerPlugin):
    """Lets the scheduler hand out turns to all workers."""

    name = "terrashard-rates"
    idempotent = True

    async def start(self, scheduler: Any) -> None:
        """Answer workers that ask for a turn."""
        turns = Turns()

        async def turn(name: str, rate: float, count: int) -> float:
            return turns.take(name, rate, count)

        scheduler.handlers[_HANDLER] = turn


def bind_worker(worker: Any) -> None:
    """From now on requests of this process are counted by the scheduler of `worker`."""
    _bound[:] = [worker]


def limit_of(href: str, own: Sequence[tuple[str, float]] = ()) -> tuple[str, float] | None:
    """(name, requests per second) that hold for an href; None where nobody limits it.

    >>> limit_of("https://eodata.dataspace.copernicus.eu/x.jp2")
    ('cdse', 5.0)
    >>> limit_of("https://example.org/x.tif", [("example.org", 2.0)])
    ('example.org', 2.0)
    """
    parts = urlsplit(href)
    names = {parts.netloc.rpartition("@")[2].lower(), (parts.hostname or "").lower()}
    for host, rate in own:
        if host.lower() in names:
            return host.lower(), rate
    for rule in PROVIDERS:
        if rule.rate_limit and names.intersection(rule.hosts):
            return rule.name, rule.rate_limit
    return None


def wait_for_turn(href: str, own: Sequence[tuple[str, float]] = (), count: int = 1) -> None:
    """Sleep until `count` requests may be sent to where `href` lies; returns at once where there is no limit."""
    limit = limit_of(href, own)
    if limit is None:
        return
    delay = _ask(*limit, count)
    if delay > 0:
        time.sleep(delay)


def _ask(name: str, rate: float, count: int) -> float:
    for worker in _bound:
        if worker.status.name != "running":
            continue
        try:
            answer = sync(worker.loop, getattr(worker.scheduler, _HANDLER), name=name, rate=rate, count=count)
        except (OSError, RuntimeError, TimeoutError):
            break  # the scheduler is going: the task will be done again elsewhere
        return float(answer)
    return _here.take(name, rate, count)


class LimitedFile(io.RawIOBase):
    """A file behind HTTP that asks for a turn before every request, for GDAL to read from.

    GDAL's own HTTP client cannot be told to wait, and sends the ranges of one read all at once.

    Args:
        url: What to read, signed.
        size: Its length in bytes.
        pool: Sends the requests.
        own: The user's limits.
    """

    def __init__(self, url: str, size: int, pool: urllib3.PoolManager, own: Sequence[tuple[str, float]]) -> None:
        super().__init__()
        self._url, self._size, self._pool, self._own = url, size, pool, own
        self._at = 0
        self._blocks: dict[int, bytes] = {}
        self.error: Exception | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def read(self, count: int = -1) -> bytes:
        """Up to `count` bytes; a fault is kept in `error` too, as GDAL may drop it."""
        end = self._size if count < 0 else min(self._size, self._at + count)
        if self._at >= end:
            return b""
        first, last = self._at // _BLOCK, (end - 1) // _BLOCK
        try:
            data = b"".join(self._fetch(first, last))
        except Exception as error:
            self.error = error
            raise
        begin = self._at - first * _BLOCK
        result = data[begin : begin + end - self._at]
        self._at = end
        return result

    def _fetch(self, first: int, last: int) -> list[bytes]:
        missing = [i for i in range(first, last + 1) if i not in self._blocks]
        kept = {i: self._blocks[i] for i in range(first, last + 1) if i in self._blocks}
        if missing:
            start, stop = missing[0] * _BLOCK, min(self._size, (missing[-1] + 1) * _BLOCK)
            wait_for_turn(self._url, self._own)
            reply = self._pool.request(
                "GET", self._url, headers={"Range": f"bytes={start}-{stop - 1}"}, redirect=False, retries=False
            )
            if reply.status != 206 or len(reply.data) != stop - start:
                raise OSError(f"HTTP {reply.status} with {len(reply.data)} bytes, expected 206 with {stop - start}")
            for i in range(missing[0], missing[-1] + 1):
                kept[i] = reply.data[i * _BLOCK - start : (i + 1) * _BLOCK - start]
        self._blocks |= kept
        while len(self._blocks) > max(_KEPT_BLOCKS, last - first + 1):
            self._blocks.pop(next(iter(self._blocks)))
        return [kept[i] for i in range(first, last + 1)]
