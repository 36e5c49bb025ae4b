"""Signing of hrefs right before they are opened. Plans, cubes and logs hold only unsigned hrefs.

Planetary Computer issues one token per storage container. A token stays in the memory of the worker that requested it
until shortly before it expires. Where a server refuses a token, a new one is requested once, as clocks differ.
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
"""Suffix of Azure's storage hosts; a token is never added to a URL of any other host."""
_MARGIN_S = 300.0
_SKEW_S = 60.0
"""Differences between clocks up to this many seconds are ignored."""
_MOST_BYTES = 1 << 16
"""Largest size of a token document; real ones have a few hundred bytes."""


@dataclass(frozen=True)
class SignRule:
    """The source of tokens for some storage hosts.

    Attributes:
        token_url: Address of the token service; the token of a container is at TOKEN_URL/ACCOUNT/CONTAINER.
        hosts: Storage hosts that get these tokens; a name that begins with a dot stands for all hosts below it.
        margin_s: Seconds before its expiry from which on a token is no longer used.
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
    """Add a token to an href, if its host needs one.

    Args:
        href: Unsigned URL.
        sign: Service whose rules apply beside `rules`.
        pool: Connections for the request of a token.
        renew: Request a new token even where a valid one is in memory.
        rules: Rules of the user's own providers.

    Raises:
        AccessError: The service gave no token.
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
    """Return whether a token may be sent to a host: encrypted, or within this machine."""
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
            f"no token for container {'/'.join(container[1:])} from {url} ({cause}); check the network, or leave "
            "out --sign if the files are public"
        ) from error
    # the expiry is in the server's time, and this machine's clock may differ
    return _Token(token, expiry - _clock_skew(reply.headers.get("Date"), url))


def _clock_skew(date: str | None, url: str) -> float:
    """Return the seconds by which the server's clock is ahead of this machine's; up to `_SKEW_S` counts as 0."""
    try:
        skew = parsedate_to_datetime(date or "").timestamp() - time.time()
    except ValueError:
        return 0.0
    if abs(skew) <= _SKEW_S:
        return 0.0
    log.warning("the clock of %s differs from this machine's by %.0f s; correct this machine's clock", url, skew)
    return skew
