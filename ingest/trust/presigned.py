"""Signatures that a catalogue gives with its hrefs: used when a file is read, and in nothing that is stored or printed.

Some catalogues hand out addresses that are signed already, and nobody else can sign them. A plan, a cube and a log hold
the address without its signature. The signed address stays in the memory of the process that searched, and goes from
there to the workers beside the tasks of the run. A plan that was kept has none: whoever continues it searches again.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping

from ingest.trust.redact import strip_signature

__all__ = ["find_signed", "set_signature_aside", "signed_hrefs"]

_MOST = 1 << 18
"""Largest number of signed addresses that a process remembers; those that were seen first are forgotten first."""

_signed: dict[str, str] = {}
_lock = threading.Lock()


def set_signature_aside(href: str) -> str:
    """Return an href without its signature, and remember the signed form in the memory of this process.

    >>> set_signature_aside("https://host/a.tif?layer=2&sig=abc&se=2024")
    'https://host/a.tif?layer=2'
    """
    plain = strip_signature(href)
    if plain != href:
        with _lock:
            _signed.pop(plain, None)
            _signed[plain] = href
            while len(_signed) > _MOST:
                del _signed[next(iter(_signed))]
    return plain


def signed_hrefs(hrefs: Iterable[str]) -> dict[str, str]:
    """Return href → signed href, for the hrefs whose signature this process knows."""
    return {href: _signed[href] for href in hrefs if href in _signed}


def find_signed(href: str, given: Mapping[str, str]) -> str:
    """Return the signed form of an href: from `given`, else from the memory of this process, else the href itself."""
    return given.get(href) or _signed.get(href, href)
