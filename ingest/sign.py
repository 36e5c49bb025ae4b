"""Signing hrefs right before they are opened. Plans, cubes and logs only ever hold unsigned hrefs.

Planetary Computer hands out a token per storage container. Tokens are kept in memory of the worker that asked, until
shortly before they expire, and are asked anew once when a server refuses one: clocks differ.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from datetime import datetime
from typing import Literal
from urllib.parse import urlsplit

import urllib3

from zarr_store.errors import AccessError

__all__ = ["Signing", "signed"]

Signing = Literal["planetary-computer", "none"]

TOKEN_URL = "https://planetarycomputer.microsoft.com/api/sas/v1/token"
STORAGE_HOSTS = ".blob.core.windows.net"
"""A token is bound to its storage host and is never added to any other URL."""
_MARGIN_S = 300.0


@dataclass(frozen=True)
class _Token:
    query: str
    until: float


_tokens: dict[tuple[str, str], _Token] = {}
_lock = threading.Lock()


def signed(href: str, sign: Signing, pool: urllib3.PoolManager, *, renew: bool = False) -> str:
    """`href` with a token, if it needs one.

    Args:
        href: Unsigned URL.
        sign: Whose rules.
        pool: Makes the request for a token.
        renew: Ask for a new token even where one is at hand.

    Raises:
        AccessError: No token was given.
    """
    parts = urlsplit(href)
    if sign != "planetary-computer" or not (parts.hostname or "").endswith(STORAGE_HOSTS) or "sig=" in parts.query:
        return href
    container = (parts.netloc.partition(".")[0], parts.path.lstrip("/").partition("/")[0])
    with _lock:
        token = _tokens.get(container)
        if renew or token is None or token.until < time.time() + _MARGIN_S:
            token = _tokens[container] = _ask(container, pool)
    return f"{href}{'&' if parts.query else '?'}{token.query}"


def _ask(container: tuple[str, str], pool: urllib3.PoolManager) -> _Token:
    url = f"{TOKEN_URL}/{container[0]}/{container[1]}"
    try:
        reply = pool.request("GET", url, redirect=False)
        document = reply.json() if reply.status == 200 else {}
        token, expiry = str(document["token"]), datetime.fromisoformat(str(document["msft:expiry"])).timestamp()
    except (urllib3.exceptions.HTTPError, ValueError, KeyError, TypeError) as error:
        cause = f"HTTP {reply.status}" if isinstance(error, KeyError) else type(error).__name__
        raise AccessError(
            f"no token for container {'/'.join(container)} from {url} ({cause}); check the network, or drop --sign "
            "if the files are public"
        ) from error
    return _Token(token, expiry)
