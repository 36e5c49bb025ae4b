"""Signing hrefs right before they are opened. Plans, cubes and logs only ever hold unsigned hrefs.

Planetary Computer hands out a token per storage container. Tokens are kept in memory of the worker that asked, until
shortly before they expire, and are asked anew once when a server refuses one: clocks differ.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Literal
from urllib.parse import urlsplit

import urllib3

from ingest.trust.answers import read_answer
from ingest.trust.hrefs import is_loopback
from zarr_store.bounded import load_json
from zarr_store.errors import AccessError

__all__ = ["SignRule", "Signing", "signed"]

log = logging.getLogger(__name__)

Signing = Literal["planetary-computer", "none"]

TOKEN_URL = "https://planetarycomputer.microsoft.com/api/sas/v1/token"
STORAGE_HOSTS = ".blob.core.windows.net"
"""A token is bound to its storage host and is never added to any other URL."""
_MARGIN_S = 300.0
_SKEW_S = 60.0
_MOST_BYTES = 1 << 16
"""Of a token document, which has a few hundred."""


@dataclass(frozen=True)
class SignRule:
    """Where the tokens of some storage hosts come from.

    Attributes:
        token_url: A token document is at TOKEN_URL/ACCOUNT/CONTAINER.
        hosts: Storage hosts; a name that begins with a dot stands for all below it. No other host gets a token.
        margin_s: A token is not used this shortly before it expires.
    """

    token_url: str
    hosts: tuple[str, ...]
    margin_s: float = _MARGIN_S


@dataclass(frozen=True)
class _Token:
    query: str
    until: float


_tokens: dict[tuple[str, str, str], _Token] = {}
_lock = threading.Lock()


def signed(
    href: str, sign: Signing, pool: urllib3.PoolManager, *, renew: bool = False, rules: Sequence[SignRule] = ()
) -> str:
    """`href` with a token, if it needs one.

    Args:
        href: Unsigned URL.
        sign: Whose rules.
        pool: Makes the request for a token.
        renew: Ask for a new token even where one is at hand.
        rules: Further ones, of the user's own providers.

    Raises:
        AccessError: No token was given.
    """
    parts = urlsplit(href)
    rule = _rule_for((parts.hostname or "").lower(), sign, rules)
    if rule is None or not _is_safe(parts.scheme, parts.hostname or "") or "sig=" in parts.query:
        return href
    container = (rule.token_url, parts.netloc.partition(".")[0], parts.path.lstrip("/").partition("/")[0])
    with _lock:
        token = _tokens.get(container)
        if renew or token is None or token.until < time.time() + rule.margin_s:
            token = _tokens[container] = _ask(container, pool)
    return f"{href}{'&' if parts.query else '?'}{token.query}"


def _is_safe(scheme: str, host: str) -> bool:
    """Whether a token may travel there: encrypted, or not beyond this machine."""
    return scheme == "https" or (scheme == "http" and is_loopback(host))


def _rule_for(host: str, sign: Signing, rules: Sequence[SignRule]) -> SignRule | None:
    known = [*rules, SignRule(TOKEN_URL, (STORAGE_HOSTS,))] if sign == "planetary-computer" else rules
    return next(
        (r for r in known if any(host == name or (name[:1] == "." and host.endswith(name)) for name in r.hosts)), None
    )


def _ask(container: tuple[str, str, str], pool: urllib3.PoolManager) -> _Token:
    url = "/".join((container[0].rstrip("/"), *container[1:]))
    reply = None
    try:
        reply = pool.request("GET", url, redirect=False, preload_content=False)
        try:
            document = load_json(read_answer(reply, _MOST_BYTES), url, most=_MOST_BYTES) if reply.status == 200 else {}
        finally:
            reply.close()
        token, expiry = str(document["token"]), datetime.fromisoformat(str(document["msft:expiry"])).timestamp()
    except (urllib3.exceptions.HTTPError, ValueError, KeyError, TypeError) as error:
        cause = f"HTTP {reply.status}" if reply is not None and isinstance(error, KeyError) else type(error).__name__
        raise AccessError(
            f"no token for container {'/'.join(container[1:])} from {url} ({cause}); check the network, or drop --sign "
            "if the files are public"
        ) from error
    # the expiry is told in the server's time, and this machine's clock may be another
    return _Token(token, expiry - _clock_skew(reply.headers.get("Date"), url))


def _clock_skew(date: str | None, url: str) -> float:
    """Seconds by which the server's clock is ahead of this one; small differences count as none."""
    try:
        skew = parsedate_to_datetime(date or "").timestamp() - time.time()
    except ValueError:
        return 0.0
    if abs(skew) <= _SKEW_S:
        return 0.0
    log.warning("the clock of %s differs from this machine's by %.0f s; set this machine's clock", url, skew)
    return skew
