"""`RangeFile`: a file whose blocks are fetched before they are read; GDAL can read it as a file.

GDAL on its own opens a file again for each window, and waits for each answer before the next request. Here the header
is fetched once per process and file. It locates all blocks of a window; neighbours are merged into one request, and
the requests of all bands run at the same time. Every answer is checked (`ingest.raster.download`): its status, its
range, its length, and that the file is still the one whose header is held.
"""

from __future__ import annotations

import io
import os
import threading
import time
import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import rasterio
from rasterio.errors import RasterioError

from ingest.raster.lru import LruCache

__all__ = [
    "HEAD_BYTES",
    "MAX_REQUESTS",
    "BlockPlaceError",
    "Head",
    "HeadCache",
    "Part",
    "RangeFile",
    "block_span",
    "blocks_of",
    "find_range_file",
]

Span = tuple[int, int]
"""Range of a file as (first byte, first byte after it)."""

Part = tuple[int, bytes]
"""Bytes of a file as (first byte, bytes)."""

Get = Callable[[Span], bytes]
"""Function that fetches exactly these bytes, or raises."""


class BlockPlaceError(RasterioError):  # type: ignore[misc]  # rasterio is untyped
    """A block that states more bytes than a block of its size can have, or a place that no file has."""


HEAD_BYTES = 16384
"""Number of first bytes that are fetched: they hold the directories of a COG of 10 980² pixels in blocks of 512."""

_MERGE_BYTES = 512
"""Largest gap between blocks that are fetched in one request, in bytes; in a COG the gap is 8 bytes."""
_AROUND_BYTES = 4
"""Bytes fetched before and after a block: a COG repeats its size before it and its last bytes after it for GDAL."""
MAX_REQUESTS = 64
"""Largest number of requests of one process at once; a shard of four bands needs about 40, and two shards overlap."""
_FEW_BYTES = 1 << 20
"""Number of bytes that any block may have, whatever it decodes to."""
_MAX_GROWTH = 4
"""Largest ratio of packed to decoded bytes of larger blocks; LZW of noise has 1.5."""
_SIGNATURE_BYTES = 8
"""Number of first bytes that no block has: they say that the file is a TIFF, and where its directory is."""
_FARTHEST = 1 << 60
"""Largest place of a byte in a file that is believed."""
_HEADS = 1024
"""Number of heads that one process keeps."""
_HEAD_LIFE_S = 300.0
"""Seconds after which a head is fetched again."""


@dataclass(frozen=True)
class Head:
    """The first bytes of a file, with the properties that its server stated.

    Attributes:
        url: Address of the file after redirects, unsigned.
        data: First bytes of the file.
        size: Size of the whole file in bytes; None where the server did not state it.
        etag: ETag or date of the file; None where the server stated neither.
        ranges: Whether the server answers range requests.
        until: Monotonic time after which the head is fetched again.
    """

    url: str
    data: bytes
    size: int | None
    etag: str | None
    ranges: bool
    until: float

    @property
    def version(self) -> str:
        """Text that tells versions of the file apart: its size, and its ETag or date if the server states one."""
        return f"{self.size} {self.etag or ''}".strip()


class HeadCache(LruCache[Head]):
    """Heads of the files that were read last, for five minutes, so that a file of many shards is opened once."""

    def __init__(self) -> None:
        super().__init__(_HEADS)

    def get(self, key: Hashable) -> Head | None:
        """Return the head of an href; None if there is none or it is too old."""
        head = super().get(key)
        return None if head is None or head.until < time.monotonic() else head

    def put(self, key: Hashable, value: Head) -> None:
        """Store a head, unless the size is unknown or it holds the whole file, which would never be requested again."""
        if value.size is not None and len(value.data) < value.size:
            super().put(key, value)

    @staticmethod
    def deadline() -> float:
        """Return the monotonic time until which a head that arrives now may be used."""
        return time.monotonic() + _HEAD_LIFE_S


class RangeFile:
    """The bytes of a file that were fetched, and a function that fetches others.

    Attributes:
        size: Size of the file in bytes.
        version: Version of the file, as its head states it.
        error: Error of the last failed fetch for GDAL, which would only report "read error".
        keep: Function that gets the first byte and the bytes of each answer, for a later use of the file; or None.
        identity: Key that only this version of the file has; None where versions cannot be told apart.

    Args:
        head: First bytes and size of the file.
        get: Function that fetches a span.
        remote: Whether several spans are worth fetching at once.
        parts: Bytes of the same version of the file that were fetched before.
        keep: The attribute `keep`.
        identity: The attribute `identity`.
    """

    def __init__(
        self,
        head: Head,
        get: Get,
        *,
        remote: bool = True,
        parts: Sequence[Part] = (),
        keep: Callable[[int, bytes], None] | None = None,
        identity: Hashable = None,
    ) -> None:
        if head.size is None:
            raise ValueError("a file of unknown size cannot be read in ranges")
        self.size = head.size
        self.version = head.version
        self.error: BaseException | None = None
        self._get = get
        self._remote = remote
        self.keep = keep
        self.identity = identity
        self._parts: list[Part] = [(0, head.data[: head.size]), *parts]
        self._lasting = len(self._parts)

    @property
    def head(self) -> bytes:
        """The first bytes of the file."""
        return self._parts[0][1]

    def open(self, path: str, mode: str = "rb") -> io.RawIOBase:
        """Open a fresh handle: rasterio opens a file several times and closes each handle."""
        return _Handle(self)

    def fetch(self, spans: Iterable[Span]) -> None:
        """Fetch these spans unless they are here, several at a time.

        Raises:
            Exception: The error of the fetching function.
        """
        wanted = merge((span for span in spans if self._find(span) is None), self.size)
        if not wanted:
            return
        several = self._remote and len(wanted) > 1
        answers = list(_pool(os.getpid()).map(self._get, wanted)) if several else [self._get(span) for span in wanted]
        for (start, _), data in zip(wanted, answers, strict=True):
            self._add(start, data)

    def forget(self) -> None:
        """Drop all bytes that were fetched here, except the head: the blocks of a window are needed once."""
        del self._parts[self._lasting :]

    def take(self, start: int, stop: int) -> bytes:
        """Return bytes for GDAL, fetched now if absent; empty bytes after an error, which is kept in `error`."""
        part = self._find((start, stop))
        if part is None:
            try:
                part = (start, self._get((start, min(self.size, max(stop, start + HEAD_BYTES)))))
            except BaseException as error:  # noqa: BLE001 - raised again by the reader; GDAL would swallow an interrupt
                self.error = error
                return b""
            self._add(*part)
        return part[1][start - part[0] : stop - part[0]]

    def view(self, start: int, stop: int) -> memoryview:
        """Return the bytes that `fetch` brought, without a copy; fewer where the file ends before `stop`."""
        part = self._find((start, min(stop, self.size)))
        if part is None:
            self.fetch([(start, stop)])
            part = self._find((start, min(stop, self.size))) or (start, b"")
        return memoryview(part[1])[start - part[0] : stop - part[0]]

    def _add(self, start: int, data: bytes) -> None:
        self._parts.append((start, data))
        if self.keep is not None:
            self.keep(start, data)

    def _find(self, span: Span) -> Part | None:
        return next((p for p in self._parts if p[0] <= span[0] and span[1] <= p[0] + len(p[1])), None)


class _Handle(io.RawIOBase):
    """One open handle of a `RangeFile`, with a position."""

    def __init__(self, file: RangeFile) -> None:
        super().__init__()
        self._file = file
        self._at = 0

    def read(self, size: int | None = -1) -> bytes:
        start = self._at
        stop = self._file.size if size is None or size < 0 else min(self._file.size, start + size)
        data = self._file.take(start, stop) if stop > start else b""
        self._at = start + len(data)
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._file.size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


def merge(spans: Iterable[Span], size: int) -> list[Span]:
    """Sort spans and join those that lie near each other.

    >>> merge([(100, 200), (208, 300), (5000, 6000)], 5500)
    [(96, 304), (4996, 5500)]
    """
    merged: list[Span] = []
    for start, stop in sorted(spans):
        start, stop = max(0, start - _AROUND_BYTES), min(size, stop + _AROUND_BYTES)
        if merged and start - merged[-1][1] <= _MERGE_BYTES:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged


def blocks_of(dataset: rasterio.io.DatasetReader, window: tuple[int, int, int, int]) -> list[Span]:
    """Return spans of the blocks of a TIFF that a window (row, col, height, width) touches, except left-out ones."""
    row, col, height, width = window
    tall, wide = dataset.block_shapes[0]
    spans = []
    for y in range(row // tall, -(-(row + height) // tall)):
        for x in range(col // wide, -(-(col + width) // wide)):
            span = block_span(dataset, y, x)
            if span is not None:
                spans.append(span)
    return spans


def block_span(
    dataset: rasterio.io.DatasetReader,
    y: int,
    x: int,
    *,
    overview: int | None = None,
    block: tuple[int, int] | None = None,
) -> Span | None:
    """Return the span of one block of a TIFF, by its row and column; None where a sparse file leaves it out.

    Args:
        dataset: The open file.
        y: Row of the block.
        x: Column of the block.
        overview: Number of the overview that has the block, from 0; None for the full image.
        block: (height, width) of the blocks of that overview.

    Raises:
        BlockPlaceError: The file states more bytes than any packing of the block has, or a place that no file has.
    """
    start = dataset.get_tag_item(f"BLOCK_OFFSET_{x}_{y}", "TIFF", bidx=1, ovr=overview)
    count = dataset.get_tag_item(f"BLOCK_SIZE_{x}_{y}", "TIFF", bidx=1, ovr=overview)
    if start is None or count is None:
        return None
    if int(start) < _SIGNATURE_BYTES:
        raise BlockPlaceError(
            f"block {y}, {x}: the file states that it begins at byte {start}, in its header: it is damaged"
        )
    if int(start) + int(count) > _FARTHEST:
        raise BlockPlaceError(f"block {y}, {x}: the file states that it begins at byte {start}: it is damaged")
    if int(count) > _FEW_BYTES:
        tall, wide = block or dataset.block_shapes[0]
        unpacked = tall * wide * np.dtype(dataset.dtypes[0]).itemsize
        if int(count) > _MAX_GROWTH * unpacked:
            raise BlockPlaceError(
                f"block at row {y * tall}, column {x * wide}: {count} packed bytes of {unpacked} are refused"
            )
    return (int(start), int(start) + int(count))


_files: weakref.WeakKeyDictionary[rasterio.io.DatasetReader, RangeFile] = weakref.WeakKeyDictionary()


def link_range_file(dataset: rasterio.io.DatasetReader, file: RangeFile) -> None:
    """Record the file that a dataset reads from."""
    _files[dataset] = file


def find_range_file(dataset: rasterio.io.DatasetReader) -> RangeFile | None:
    """Return the file that a dataset reads from; None if `link_range_file` recorded none."""
    return _files.get(dataset)


_pools: dict[int, ThreadPoolExecutor] = {}
_pools_lock = threading.Lock()


def _pool(pid: int) -> ThreadPoolExecutor:
    """Return the threads that wait for answers; one pool per process, as threads do not survive a fork."""
    with _pools_lock:
        if pid not in _pools:
            _pools[pid] = ThreadPoolExecutor(MAX_REQUESTS, thread_name_prefix="terrashard-fetch")
        return _pools[pid]
