"""Connections that check the address they have reached before they send a request.

A host name may resolve to a public address when it is checked, and to a machine of the private network a moment later,
when the connection is made. So the address of the open connection, which no longer changes, is checked once more
before the first byte of the request.
"""

from __future__ import annotations

import functools
import socket
from collections.abc import Callable
from contextlib import suppress
from http.client import HTTPException

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import HTTPError, LocationValueError

from ingest.trust.answers import TimedResponse, read_start
from ingest.trust.hrefs import is_private_address, is_spelled_address
from ingest.trust.waits import pause

__all__ = ["PatientRetry", "PrivatePeerError", "bound_answers", "check_peers"]

_MOST_DRAINED = 1 << 16
"""Largest rest of a response that is read so that its connection can serve again, bytes."""

MayBePrivate = Callable[[str], bool]
"""A function that tells whether a host name may resolve to a private address."""


class PatientRetry(urllib3.Retry):
    """urllib3's Retry with an upper limit on Retry-After; without it, a server could make a client sleep for days."""

    longest_s = 120.0

    def get_retry_after(self, response: urllib3.BaseHTTPResponse) -> float | None:
        wait = super().get_retry_after(response)
        return None if wait is None else min(wait, self.longest_s)

    def sleep(self, response: urllib3.BaseHTTPResponse | None = None) -> None:
        """Pause before the next attempt; the pause ends at once when the process is stopped."""
        asked = self.get_retry_after(response) if self.respect_retry_after_header and response is not None else None
        pause(asked or self.get_backoff_time())


class PrivatePeerError(LocationValueError):
    """A host name resolved to an address of the private network; nothing was sent to it."""


class _BoundedAnswers:
    """The part that all connections share: responses must come fast enough, and are not read further than needed."""

    response_class = TimedResponse

    def getresponse(self) -> urllib3.HTTPResponse:
        reply: urllib3.HTTPResponse = super().getresponse()  # type: ignore[misc]
        # before urllib3 repeats a request, it reads the whole response that it drops, however long that is
        reply.drain_conn = functools.partial(_drain, reply)  # type: ignore[method-assign]
        return reply


def _drain(reply: urllib3.HTTPResponse) -> None:
    """Read a short response to its end, so that its connection serves again; close the connection of a longer one."""
    with suppress(HTTPError, OSError, HTTPException):
        if len(read_start(reply, _MOST_DRAINED + 1)) <= _MOST_DRAINED:
            return
    reply.close()


def bound_answers(manager: urllib3.PoolManager) -> urllib3.PoolManager:
    """Bound the responses that come through a proxy; the proxy itself decides which addresses it connects to.

    Args:
        manager: The proxy's manager, which has made no connection yet.

    Returns:
        The same manager.
    """

    class Plain(_BoundedAnswers, HTTPConnection):  # type: ignore[misc]
        pass

    class Secure(_BoundedAnswers, HTTPSConnection):  # type: ignore[misc]
        pass

    class PlainPool(HTTPConnectionPool):
        ConnectionCls = Plain

    class SecurePool(HTTPSConnectionPool):
        ConnectionCls = Secure

    manager.pool_classes_by_scheme = {"http": PlainPool, "https": SecurePool}
    return manager


def check_peers(manager: urllib3.PoolManager, may_be_private: MayBePrivate) -> urllib3.PoolManager:
    """Check the address that each connection of `manager` reaches, and bound its responses.

    Hosts that are written as an address are not checked here: `ingest.trust.hrefs.resolve_href` has checked them.

    Args:
        manager: A manager that has made no connection yet.
        may_be_private: Called with the host name in lower case.

    Returns:
        The same manager.
    """

    def judge(host: str, sock: socket.socket) -> None:
        name = host.strip("[]").rstrip(".").lower()
        if is_spelled_address(name) or may_be_private(name):
            return
        address = str(sock.getpeername()[0])
        if is_private_address(address):
            sock.close()
            raise PrivatePeerError(
                f"{name} resolves to the private address {address}; --allow-private-hosts permits that"
            )

    class Plain(_BoundedAnswers, HTTPConnection):  # type: ignore[misc]
        def _new_conn(self) -> socket.socket:
            sock = super()._new_conn()
            judge(self.host, sock)
            return sock

    class Secure(_BoundedAnswers, HTTPSConnection):  # type: ignore[misc]
        def _new_conn(self) -> socket.socket:
            sock = super()._new_conn()
            judge(self.host, sock)
            return sock

    class PlainPool(HTTPConnectionPool):
        ConnectionCls = Plain

    class SecurePool(HTTPSConnectionPool):
        ConnectionCls = Secure

    manager.pool_classes_by_scheme = {"http": PlainPool, "https": SecurePool}
    return manager
