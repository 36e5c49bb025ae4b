"""Connections that look where they have arrived before they ask for anything.

A name may lead to a public address while it is checked and to a machine of the private network a moment later, when
the connection is made. So the address is judged once more on the open connection, which nothing can change any more,
and before the first byte of the request.
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

MayBePrivate = Callable[[str], bool]
"""Whether a host name may lead to a private address."""


class PatientRetry(urllib3.Retry):
    """urllib3's Retry, which would otherwise sleep for as long as the server's Retry-After says."""

    longest_s = 120.0

    def get_retry_after(self, response: urllib3.BaseHTTPResponse) -> float | None:
        wait = super().get_retry_after(response)
        return None if wait is None else min(wait, self.longest_s)

    def sleep(self, response: urllib3.BaseHTTPResponse | None = None) -> None:
        """Pause before the next attempt; a stop of the process ends the pause."""
        asked = self.get_retry_after(response) if self.respect_retry_after_header and response is not None else None
        pause(asked or self.get_backoff_time())


class PrivatePeerError(LocationValueError):
    """A name led to an address of the private network; nothing was sent."""


class _BoundedAnswers:
    """What all connections share: answers that must come fast enough, and of which no more is read than is wanted."""

    response_class = TimedResponse

    def getresponse(self) -> urllib3.HTTPResponse:
        reply: urllib3.HTTPResponse = super().getresponse()  # type: ignore[misc]
        # before it repeats a request urllib3 reads all of the answer that it throws away, however long that is
        reply.drain_conn = functools.partial(_drain, reply)  # type: ignore[method-assign]
        return reply


def _drain(reply: urllib3.HTTPResponse) -> None:
    """Read a short answer to its end, so that its connection serves again; close the connection of a longer one."""
    with suppress(HTTPError, OSError, HTTPException):
        if len(read_start(reply, _MOST_DRAINED + 1)) <= _MOST_DRAINED:
            return
    reply.close()


def bound_answers(manager: urllib3.PoolManager) -> urllib3.PoolManager:
    """Let the connections of a proxy's manager bound answers, too; where it leads is for the proxy to judge.

    Args:
        manager: Has made no connection yet; it is given back.
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
    """Let all connections of `manager` judge the address they have reached, and the time that answers take.

    `manager` itself is given back.

    Hosts that are spelled as an address were judged as text before (`ingest.trust.hrefs.resolve_href`).

    Args:
        manager: Has made no connection yet.
        may_be_private: Asked with the host name, in lower case.
    """

    def judge(host: str, sock: socket.socket) -> None:
        name = host.strip("[]").rstrip(".").lower()
        if is_spelled_address(name) or may_be_private(name):
            return
        address = str(sock.getpeername()[0])
        if is_private_address(address):
            sock.close()
            raise PrivatePeerError(f"{name} leads to the private address {address}; --allow-private-hosts permits that")

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
