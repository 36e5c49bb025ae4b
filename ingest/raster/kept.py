"""`KeptBytes`: bytes of remote files that planning has read, so that the ingest that follows does not fetch them again.

Planning fetches the header of every file, and for a small region the blocks that show clouds and the offset. The ingest
needs the same bytes. They stay in memory, up to a bound, and belong to one version of a file: where the server states
another version, they are forgotten. A run on other processes sends them along with the tasks.
"""

from __future__ import annotations

import functools
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from ingest.raster.ranges import Head, Part

__all__ = ["KeptBytes", "KnownFile", "kept_bytes"]

_MOST_BYTES = 256 << 20
"""Bytes that one process keeps: the headers of 16,000 files, or the first band of 60 dates of a small region."""


@dataclass(frozen=True)
class KnownFile:
    """What one process knows of a file, in a form that another process can use.

    Attributes:
        href: Address of the file.
        head: Its first bytes, and what its server stated.
        life_s: Seconds for which the head may still be used; the clocks of two machines differ.
        parts: (first byte, bytes) of what was read beyond the head.
    """

    href: str
    head: Head
    life_s: float
    parts: tuple[Part, ...]


@dataclass
class _Entry:
    head: Head
    parts: list[Part] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return len(self.head.data) + sum(len(data) for _, data in self.parts)


class KeptBytes:
    """Heads and parts of files by href; the files that were used least recently are forgotten first.

    Args:
        most_bytes: Largest number of bytes that are kept.
    """

    def __init__(self, most_bytes: int = _MOST_BYTES) -> None:
        self._most = most_bytes
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._lock = threading.Lock()
        self.nbytes = 0

    def keep_head(self, href: str, head: Head) -> None:
        """Keep the head of a file, unless it is the whole file: the file would then never be requested again."""
        if head.size is None or len(head.data) >= head.size:
            return
        with self._lock:
            before = self._pop(href)
            same = before is not None and head.etag is not None and before.head.version == head.version
            self._put(href, _Entry(head, before.parts if before is not None and same else []))

    def keep_part(self, href: str, version: str, start: int, data: bytes) -> None:
        """Keep bytes of a file whose head of this version is kept."""
        with self._lock:
            entry = self._entries.get(href)
            if entry is not None and entry.head.etag is not None and entry.head.version == version:
                self._pop(href)
                entry.parts.append((start, data))
                self._put(href, entry)

    def head(self, href: str) -> Head | None:
        """The head of a file; None if there is none, or the server must be asked again."""
        with self._lock:
            entry = self._entries.get(href)
            return None if entry is None or entry.head.until < time.monotonic() else entry.head

    def parts(self, href: str, head: Head) -> tuple[Part, ...]:
        """The parts of a file that were read of the version that `head` states."""
        with self._lock:
            entry = self._entries.get(href)
            if entry is None or head.etag is None:
                return ()
            if entry.head.version != head.version:
                self._pop(href)
                return ()
            return tuple(entry.parts)

    def drop(self, href: str) -> None:
        """Forget a file."""
        with self._lock:
            self._pop(href)

    def clear(self) -> None:
        """Forget all files."""
        with self._lock:
            self._entries.clear()
            self.nbytes = 0

    def lend(self, hrefs: Iterable[str], most_bytes: int) -> tuple[KnownFile, ...]:
        """Give what is known of some files to another process: all heads, and parts up to a number of bytes."""
        known = []
        now = time.monotonic()
        with self._lock:
            for href in dict.fromkeys(hrefs):
                entry = self._entries.get(href)
                if entry is None:
                    continue
                size = sum(len(data) for _, data in entry.parts)
                parts = tuple(entry.parts) if size <= most_bytes else ()
                most_bytes -= size if parts else 0
                known.append(KnownFile(href, entry.head, entry.head.until - now, parts))
        return tuple(known)

    def borrow(self, files: Iterable[KnownFile]) -> None:
        """Keep what another process knows of some files."""
        now = time.monotonic()
        for file in files:
            self.keep_head(file.href, replace(file.head, until=now + file.life_s))
            for start, data in file.parts:
                self.keep_part(file.href, file.head.version, start, data)

    def _pop(self, href: str) -> _Entry | None:
        entry = self._entries.pop(href, None)
        if entry is not None:
            self.nbytes -= entry.nbytes
        return entry

    def _put(self, href: str, entry: _Entry) -> None:
        self._entries[href] = entry
        self.nbytes += entry.nbytes
        while self.nbytes > self._most:
            self._pop(next(iter(self._entries)))


@functools.lru_cache(maxsize=2)
def kept_bytes(pid: int) -> KeptBytes:
    """What this process keeps; `pid` is the key of the cache, as a fork must not share its lock."""
    return KeptBytes()
