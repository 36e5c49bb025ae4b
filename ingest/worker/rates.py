"""One limit of requests per second for all workers together, where a provider bears only so many.

The scheduler hands out turns: it keeps, per provider, the moment of the next free one, and tells a worker how long to
wait for its own. Nothing is leased, so a worker that dies leaves nothing locked. Without a cluster (search, probing
headers) the same rule holds inside the process.
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

from distributed.diagnostics.plugin import SchedulerPlugin
from distributed.utils import sync

from ingest.trust.providers import PROVIDERS
from ingest.trust.waits import check_waits, pause

__all__ = ["Crowd", "RateKeeper", "Turns", "bind_worker", "limit_of", "wait_for_turn"]

RateLimits = tuple[tuple[str, float], ...]
"""(host, requests per second), the user's own; they win over the provider's rule."""

_LOOK_S = 0.5
"""How often one who waits for a place looks whether the process is told to stop."""
_HANDLER = "terrashard_turn"
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


class Crowd:
    """How many requests this process has under way at each host: half as many whenever the host says that it is busy.

    After as many good answers as there are places, one place more is given, up to the first number.

    Args:
        most: Places at each host to begin with.
    """

    def __init__(self, most: int = 64) -> None:
        self._most = most
        self._places: dict[str, int] = {}
        self._inside: Counter[str] = Counter()
        self._good: Counter[str] = Counter()
        self._changed = threading.Condition()

    @contextmanager
    def place(self, href: str) -> Iterator[Callable[[bool], None]]:
        """Wait for a place at the host of `href`; what it gives is told whether the host was busy."""
        host = urlsplit(href).netloc
        with self._changed:
            while self._inside[host] >= self.places(host):
                self._changed.wait(_LOOK_S)
                check_waits()
            self._inside[host] += 1
        try:
            yield functools.partial(self._told, host)
        finally:
            with self._changed:
                self._inside[host] -= 1
                self._changed.notify_all()

    def places(self, host: str) -> int:
        """How many requests may be at a host now."""
        return self._places.get(host, self._most)

    def _told(self, host: str, busy: bool) -> None:
        with self._changed:
            places = self.places(host)
            self._good[host] = 0 if busy else self._good[host] + 1
            if busy:
                # those that were sent together are refused together: that is one sign, not many
                self._places[host] = max(1, min(places, -(-self._inside[host] // 2)))
            elif self._good[host] >= places and places < self._most:
                self._places[host], self._good[host] = places + 1, 0


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
    pause(delay)


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
