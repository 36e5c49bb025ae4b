"""`KeptBytes`: what planning has read of files, so that the ingest that follows does not fetch it again.

Planning fetches the header of every remote file, and for a small region it decodes the blocks that show clouds and the
offset. The ingest needs the same headers and pixels. They stay in memory, up to a bound, and belong to one version of a
file: where the server states another version, they are forgotten. Of the blocks only the pixels around the region are
kept, which take a fortieth of the room. A run on other processes sends all this along with the tasks.
"""

from __future__ import annotations

import functools
import threading
import time
from collections import OrderedDict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy.typing as npt

from ingest.raster.ranges import Head, Part

__all__ = ["KeptBytes", "KeptPixels", "KnownFile", "kept_bytes"]

_MOST_BYTES = 256 << 20
"""Bytes that one process keeps: the headers of 16,000 files, or of 1,000 dates a region of 256² in one band."""
Window = tuple[int, int, int, int]
"""(row, col, height, width) of pixels in a raster."""


@dataclass(frozen=True)
class KeptPixels:
    """Pixels of one version of a file, as the file stores them.

    Attributes:
        identity: Key that only this version of the file has.
        window: Their place in the raster.
        pixels: Array (height, width).
    """

    identity: Hashable
    window: Window
    pixels: npt.NDArray[Any]

    def cut(self, identity: Hashable, window: Window) -> npt.NDArray[Any] | None:
        """Return the pixels of a window of the raster; None where it is another version, or they are not all here."""
        (row, col, height, width), (top, left, tall, wide) = window, self.window
        inside = top <= row and left <= col and row + height <= top + tall and col + width <= left + wide
        if identity != self.identity or not inside:
            return None
        return self.pixels[row - top : row - top + height, col - left : col - left + width]


@dataclass(frozen=True)
class KnownFile:
    """The knowledge of one process about a file, in a form that another process can use.

    Attributes:
        href: Address of the file.
        head: Its first bytes, and what its server stated.
        life_s: Seconds for which the head may still be used; the clocks of two machines differ.
        parts: (first byte, bytes) of what was read beyond the head.
        pixels: Pixels that were decoded; None for none.
    """

    href: str
    head: Head
    life_s: float
    parts: tuple[Part, ...]
    pixels: KeptPixels | None = None


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
        self._pixels: OrderedDict[str, KeptPixels] = OrderedDict()
        self._lock = threading.Lock()
        self.nbytes = 0

    def keep_head(self, href: str, head: Head) -> None:
        """Keep a head, unless the size is unknown or it is the whole file, which would never be requested again."""
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
                if (start, len(data)) not in ((at, len(own)) for at, own in entry.parts):
                    entry.parts.append((start, data))
                self._put(href, entry)

    def keep_pixels(self, href: str, kept: KeptPixels) -> None:
        """Keep pixels of a file, in place of those that are kept of it."""
        with self._lock:
            self._pop_pixels(href)
            self._pixels[href] = kept
            self.nbytes += kept.pixels.nbytes
            self._make_room()

    def pixels(self, href: str, identity: Hashable, window: Window) -> npt.NDArray[Any] | None:
        """Return the pixels of a window of this version of a file; None where they are not kept."""
        with self._lock:
            kept = self._pixels.get(href)
            return None if kept is None or identity is None else kept.cut(identity, window)

    def head(self, href: str) -> Head | None:
        """Return the head of a file; None if there is none, or the server must be asked again."""
        with self._lock:
            entry = self._entries.get(href)
            return None if entry is None or entry.head.until < time.monotonic() else entry.head

    def parts(self, href: str, head: Head) -> tuple[Part, ...]:
        """Return the parts of a file that were read of the version that `head` states."""
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
            self._pop_pixels(href)

    def clear(self) -> None:
        """Forget all files."""
        with self._lock:
            self._entries.clear()
            self._pixels.clear()
            self.nbytes = 0

    def lend(self, hrefs: Iterable[str], most_bytes: int) -> tuple[KnownFile, ...]:
        """Return what is known of remote files, for another process, up to a number of bytes."""
        known = []
        now = time.monotonic()
        with self._lock:
            for href in dict.fromkeys(hrefs):
                entry = self._entries.get(href)
                if entry is None:
                    continue
                most_bytes -= len(entry.head.data)
                if most_bytes < 0:
                    break
                pixels = self._pixels.get(href)
                size = sum(len(data) for _, data in entry.parts) + (pixels.pixels.nbytes if pixels else 0)
                fits = size <= most_bytes
                most_bytes -= size if fits else 0
                parts = tuple(entry.parts) if fits else ()
                known.append(KnownFile(href, entry.head, entry.head.until - now, parts, pixels if fits else None))
        return tuple(known)

    def borrow(self, files: Iterable[KnownFile]) -> None:
        """Keep what another process knows of some files."""
        now = time.monotonic()
        for file in files:
            self.keep_head(file.href, replace(file.head, until=now + file.life_s))
            for start, data in file.parts:
                self.keep_part(file.href, file.head.version, start, data)
            if file.pixels is not None:
                self.keep_pixels(file.href, file.pixels)

    def _pop(self, href: str) -> _Entry | None:
        entry = self._entries.pop(href, None)
        if entry is not None:
            self.nbytes -= entry.nbytes
        return entry

    def _pop_pixels(self, href: str) -> None:
        kept = self._pixels.pop(href, None)
        self.nbytes -= 0 if kept is None else kept.pixels.nbytes

    def _put(self, href: str, entry: _Entry) -> None:
        self._entries[href] = entry
        self.nbytes += entry.nbytes
        self._make_room()

    def _make_room(self) -> None:
        while self.nbytes > self._most and self._pixels:
            self._pop_pixels(next(iter(self._pixels)))
        while self.nbytes > self._most:
            self._pop(next(iter(self._entries)))


@functools.lru_cache(maxsize=2)
def kept_bytes(pid: int) -> KeptBytes:
    """Return the kept bytes of this process; `pid` is the key of the cache, as a fork must not share its lock."""
    return KeptBytes()
