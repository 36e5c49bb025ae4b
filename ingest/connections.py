"""Connections that look where they have arrived before they ask for anything.

A name may lead to a public address while it is checked and to a machine of the private network a moment later, when
the connection is made. So the address is judged once more on the open connection, which nothing can change any more,
and before the first byte of the request.
"""

from __future__ import annotations

import socket
from collections.abc import Callable

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import LocationValueError

from ingest.hrefs import is_private_address, is_spelled_address

__all__ = ["PatientRetry", "PrivatePeerError", "check_peers"]

MayBePrivate = Callable[[str], bool]
"""Whether a host name may lead to a private address."""


class PatientRetry(urllib3.Retry):
    """urllib3's Retry, which would otherwise sleep for as long as the server's Retry-After says."""

    longest_s = 120.0

    def get_retry_after(self, response: urllib3.BaseHTTPResponse) -> float | None:
        wait = super().get_retry_after(response)
        return None if wait is None else min(wait, self.longest_s)


class PrivatePeerError(LocationValueError):
    """A name led to an address of the private network; nothing was sent."""


def check_peers(manager: urllib3.PoolManager, may_be_private: MayBePrivate) -> urllib3.PoolManager:
    """Let all connections of `manager` judge the address they have reached; `manager` itself is given back.

    Hosts that are spelled as an address were judged as text before (`ingest.hrefs.resolve_href`).

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

    class Plain(HTTPConnection):
        def _new_conn(self) -> socket.socket:
            sock = super()._new_conn()
            judge(self.host, sock)
            return sock

    class Secure(HTTPSConnection):
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
