"""`Documents`: reads JSON documents of a catalogue from disk or over HTTP, with limits on size, depth, time and trust.

A catalogue comes from outside: it may be cut off, huge, nested without end, an HTML login page, or may redirect a
credential to another host. Everything that is read from it passes through here.
"""

from __future__ import annotations

import json
import logging
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self, cast
from urllib.parse import urlsplit, urlunsplit
from urllib.request import getproxies, proxy_bypass

import requests
import urllib3
from requests.adapters import HTTPAdapter

from ingest.request.config import IngestConfig
from ingest.trust.answers import PackedError, TooLongError, read_answer, read_start, unpack
from ingest.trust.connections import PatientRetry, PrivatePeerError, bound_answers, check_peers
from ingest.trust.hrefs import (
    is_loopback,
    is_url,
    refuse_private_address,
    resolve_href,
    same_origin,
)
from ingest.trust.redact import redact_logs, redact_text, redact_url
from zarr_store.bounded import check_weight, read_file
from zarr_store.errors import AccessError, InvalidInput
from zarr_store.regular import check_regular

__all__ = ["MAX_JSON_BYTES", "Documents", "HttpStatusError", "parse_json"]

log = logging.getLogger(__name__)

MAX_JSON_BYTES = 64 * 2**20
"""Largest JSON document in bytes, about 4 000 Sentinel-2 items; use stac-geoparquet for more."""

MAX_JSON_MEMORY = 12 * MAX_JSON_BYTES
"""Largest memory of the objects of a document, in bytes; STAC items take about 7 bytes for each byte of text."""

MAX_DEPTH = 100
"""Largest number of nested levels of a document."""
_MAX_REDIRECTS = 5
_MAX_ERROR_BYTES = 4096
"""Number of bytes that are read of an answer with an error status."""
_GZIP = b"\x1f\x8b"
_RETRIED = (408, 425, 429, 500, 502, 503, 504)
"""HTTP statuses after which a request is sent again."""


class HttpStatusError(AccessError):
    """A server answered with an error status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class _Adapter(HTTPAdapter):
    """HTTP adapter that bounds the answers of a proxy, too."""

    def proxy_manager_for(self, proxy: str, **more: Any) -> Any:
        known = proxy in self.proxy_manager
        manager = super().proxy_manager_for(proxy, **more)
        return manager if known or proxy.lower().startswith("socks") else bound_answers(manager)


class Documents:
    """Reader of the JSON documents of one SOURCE.

    Credentials (userinfo in SOURCE, `headers`) are sent to SOURCE's own scheme, host and port and nowhere else.

    Attributes:
        source: SOURCE without userinfo.
        policy: Hosts and folders that hrefs may lead to.

    Args:
        source: SOURCE as the user typed it.
        config: Timeouts, retries and trust.
        headers: Extra request headers for SOURCE's origin, e.g. {"Authorization": "Bearer …"}.
    """

    def __init__(self, source: str, config: IngestConfig, headers: Mapping[str, str] | None = None) -> None:
        redact_logs()
        self._secret_headers = dict(headers or {})
        self.source, self._auth = _without_userinfo(source)
        if self._auth or self._secret_headers:
            _refuse_plain(self.source)
        self.policy = config.trust.href_policy(self.source)
        self._timeout = (min(config.running.timeout_s, 10.0), config.running.timeout_s)
        self._session = requests.Session()
        self._session.trust_env = False  # no .netrc: it could send a password to a host that only a link names
        self._session.verify = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("SSL_CERT_FILE") or True
        self._session.headers["Accept-Encoding"] = "gzip, deflate"  # these are unpacked here, within limits
        self._session.headers["Accept"] = "application/geo+json, application/json"
        retry = PatientRetry(
            total=config.running.retries,
            connect=min(1, config.running.retries),  # a closed port or unknown name is known at once
            backoff_factor=0.3,
            backoff_jitter=0.2,
            backoff_max=20,
            status_forcelist=_RETRIED,
            allowed_methods=frozenset({"GET", "POST"}),  # a search by POST changes nothing, so it may be repeated
            raise_on_status=False,
            respect_retry_after_header=True,
        )
        for scheme in ("http://", "https://"):
            adapter = _Adapter(max_retries=retry, pool_maxsize=8)
            check_peers(adapter.poolmanager, self.policy.allows_private)  # a proxy has its own manager
            self._session.mount(scheme, adapter)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._session.close()

    def read(self, location: str) -> Any:
        """Read the JSON document at a path or URL.

        Raises:
            InvalidInput: The document is absent, too large, cut off, or no JSON.
            AccessError: The server could not be reached, or refused.
        """
        if is_url(location):
            return self.request(location)
        path = Path(location)
        try:
            size = check_regular(path).st_size
            if size > MAX_JSON_BYTES:
                raise _too_large(location, size)
            data = read_file(path, MAX_JSON_BYTES)
        except OSError as error:
            raise InvalidInput(f"cannot read {location}: {error.strerror or error}; check the path") from error
        return parse_json(data, location)

    def request(
        self,
        url: str,
        *,
        method: str = "GET",
        parameters: Mapping[str, Any] | None = None,
    ) -> Any:
        """Send a request and read its JSON answer.

        Args:
            url: URL of the request.
            method: "GET" or "POST".
            parameters: Body of a POST, query of a GET.

        Raises:
            HttpStatusError: The server answered with an error status.
            InvalidInput: The answer is too large, cut off, or no JSON, or the URL may not be opened.
            AccessError: The server could not be reached.
        """
        shown = redact_url(url)
        for _ in range(_MAX_REDIRECTS):
            reply = self._send(url, method, parameters)
            with reply:
                if reply.is_redirect or reply.status_code in (301, 302, 303, 307, 308):
                    url = resolve_href(reply.headers.get("Location"), base=url, policy=self.policy)
                    if reply.status_code == 303:
                        method, parameters = "GET", None
                    continue
                if not 200 <= reply.status_code < 300:
                    raise HttpStatusError(_status_message(shown, reply, self._why(reply)), reply.status_code)
                data = self._body(reply, shown)
            return parse_json(data, shown)
        raise AccessError(f"{shown}: more than {_MAX_REDIRECTS} redirects; check the address")

    def _send(self, url: str, method: str, parameters: Mapping[str, Any] | None) -> requests.Response:
        if urlsplit(url).scheme not in ("http", "https"):
            raise InvalidInput(f"{redact_url(url)}: JSON documents are read from files, http and https only")
        refuse_private_address(url, self.policy)
        trusted = is_url(self.source) and same_origin(url, self.source)
        post = method == "POST"
        try:
            return self._session.request(
                method,
                url,
                params=None if post else dict(parameters or {}),
                json=dict(parameters or {}) if post else None,
                headers=self._secret_headers if trusted else {},
                auth=self._auth if trusted else None,
                proxies=_proxies(url),
                timeout=self._timeout,
                allow_redirects=False,
                stream=True,
            )
        except PrivatePeerError as refusal:
            raise InvalidInput(f"{redact_url(url)} refused: {refusal}") from refusal
        except (requests.RequestException, OSError) as error:
            raise _unreachable(url, error) from error

    def _body(self, reply: requests.Response, shown: str) -> bytes:
        try:
            data = read_answer(reply.raw, MAX_JSON_BYTES)
            return unpack(data, reply.headers.get("Content-Encoding"), MAX_JSON_BYTES)
        except TooLongError as error:
            raise _too_large(shown, None) from error
        except PackedError as error:
            raise InvalidInput(f"{shown}: {error}; at most {MAX_JSON_BYTES} bytes of JSON are read") from error
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise _unreachable(shown, error) from error

    def _why(self, reply: requests.Response) -> bytes:
        """Return the start of the answer to a failed request; empty if it breaks off or has an unknown packing."""
        try:
            data = read_start(reply.raw, _MAX_ERROR_BYTES)
            return unpack(data, reply.headers.get("Content-Encoding"), _MAX_ERROR_BYTES)
        except (urllib3.exceptions.HTTPError, OSError):
            return b""


def _proxies(url: str) -> dict[str, str]:
    """Return the environment's proxies for a URL; none for this machine or a host that NO_PROXY excludes."""
    host = (urlsplit(url).hostname or "").rstrip(".")
    return {} if is_loopback(host) or proxy_bypass(host) else getproxies()


def _unpacked(data: bytes, where: str) -> bytes:
    """Unpack a document that is stored as .gz, up to the largest size that may be read."""
    if not data.startswith(_GZIP):
        return data
    unpacking = zlib.decompressobj(wbits=31)
    try:
        text = unpacking.decompress(data, MAX_JSON_BYTES + 1)
    except zlib.error as error:
        raise InvalidInput(f"{where}: damaged gzip ({error}); fetch it again") from error
    if len(text) > MAX_JSON_BYTES:
        raise _too_large(where, None)
    if not unpacking.eof:
        raise InvalidInput(f"{where}: gzip is cut off after {len(data)} bytes; fetch it again")
    return text


def parse_json(data: bytes, where: str) -> Any:
    """Parse a document, which may be packed with gzip.

    A text with one STAC item per line (newline-delimited GeoJSON, RFC 8142 without its separators) becomes a
    FeatureCollection.

    Raises:
        InvalidInput: The document is too large as text or as objects, is not UTF-8 or not JSON (the message names the
            byte), holds NaN or Infinity, or is nested too deeply.
    """
    where = redact_url(where)
    data = _unpacked(data, where)
    check_weight(data, where, MAX_JSON_MEMORY)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{where}: not UTF-8 text at byte {error.start}; expected a JSON document") from error
    if text.lstrip()[:1] == "<":
        raise InvalidInput(f"{where}: expected JSON, got HTML or XML at byte 0; a login page, or the wrong address?")
    try:
        try:
            document = json.loads(text, parse_constant=_refuse_constant)
        except json.JSONDecodeError as error:
            document = _items_by_line(text, where) if error.msg == "Extra data" else None
            if document is None:
                raise
    except json.JSONDecodeError as error:
        byte = len(text[: error.pos].encode())
        ends = byte >= len(text.rstrip().encode()) - 1 or error.msg.startswith("Unterminated")
        cut = ends and error.msg != "Extra data"
        kind = "JSON is cut off" if cut else "not valid JSON"
        raise InvalidInput(f"{where}: {kind} at byte {byte} of {len(data)} ({error.msg}); fetch it again") from error
    except RecursionError as error:
        raise _too_deep(where) from error
    except _ConstantError as error:
        match = re.search(rf"[:\[,\s]({re.escape(str(error))})", text)
        byte = len(text[: match.start(1)].encode()) if match else 0
        raise InvalidInput(f"{where}: {error} at byte {byte} is not valid JSON; the writer must use null") from error
    level, depth = [document], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise _too_deep(where)
        level = (
            [
                child
                for node in level
                for child in (node.values() if isinstance(node, dict) else node)
                if isinstance(child, dict | list)
            ]
            if isinstance(level[0], dict | list)
            else []
        )
    return document


def _items_by_line(text: str, where: str) -> dict[str, Any] | None:
    """Return a FeatureCollection of one item per line; None if the first line is not a feature."""
    features: list[Any] = []
    for number, line in enumerate(_lines(text), 1):
        if not line.strip():
            continue
        try:
            feature = json.loads(line, parse_constant=_refuse_constant)
        except json.JSONDecodeError as error:
            if not features:
                return None
            raise InvalidInput(
                f"{where}: line {number} is cut off or not valid JSON at character {error.pos} ({error.msg}); expected "
                "a STAC item on each line, fetch it again"
            ) from error
        if not features and not (isinstance(feature, dict) and feature.get("type") == "Feature"):
            return None
        features.append(feature)
    return {"type": "FeatureCollection", "features": features}


def _lines(text: str) -> Iterator[str]:
    """Yield one line after the other; a list of all lines could be many times larger than the text."""
    start = 0
    while start <= len(text):
        end = text.find("\n", start)
        end = len(text) if end < 0 else end
        yield text[start:end]
        start = end + 1


class _ConstantError(Exception):
    """A constant that JSON does not have: NaN or Infinity."""


def _refuse_constant(name: str) -> None:
    raise _ConstantError(name)


def _too_deep(where: str) -> InvalidInput:
    return InvalidInput(f"{where}: nested more than {MAX_DEPTH} levels deep; no STAC document is, so it is refused")


def _too_large(where: str, size: int | None) -> InvalidInput:
    came = f"{size} bytes" if size else "more"
    return InvalidInput(
        f"{redact_url(where)}: at most {MAX_JSON_BYTES} bytes of JSON are read, got {came}; "
        "narrow the search or use stac-geoparquet"
    )


def _unreachable(url: str, error: Exception) -> AccessError:
    inner: BaseException = error
    while inner.__cause__ is not None or inner.__context__ is not None:
        inner = cast("BaseException", inner.__cause__ or inner.__context__)
    if isinstance(error, requests.Timeout) or isinstance(inner, TimeoutError):
        cause = "no answer in time"
    else:
        cause = redact_text(getattr(inner, "strerror", None) or inner)
    return AccessError(f"cannot reach {redact_url(url)}: {cause}; check the address and the network, then try again")


def _status_message(shown: str, reply: requests.Response, data: bytes) -> str:
    status = reply.status_code
    detail = " ".join(redact_text(data[:400].decode("utf-8", "replace")).split())[:200]
    hint = {
        401: "it wants credentials",
        403: "it refuses access; credentials or rights are missing",
        404: "nothing is there; check the address",
        429: "it is overloaded or limits the rate; try again later",
    }.get(status, "the server failed; try again later" if status >= 500 else "it refuses the request")
    return f"{shown}: HTTP {status}, {hint}" + (f" ({detail})" if detail and not detail.startswith("<") else "")


def _refuse_plain(source: str) -> None:
    """Refuse to send credentials over http, where others can read them.

    Raises:
        InvalidInput: SOURCE is an http address of another machine.
    """
    parts = urlsplit(source)
    if parts.scheme.lower() == "http" and not is_loopback(parts.hostname or ""):
        raise InvalidInput(
            f"{redact_url(source)}: credentials are not sent over http, where others can read them; give the "
            "https address"
        )


def _without_userinfo(source: str) -> tuple[str, tuple[str, str] | None]:
    if not is_url(source) or "@" not in urlsplit(source).netloc:
        return source, None
    parts = urlsplit(source)
    auth = (parts.username or "", parts.password or "")
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])), auth
