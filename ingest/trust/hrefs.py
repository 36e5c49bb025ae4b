"""The rules for hrefs: `resolve_href` turns an href into an absolute URL or path, or refuses it, before it is opened.

A catalogue is untrusted data: an href in it may name a local file, another driver of GDAL, a machine of the private
network, or credentials.

Allowed are https, http and s3 on SOURCE's own host, on the provider's hosts and on those of `--allow-host`; and local
files below the catalogue's own folder and below `--allow-local`. Refused are `/vsi…`, `driver:` syntax, XML, `file:`
and `data:` URLs, UNC paths, user names in URLs, unusual spellings of IP addresses, and private addresses that the user
did not allow.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Self
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit, urlunsplit

from ingest.trust.redact import redact_url
from zarr_store.errors import AccessError, InvalidInput

__all__ = [
    "HrefPolicy",
    "is_loopback",
    "is_private_address",
    "is_spelled_address",
    "is_url",
    "refuse_private_address",
    "resolve_href",
    "same_origin",
]

_SCHEMES = ("http", "https", "s3")
_MAX_HREF = 4096
"""Longest href that is accepted, characters."""
_PORTS = {"http": 80, "https": 443}
_IN_LAST_BITS = tuple(
    ipaddress.IPv6Network(text) for text in ("64:ff9b::/96", "64:ff9b:1::/48", "::/96", "::ffff:0:0:0/96")
)
"""Networks whose last 32 bits are an IPv4 address: RFC 6052, 8215, 4291 and 2765."""


@dataclass(frozen=True)
class HrefPolicy:
    """The hosts and folders that may be opened for one SOURCE.

    Attributes:
        source_host: Host of SOURCE in lower case; None where SOURCE is local.
        source_root: Folder of SOURCE; None where SOURCE is a URL.
        hosts: Further host names, "*.suffix" patterns, and names of S3 buckets.
        roots: Further local folders.
        allow_private: Whether hrefs may name private, loopback and link-local addresses.
    """

    source_host: str | None = None
    source_root: Path | None = None
    hosts: frozenset[str] = frozenset()
    roots: tuple[Path, ...] = ()
    allow_private: bool = False

    @classmethod
    def around(
        cls, source: str, *, hosts: Iterable[str] = (), roots: Iterable[str] = (), allow_private: bool = False
    ) -> Self:
        """Make the policy for `source` as the user gave it.

        Args:
            source: URL or path, whose host or folder is allowed. An empty text allows only the other arguments.
            hosts: Further host names, which may be typed as URLs.
            roots: Further local folders; ~ is the home folder.
            allow_private: Whether hrefs may name private addresses.
        """
        names = frozenset(_host_name(name) for name in hosts)
        folders = tuple(Path(root).expanduser().resolve() for root in roots)
        if is_url(source):
            parts = urlsplit(source)
            host = parts.netloc.lower() if parts.scheme == "s3" else (parts.hostname or "").lower()
            return cls(host, None, names, folders, allow_private)
        if not source:
            return cls(None, None, names, folders, allow_private)
        path = Path(source).expanduser().resolve()
        return cls(None, path if path.is_dir() else path.parent, names, folders, allow_private)

    def allows_host(self, host: str) -> bool:
        """Return whether `host` is SOURCE's own, is one of `hosts`, or matches a "*.suffix" among them."""
        if host == self.source_host or host in self.hosts:
            return True
        return any(name.startswith("*.") and host.endswith(name[1:]) for name in self.hosts)

    def allows_private(self, host: str) -> bool:
        """Return whether a private host is allowed: by option, as SOURCE's own, or as loopback if SOURCE is too."""
        if self.allow_private or host == self.source_host:
            return True
        return bool(self.source_host) and is_loopback(self.source_host or "") and is_loopback(host)


def resolve_href(href: object, *, base: str, policy: HrefPolicy, resolved: bool = False) -> str:
    """Resolve an href to an absolute URL or local path, or refuse it.

    A percent escape in the href of a local file means what it means to a web server that hands out the same folder:
    the file `a b.tif` for `a%20b.tif`. A file that has the escape in its name is found too, where there is no other.

    Args:
        href: The href as the catalogue has it.
        base: URL or path of the document that holds the href.
        policy: The hosts and folders that are allowed.
        resolved: Whether the href comes from a plan, so that a local path is taken letter for letter.

    Raises:
        InvalidInput: The href is malformed or not allowed; the message never shows its query or userinfo.
    """
    text = _checked_text(href)
    if is_url(text):
        return _checked_url(text, policy)
    if text.lower().startswith("/vsi"):
        raise _refused(text, "a /vsi path makes GDAL read other files and hosts")
    if re.match(r"[A-Za-z][A-Za-z0-9_+.\-]*:", text):
        raise _refused(text, "it names a driver or a scheme other than https, http or s3")
    if text.startswith("//"):
        raise _refused(text, "it names a host without a scheme")
    if is_url(base):
        if text.startswith("/") and base.startswith("s3://"):
            raise _refused(text, "an absolute path has no meaning in a bucket")
        if base.startswith("s3://"):  # urljoin does not know the scheme
            # a key of a bucket has no escapes, so those of the href are undone, as a web server does it
            joined = "s3" + _unescaped(urljoin("https" + _escaped(base[2:]), _escaped(_unescaped(text))))[5:]
        else:
            joined = urljoin(base, text)
        return _checked_url(joined, policy)
    return _checked_path(text, base, policy, resolved)


def _checked_text(href: object) -> str:
    if not isinstance(href, str) or not href.strip():
        raise InvalidInput(f"expected an href, got {href!r}; the catalogue is broken: leave the item out")
    if len(href) > _MAX_HREF:
        raise InvalidInput(f"href of {len(href)} characters refused (at most {_MAX_HREF}): {redact_url(href[:80])}…")
    if any(ord(char) < 32 or ord(char) == 127 or char in "\u202e\u202d\u2066\u2067\u2068" for char in href):
        raise _refused(href, "it holds control characters")
    if href != href.strip() or "\\" in href:
        raise _refused(href, "it holds a backslash or surrounding blanks")
    if href.lstrip().startswith(("<", "{")):
        raise _refused("(inline document)", "it is a document instead of an address")
    return href


def _checked_url(url: str, policy: HrefPolicy) -> str:
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").rstrip(".").lower(), parts.port
    except ValueError as error:
        raise _refused(url, f"it is not a valid URL ({error})") from error
    if parts.scheme.lower() not in _SCHEMES:
        raise _refused(url, "only https, http and s3 are opened")
    if "@" in parts.netloc:
        raise _refused(url, "it contains a user name or password")
    if not host or re.search(r"[^\w.:-]", host.partition("%")[0]) or (parts.scheme == "s3" and port):
        raise _refused(url, "it names no host")
    if re.search(r"%2e%2e|%00|%5c", url, re.IGNORECASE) or ".." in parts.path.split("/"):
        raise _refused(url, "it leaves its folder through `..`, or hides such a step")
    address = _address(host)
    if address is None and _looks_numeric(host):
        raise _refused(url, "it spells an IP address in an unusual way")
    if address is not None and parts.scheme == "s3":
        raise _refused(url, "an IP address cannot be the name of a bucket")
    private = (address is not None and is_private_address(host)) or host == "localhost" or host.endswith(".localhost")
    if private and not policy.allows_private(host):
        raise _refused(url, "private, loopback and link-local addresses need --allow-private-hosts")
    if not policy.allows_host(host) and not (private and policy.allows_private(host)):
        raise _refused(
            url, f"its host is neither SOURCE's own nor the provider's; if you trust it, add --allow-host {host}"
        )
    netloc = f"[{host}]" if ":" in host else host
    netloc += f":{port}" if port and port != _PORTS.get(parts.scheme.lower()) else ""
    return urlunsplit(SplitResult(parts.scheme.lower(), netloc, parts.path, parts.query, ""))


def _checked_path(text: str, base: str, policy: HrefPolicy, resolved: bool) -> str:
    if "://" in unquote(text) or "/vsi" in unquote(text).lower():
        raise _refused(text, "it hides a URL or a /vsi path")
    folder = Path(base) if Path(base).is_dir() else Path(base).parent
    roots = [*([policy.source_root] if policy.source_root else []), *policy.roots]
    names = [text]
    if not resolved:
        plain = re.split(r"[?#]", text, maxsplit=1)[0]
        names = [_unescaped(text), text, *([_unescaped(plain), plain] if plain else [])]
    # links are followed first, so that no link leads out of the folder
    paths = [(folder / name).resolve() for name in dict.fromkeys(names)]
    allowed = [path for path in paths if any(path.is_relative_to(root) for root in roots)]
    if paths[0] not in allowed:  # what a web server would be asked for
        raise _refused(
            text, "it lies outside the catalogue's own folder; if you trust its folder, add --allow-local FOLDER"
        )
    return str(next((path for path in allowed if path.exists()), allowed[0]))


def _unescaped(text: str) -> str:
    """Undo percent escapes; a text stays as it is where a "%" begins none, or where an escape hides a control."""
    if re.search(r"%(?![0-9A-Fa-f]{2})", text):
        return text
    try:
        plain = unquote(text, errors="strict")
    except UnicodeDecodeError:
        return text
    return text if any(ord(char) < 32 or ord(char) == 127 or char == "\\" for char in plain) else plain


def _escaped(text: str) -> str:
    return quote(text, safe="/:?=&+,;@!$'()*~")


def _refused(href: str, why: str) -> InvalidInput:
    return InvalidInput(f"href {redact_url(href)!r} refused: {why}")


def is_url(text: str) -> bool:
    """Return whether `text` has the form SCHEME://…."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.\-]*://", text) is not None


def same_origin(left: str, right: str) -> bool:
    """Return whether two URLs share scheme, host and port; credentials are sent only to the same origin."""
    a, b = urlsplit(left), urlsplit(right)
    return (a.scheme.lower(), (a.hostname or "").lower(), a.port or _PORTS.get(a.scheme.lower())) == (
        b.scheme.lower(),
        (b.hostname or "").lower(),
        b.port or _PORTS.get(b.scheme.lower()),
    )


def refuse_private_address(url: str, policy: HrefPolicy) -> None:
    """Refuse a URL whose host name resolves to a private address that is not allowed.

    It is called right before the first request to a host, as `resolve_href` asks no name server.

    Raises:
        InvalidInput: The name resolves to a private address.
        AccessError: The name does not resolve.
    """
    parts = urlsplit(url)
    host = (parts.hostname or "").lower()
    if parts.scheme not in ("http", "https") or policy.allows_private(host):
        return
    for address in _lookup(host):
        if is_private_address(address):
            raise _refused(
                url, f"its host resolves to the private address {address}; --allow-private-hosts permits that"
            )


def is_private_address(address: str) -> bool:
    """Return whether an IP address is outside the public internet; an IPv4 address inside IPv6 counts as itself.

    >>> [is_private_address(a) for a in ("8.8.8.8", "10.0.0.1", "::ffff:127.0.0.1", "169.254.169.254")]
    [False, True, True, True]
    >>> [is_private_address(a) for a in ("64:ff9b::8.8.8.8", "64:ff9b::10.0.0.1", "2002:a00:1::", "fec0::1")]
    [False, True, True, True]
    """
    found = _address(address)
    return found is None or not found.is_global or found.is_multicast or getattr(found, "is_site_local", False)


def is_spelled_address(host: str) -> bool:
    """Return whether a host is an IP address or localhost, so that no name server is asked for it."""
    return _address(host) is not None or host == "localhost" or host.endswith(".localhost")


@lru_cache(maxsize=256)
def _lookup(host: str) -> tuple[str, ...]:
    try:
        entries = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise AccessError(
            f"host {host} was not found: {error.strerror or error}; check the name and the network"
        ) from error
    return tuple(sorted({str(entry[4][0]).partition("%")[0] for entry in entries}))


def _host_name(name: str) -> str:
    """Return the host or bucket that a value of --allow-host names; the value may be a URL."""
    text = name.strip().lower()
    return (urlsplit(text).hostname or urlsplit(text).netloc) if is_url(text) else text.split("/")[0].rsplit(":", 1)[0]


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None
    return _inner_address(address) if isinstance(address, ipaddress.IPv6Address) else address


def _inner_address(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Return the IPv4 address at which a packet to an IPv6 address arrives: mapped, NAT64, 6to4, or early drafts."""
    if address.ipv4_mapped or address.sixtofour:
        return address.ipv4_mapped or address.sixtofour or address
    if any(address in network for network in _IN_LAST_BITS) and int(address) > 1:  # ::1 is IPv6's own
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address


def _looks_numeric(host: str) -> bool:
    """Return whether the C library takes a host for an address that `ipaddress` refuses: 2130706433, 127.1 …."""
    return all(re.fullmatch(r"(0x[0-9a-f]*|\d+)", part) for part in host.split("."))


def is_loopback(host: str) -> bool:
    """Return whether a host is spelled as this machine itself: localhost, 127.… or ::1.

    >>> is_loopback("127.0.0.1"), is_loopback("[::1]"), is_loopback("0.0.0.0"), is_loopback("node7")
    (True, True, False, False)
    """
    address = _address(host.strip("[]"))
    return host == "localhost" or (address is not None and address.is_loopback)
