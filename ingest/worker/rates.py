"""Rate limits: at most so many requests per second to a provider, from all workers together.

The scheduler keeps the time of the next free request of each provider, and tells a worker how long to wait for its own.
Nothing is leased, so a worker that dies leaves nothing locked. Without a cluster (search, reading of headers) the same
limit holds inside the process.
"""

from __future__ import annotations

import functools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from ingest.trust.providers import PROVIDERS
from ingest.trust.waits import check_waits, pause

__all__ = ["TURN", "Crowd", "RateLimiter", "bind_worker", "limit_of", "wait_for_turn"]

RateLimits = tuple[tuple[str, float], ...]
"""Limits of the user as (host, requests per second); they win over the provider's rule."""

_LOOK_S = 0.5
"""Seconds between checks whether the process is being stopped, while a request waits for its place."""
TURN = "terrashard_turn"
"""Name of the handler of the scheduler that gives turns."""
_bound: list[Any] = []


class RateLimiter:
    """Times at which requests may be sent: evenly spaced, in the order in which they are reserved."""

    def __init__(self) -> None:
        self._next: dict[str, float] = {}
        self._lock = threading.Lock()

    def take(self, name: str, rate: float, count: int = 1, *, now: float | None = None) -> float:
        """Reserve the times of `count` requests; return the seconds to wait for the first of them.

        >>> limiter = RateLimiter()
        >>> [limiter.take("cdse", 5.0, now=100.0) for _ in range(3)]
        [0.0, 0.2, 0.4]
        """
        moment = time.monotonic() if now is None else now
        with self._lock:
            start = max(moment, self._next.get(name, moment))
            self._next[name] = start + count / rate
        return round(start - moment, 6)


class Crowd:
    """The number of requests that this process may have under way at each host.

    Whenever a host answers that it is busy, the number is halved. After as many good answers in a row as there are
    places, it grows by one, up to where it started.

    Args:
        most: Places at each host at the start.
    """

    def __init__(self, most: int = 64) -> None:
        self._most = most
        self._places: dict[str, int] = {}
        self._inside: Counter[str] = Counter()
        self._good: Counter[str] = Counter()
        self._changed = threading.Condition()

    @contextmanager
    def place(self, href: str) -> Iterator[Callable[[bool], None]]:
        """Wait for a place at the host of `href`; yield a function that takes whether the host was busy."""
        host = urlsplit(href).netloc
        with self._changed:
            while self._inside[host] >= self.places(host):
                self._changed.wait(_LOOK_S)
                check_waits()
            self._inside[host] += 1
        try:
            yield functools.partial(self._adapt, host)
        finally:
            with self._changed:
                self._inside[host] -= 1
                self._changed.notify_all()

    def places(self, host: str) -> int:
        """Return the number of requests that may be under way at a host now."""
        return self._places.get(host, self._most)

    def _adapt(self, host: str, busy: bool) -> None:
        with self._changed:
            places = self.places(host)
            self._good[host] = 0 if busy else self._good[host] + 1
            if busy:
                # requests that were sent together are refused together: that counts once
                self._places[host] = max(1, min(places, -(-self._inside[host] // 2)))
            elif self._good[host] >= places and places < self._most:
                self._places[host], self._good[host] = places + 1, 0


_local = RateLimiter()


def bind_worker(worker: Any) -> None:
    """Make the scheduler of `worker` count the requests of this process from now on."""
    _bound[:] = [worker]


def limit_of(href: str, own: Sequence[tuple[str, float]] = ()) -> tuple[str, float] | None:
    """Return the limit that holds for an href, as (name, requests per second); None where there is none.

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
    """Sleep until `count` requests may be sent to the host of `href`; return at once where there is no limit."""
    limit = limit_of(href, own)
    if limit is None:
        return
    delay = _ask(*limit, count)
    pause(delay)


def _ask(name: str, rate: float, count: int) -> float:
    for worker in _bound:
        if worker.status.name != "running":
            continue
        from distributed.utils import sync  # there is a worker, so Dask is imported already

        try:
            answer = sync(worker.loop, getattr(worker.scheduler, TURN), name=name, rate=rate, count=count)
        except (OSError, RuntimeError, TimeoutError):
            break  # the scheduler is ending: the task will run again elsewhere
        return float(answer)
    return _local.take(name, rate, count)
