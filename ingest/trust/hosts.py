"""Protects the pages that this machine serves: requests under a foreign host name are refused.

With DNS rebinding, a stranger's page lets its own host name resolve to 127.0.0.1 and then reads what a local server
answers. Such requests carry the stranger's name in their Host header. So a request is answered only if its Host header
names an IP address, which cannot be rebound, or `localhost`, or a name that this server was given.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any
from urllib.parse import urlsplit

__all__ = ["HostCheck", "guard_application", "machine_names", "why_refused"]

_PORTS = {"http": 80, "https": 443, "ws": 80, "wss": 443}


def why_refused(host: str | None, origin: str | None, names: Collection[str] = ()) -> str | None:
    """Return the reason why a request is refused; None where it may be answered.

    Args:
        host: Host header of the request; browsers always send one.
        origin: Origin header of the request, which browsers send with requests of scripts.
        names: Further names of the server, in lower case.

    >>> why_refused("127.0.0.1:8787", None), why_refused("localhost", "http://localhost")
    (None, None)
    >>> why_refused("rebound.example:8787", None)
    "the Host header names 'rebound.example', which is not this server"
    """
    if host and not _is_own(_parts(host)[0], names):
        return f"the Host header names {_parts(host)[0][:80]!r}, which is not this server"
    if origin is not None and host:
        parts = urlsplit(origin) if "://" in origin else None
        there = _parts(parts.netloc, _PORTS.get(parts.scheme)) if parts else ("", None)
        if there[0] != _parts(host)[0] or there[1] != _parts(host, _PORTS.get(parts.scheme) if parts else None)[1]:
            return f"the request comes from a page of {origin[:80]!r}, which is not this server"
    return None


def machine_names() -> frozenset[str]:
    """Return the names of this machine in lower case, without asking a name server."""
    name = socket.gethostname().lower()
    return frozenset({name, name.partition(".")[0]} - {""})


def _parts(netloc: str, port: int | None = None) -> tuple[str, int | None]:
    """Split a Host header into its name in lower case and its port; a port that is not a number becomes None."""
    try:
        found = urlsplit(f"//{netloc}")
        return (found.hostname or "").rstrip(".").lower(), found.port or port
    except ValueError:
        return netloc.lower(), None


def _is_own(name: str, names: Collection[str]) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name == "localhost" or name.endswith(".localhost") or name in names
    return True


def guard_application(application: Any, names: Collection[str] = ()) -> None:
    """Make a Tornado application refuse requests to other names than its own, on all pages and web sockets.

    Args:
        application: The application of a Dask scheduler or worker. A second call changes nothing.
        names: Further names of the server, in lower case.
    """
    from tornado.web import RequestHandler

    if getattr(application, "guarded_by_terrashard", False):
        return

    class Refused(RequestHandler):
        def initialize(self, reason: str) -> None:
            self.reason = reason

        def prepare(self) -> None:
            self.set_status(403)
            self.set_header("Content-Type", "text/plain; charset=utf-8")
            self.finish(f"refused: {self.reason}\n")

    find = application.find_handler

    def find_guarded(request: Any, **more: Any) -> Any:
        reason = why_refused(request.headers.get("Host"), request.headers.get("Origin"), names)
        if reason is None:
            return find(request, **more)
        return application.get_handler_delegate(request, Refused, {"reason": reason})

    application.find_handler = find_guarded
    application.guarded_by_terrashard = True


class HostCheck:
    """An ASGI application that passes requests on only if they name this server.

    Args:
        application: The application that requests are passed to.
        names: Further names of the server, in lower case.
    """

    def __init__(self, application: Any, names: Collection[str] = ()) -> None:
        self._application = application
        self._names = frozenset(names)

    async def __call__(
        self,
        scope: MutableMapping[str, Any],
        receive: Callable[[], Awaitable[Any]],
        send: Callable[[MutableMapping[str, Any]], Awaitable[None]],
    ) -> None:
        headers = {name.lower(): value.decode("latin-1") for name, value in scope.get("headers", ())}
        reason = why_refused(headers.get(b"host"), headers.get(b"origin"), self._names)
        if reason is None or scope["type"] not in ("http", "websocket"):
            await self._application(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            kind = [(b"content-type", b"text/plain; charset=utf-8")]
            await send({"type": "http.response.start", "status": 403, "headers": kind})
            await send({"type": "http.response.body", "body": f"refused: {reason}\n".encode()})
