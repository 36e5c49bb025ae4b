"""Remove secrets from text: the one redactor of everything that is printed, logged, stored or shown on a page.

There are four functions. `redact_text` takes any text (an error of a library, a log line, the body of an answer) and
returns it without what could be a credential. `redact_url` takes one URL or path and returns it without userinfo, query
and fragment. `redact_value` applies the rules for text to JSON values, and `strip_signature` keeps the part of a query
that is not a credential, for addresses that are opened again.

Too much may be hidden, never too little: a word beside "token:" is hidden although it may be harmless. What has no
mark at all (a bare key without a name beside it) is known only where the environment holds it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from functools import lru_cache
from typing import Any
from urllib.parse import unquote_plus

__all__ = ["HIDDEN", "redact_text", "redact_url", "redact_value", "strip_signature"]

HIDDEN = "…"
"""Text that replaces a secret."""

_MOST_SHOWN = 300
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]{0,30}://")
_ENCODED = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]{0,30}%(?:25)*3A(?:%(?:25)*2F){2})([^\s'\"<>]*)", re.IGNORECASE)
_ENCODED_AT = re.compile(r".*(?:@|%(?:25)*40)", re.IGNORECASE)
_ENCODED_QUERY = re.compile(r"(?:[?#]|%(?:25)*3F|%(?:25)*23).*", re.IGNORECASE)
_RUN = re.compile(r"\S{0,8192}")
_ENDS = re.compile(r"['\"<>`\\]")
_MARK = re.compile(r"[?#]")
_CLOSING = re.compile(r"[)\]}.,;:!]+$")
_QUERY = re.compile(r"\?[^\s'\"<>`]+")
_PEM = re.compile(r"-----BEGIN [A-Z ]{0,40}KEY-----.{0,20000}?(?:-----END [A-Z ]{0,40}KEY-----|\Z)", re.DOTALL)

_LONG_NAMES = (
    "token|secret|password|passwd|passphrase|credentials?|hmac|"
    "(?:access|secret|client|private|account|shared|subscription|api|signing|encryption|auth|session|storage|sas)"
    "[-_ ]?(?:access[-_]?)?(?:key|secret|token|signature)(?:[-_]?id)?|"
    "shared[-_]?access[-_]?signature|google[-_]?access[-_]?id|key[-_]pair[-_]id|signature|signature[-_]?provided|"
    "string[-_]?to[-_]?sign|x-(?:amz|goog)-[a-z0-9\\-]{1,40}"
)
_SHORT_NAMES = "sig|sas|pwd|pass|jwt|auth"
# a longer name may end in a long one (AWS_SECRET_ACCESS_KEY); a short one stands alone (design is no sig)
_NAME = rf"(?:(?:{_LONG_NAMES})|(?<![A-Za-z])(?:{_SHORT_NAMES}))(?![A-Za-z])"
_PAIR = re.compile(
    rf"(?P<name>{_NAME})"
    r"(?P<between>\\*['\"]?[ \t]{0,8}(?:=>|[:=])(?:\s|\\{1,8}[nrt]){0,8}|\\*['\"][ \t]{0,8},\s{0,8}(?=b?\\*['\"]))"
    r"(?P<bytes>b(?=\\*['\"]))?"
    r"(?P<value>(?P<quote>\\*['\"])(?:\\.|[^\\]){0,8192}?(?P=quote)|\\*['\"]?[^\s'\"<>]+|\\*['\"])",
    re.IGNORECASE | re.DOTALL,
)
_HEADER = re.compile(
    r"(?P<name>(?<![A-Za-z])(?:(?:proxy-)?authorization|(?:set-)?cookie)[ \t]{0,8}[:=][ \t]{0,8})"
    r"(?!['\"\\])[^\r\n'\"]+",
    re.IGNORECASE,
)
_QUOTED_HEADER = re.compile(
    r"(?P<name>(?<![A-Za-z])(?:(?:proxy-)?authorization|(?:set-)?cookie)\\*['\"]?[ \t]{0,8}(?:=>|[:=,])\s{0,8}b?)"
    r"(?P<quote>\\*['\"])(?:\\.|[^\\]){0,8192}?(?P=quote)",
    re.IGNORECASE | re.DOTALL,
)
_ELEMENT = re.compile(rf"(<[\w:]{{0,40}}?{_NAME}[^<>]{{0,80}}>)[^<]+", re.IGNORECASE)
_BARE = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"eyJ[A-Za-z0-9_\-]{4,8192}\.[A-Za-z0-9_\-=+/.~%]{2,8192}"  # a JSON web token
    r"|(?:AKIA|ASIA|AROA)[0-9A-Z]{12,32}|GOOG[0-9A-Z]{16,80}"  # access keys of Amazon and Google
    r"|gh[pousr]_[A-Za-z0-9]{20,255}"
    r")"
)
_SCHEMED = re.compile(
    r"(?<![A-Za-z])(Bearer|Basic)(\s{1,4})(?=[A-Za-z]{0,64}[\d._\-=+/~%]|[a-z]{0,64}[A-Z]|\S{24})[^\s'\"<>]+"
)
_ENVIRONMENT = re.compile(rf"(?:.*_)?(?:{_NAME})|.*_(?:PAT|KEY)", re.IGNORECASE)
_LEAST_SECRET = 6
"""Smallest length of a secret from the environment that is hidden; hiding every "x" would hide the message."""
_NO_SECRETS = ("None", "null", "True", "False", "true", "false", HIDDEN)

# Query keys that carry a credential by themselves: SigV4 and the usual names of signatures and tokens.
_SECRET_KEYS = re.compile(
    r"(sig|signature|hmac|auth|jwt|hdnea|hdntl|hdnts|awsaccesskeyid|googleaccessid|key-pair-id|x-(amz|goog)-.*|"
    r".*(token|secret|password|credential|api[-_]?key|access[-_]?key|subscription[-_]?key).*)",
    re.IGNORECASE,
)
# Short names that belong to a signature only beside it: alone they are a service's own (`sr` may be a resolution).
_AZURE_KEYS = frozenset(
    ("se", "sp", "sv", "sr", "st", "ske", "skoid", "sks", "skt", "sktid", "skv", "spr", "si", "sip", "srt", "ss",
     "saoid", "suoid", "scid", "sdd", "ses")
)  # fmt: skip
_AZURE_RESOURCE = re.compile(r"[a-z]{0,2}")
"""Values of `sr` in a signature of Azure: b, c, d, f, bs, bv."""
_LIFE_KEYS = frozenset({"exp", "expires", "policy"})
_MOMENT = re.compile(r"\d{9,}|\d{4}-?\d{2}-?\d{2}.*")
"""A time as seconds or as a date, which an expiry is."""


def redact_text(message: object) -> str:
    """Return `message` without queries and userinfo of URLs, values of secret names, keys and tokens.

    Args:
        message: Text, or anything whose `str` is shown.

    >>> redact_text("GET https://u:p@host/a?sig=1 failed with url: /a?sig=1")
    'GET https://host/a failed with url: /a'
    >>> redact_text('{"token": "abc", "hint": "ask again"} (Authorization: Bearer a.b)')
    '{"token": "…", "hint": "ask again"} (Authorization: …'
    """
    text = str(message)
    for value in _environment():
        text = text.replace(value, HIDDEN)
    text = _PEM.sub(HIDDEN, text)
    # plain addresses first: the encoded one may be the password of a plain one, and would take its "@" away
    text = _clean_queries(_ENCODED.sub(_clean_encoded, _clean_urls(text)))
    text = _QUOTED_HEADER.sub(lambda f: f["name"] + f["quote"] + HIDDEN + f["quote"], text)
    text = _HEADER.sub(lambda f: f["name"] + HIDDEN, text)
    text = _PAIR.sub(_clean_pair, text)
    text = _ELEMENT.sub(lambda f: f[1] + HIDDEN, text)
    text = _SCHEMED.sub(rf"\1\2{HIDDEN}", text)
    return _BARE.sub(HIDDEN, text)


def redact_url(text: str) -> str:
    """Return a URL or path without userinfo, query and fragment, cut to 300 characters.

    >>> redact_url("https://me:secret@host/a.tif?sig=abc")
    'https://host/a.tif'
    """
    found = _SCHEME.match(text)
    if not found:
        return re.split(r"[?#]", text, maxsplit=1)[0][:_MOST_SHOWN]
    rest = text[found.end() :]
    return (found[0] + re.split(r"[?#]", rest[_userinfo(rest) :], maxsplit=1)[0])[:_MOST_SHOWN]


def redact_value(value: Any) -> Any:
    """Return a JSON value whose texts hold no secrets; numbers, order and keys stay.

    A text that is one URL keeps the parameters that are not credentials, as it may be opened again.

    >>> redact_value({"href": "https://h/a?layer=2&sig=x", "token": "abc", "n": [1, "password=x"]})
    {'href': 'https://h/a?layer=2', 'token': '…', 'n': [1, 'password=…']}
    """
    if isinstance(value, str):
        found = _SCHEME.match(value)
        if found and not re.search(r"\s", value):
            rest = value[found.end() :]
            return strip_signature(found[0] + rest[_userinfo(rest) :].partition("#")[0])
        return redact_text(value)
    if isinstance(value, Mapping):
        return {
            key: HIDDEN if isinstance(item, str) and item and _is_secret_name(key) else redact_value(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [redact_value(item) for item in value]
    return value


def strip_signature(url: str) -> str:
    """Return `url` without the query parameters that sign it; all others stay as they are, byte for byte.

    Which names sign depends on what stands beside them: `sr`, `exp` and the like are a service's own words in a query
    that holds no signature.

    >>> strip_signature("https://host/a.tif?layer=2&sig=abc&se=2024")
    'https://host/a.tif?layer=2'
    >>> strip_signature("https://host/get?band=B02&sr=2&name=a%20b+c")
    'https://host/get?band=B02&sr=2&name=a%20b+c'
    """
    if "?" not in url or not _SCHEME.match(url):
        return url
    address, _, rest = url.partition("?")
    query, mark, fragment = rest.partition("#")
    parts = query.split("&")
    pairs = [(unquote_plus(key).lower(), value) for key, _, value in (part.partition("=") for part in parts)]
    keys = {key for key, _ in pairs}
    kept = [part for part, (key, value) in zip(parts, pairs, strict=True) if not _signs(key, value, keys)]
    if len(kept) == len(parts):
        return url
    return address + ("?" if kept else "") + "&".join(kept) + mark + fragment


def _signs(key: str, value: str, keys: AbstractSet[str]) -> bool:
    """Return whether a parameter of a query with these keys (in lower case) is part of a signature."""
    if _SECRET_KEYS.fullmatch(key):
        return True
    if key in _AZURE_KEYS and "sig" in keys and not keys.isdisjoint({"se", "si", "sv"}):
        return key != "sr" or _AZURE_RESOURCE.fullmatch(value) is not None
    if key in _LIFE_KEYS and any(_SECRET_KEYS.fullmatch(other) for other in keys):
        named = not keys.isdisjoint({"awsaccesskeyid", "googleaccessid", "key-pair-id"})
        return named or _MOMENT.fullmatch(value) is not None
    return False


def _is_secret_name(key: object) -> bool:
    return isinstance(key, str) and re.fullmatch(rf"(?:.*[-_ ])?{_NAME}", key, re.IGNORECASE) is not None


def _environment() -> list[str]:
    """Return the values of secret names in the environment, the longest first; every line of a log asks for them."""
    values = {os.environ.get(name, "") for name in os.environ if _is_secret_variable(name)}
    found = (value for value in values if len(value) >= _LEAST_SECRET and not os.path.isabs(value))
    return sorted(found, key=len, reverse=True)


@lru_cache(maxsize=1024)
def _is_secret_variable(name: str) -> bool:
    return _ENVIRONMENT.fullmatch(name) is not None


def _userinfo(rest: str) -> int:
    """Return where the host begins in the text after "scheme://": behind the userinfo, also one with odd characters."""
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    at = authority.rfind("@")
    end = _ENDS.search(authority)
    name = re.split(r"['\"<>`\\@]", authority, maxsplit=1)[0]
    colon = name.find(":")
    # "https://host:80" is no user with a password; "https://me:pa/ss@host" is one who did not encode it
    password = colon > 0 and not re.fullmatch(r"[0-9]*[)\]},.;]*", name[colon + 1 :])
    if name.startswith("["):  # an IPv6 address
        password = False
    if password and "@" in rest:
        return rest.rfind("@") + 1
    return at + 1 if at >= 0 and (end is None or end.start() > at or name == "") else 0


def _clean_urls(text: str) -> str:
    parts: list[str] = []
    done = 0
    while found := _SCHEME.search(text, done):
        run = _RUN.match(text, found.end())
        rest = run[0] if run else ""
        host = _userinfo(rest)
        # Each search stops where the one before it has found something: a text of addresses alone stays quick.
        nested = _SCHEME.search(rest, host)  # /vsicurl/https://…, or two addresses without a blank between them
        stop = nested.start() if nested else len(rest)
        if end := _ENDS.search(rest, host, stop):
            stop = end.start()
        query = _MARK.search(rest, host, stop)
        if query is not None and end is None and nested is not None:  # the query holds the other address
            end = _ENDS.search(rest, stop)
            stop = end.start() if end else len(rest)
        url = rest[host:stop]
        if query is not None:
            closing = _CLOSING.search(url)
            kept = query.start() - host
            url = url[:kept] + (closing[0] if closing and closing.start() > kept else "")
        parts += [text[done : found.end()], url]
        done = found.end() + stop
    return "".join(parts) + text[done:]


def _clean_queries(text: str) -> str:
    """Remove queries from paths without a host, as urllib3 logs them."""

    def clean(found: re.Match[str]) -> str:
        before = re.split(r"[\s'\"]", text[max(0, found.start() - 512) : found.start()])[-1]
        if not before or ("/" not in before and "=" not in found[0]):
            return found[0]
        closing = _CLOSING.search(found[0])
        return closing[0] if closing else ""

    return _QUERY.sub(clean, text)


def _clean_encoded(found: re.Match[str]) -> str:
    return found[1] + _ENCODED_QUERY.sub("", _ENCODED_AT.sub("", found[2]))


def _clean_pair(found: re.Match[str]) -> str:
    value, quote = found["value"], found["quote"] or ""
    plain = value.removeprefix(quote).removesuffix(quote) if quote else value
    if plain.rstrip(")]},.;:") in _NO_SECRETS:
        return found[0]
    closing = _CLOSING.search(value) if not quote else None
    hidden = quote + HIDDEN + quote if quote else HIDDEN + (closing[0] if closing else "")
    return f"{found['name']}{found['between']}{found['bytes'] or ''}{hidden}"
