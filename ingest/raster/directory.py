"""`Directory`: the first directory of a TIFF, and those of its overviews, read strictly from its bytes.

These tags decide how blocks are decoded to numbers without GDAL, so every tag that matters is read and checked here.
The metadata that GDAL gives are not enough: they leave out tags that GDAL refuses only when it decodes. A directory
with an unknown tag, type, count or value is no error: GDAL then decodes the blocks, or refuses them.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
import numpy.typing as npt

from ingest.raster.ranges import RangeFile

__all__ = ["COMPRESSIONS", "GDAL_METADATA", "NODATA", "Directory", "tables_readable"]

COMPRESSIONS: Mapping[int, str] = {1: "", 8: "DEFLATE", 32946: "DEFLATE", 50000: "ZSTD"}
"""TIFF's number of a compression → GDAL's name of the compression, empty for none. LZW (5) is left to GDAL: the decoder
of imagecodecs follows a code that it has not read yet, so six damaged bytes end the process."""

_SUBFILE = 254
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC = 256, 257, 258, 259, 262
_FILL_ORDER, _ORIENTATION, _SAMPLES, _PLANAR, _PREDICTOR = 266, 274, 277, 284, 317
_TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, _TILE_SIZES, _SAMPLE_FORMAT = 322, 323, 324, 325, 339

_MUST: Mapping[int, tuple[int, ...] | None] = {
    _WIDTH: None,
    _HEIGHT: None,
    _BITS: (8, 16, 32, 64),
    _COMPRESSION: tuple(COMPRESSIONS),
    _PHOTOMETRIC: (1, 3),  # plain numbers, or numbers with a palette
    _TILE_WIDTH: None,
    _TILE_HEIGHT: None,
}
"""Tags of one value that must be present, with the values that are understood; None for any value above 0."""
_MAY: Mapping[int, tuple[int, ...]] = {
    _SUBFILE: (0,),  # a full image
    _FILL_ORDER: (1,),
    _ORIENTATION: (1,),
    _SAMPLES: (1,),
    _PLANAR: (1,),
    _PREDICTOR: (1, 2, 3),
    _SAMPLE_FORMAT: (1, 2, 3),
}
"""Tags of one value that may be absent, with the values that are understood; the first is the default."""
_IGNORED = frozenset(
    {
        *(269, 270, 271, 272, 305, 306, 315, 316, 33432),  # author, subject, date and software
        *(282, 283, 296),  # pixels per inch
        320,  # the palette
        700,  # XMP
        *(33550, 33922, 34264, 34735, 34736, 34737),  # the georeference
        *(42112, 42113),  # GDAL's metadata and the nodata value, which GDAL gives
    }
)
"""Tags that do not affect how bytes become numbers."""

_SHORT, _LONG, _LONG8 = 3, 4, 16
_NUMBERS: Mapping[int, str] = {_SHORT: "<u2", _LONG: "<u4", _LONG8: "<u8"}
_SIZES: Mapping[int, int] = {_SHORT: 2, _LONG: 4, 8: 2, 9: 4, 11: 4, 13: 4, **dict.fromkeys((5, 10, 12, 16, 17, 18), 8)}
"""Type of a tag → bytes of one value, where it is not one byte."""
_TABLES = frozenset({273, 279, _TILE_OFFSETS, _TILE_SIZES})
"""Tags that hold the places and sizes of strips or tiles."""
_KINDS = {1: "uint", 2: "int", 3: "float"}
_MAX_TAGS = 512
"""Largest number of tags of a directory that is read."""
_MAX_DIRECTORIES = 64
"""Largest number of directories of a file that are read: overviews, masks and masks of overviews."""
_REDUCED = 1
"""Kind of a directory that holds an overview."""
GDAL_METADATA, NODATA = 42112, 42113
"""Tags whose values are text: GDAL's metadata as XML, and the nodata value."""
_TEXT = 2
_MAX_TEXT = 1 << 16
"""Longest text of a tag that is read, in bytes."""


@dataclass(frozen=True)
class _Entry:
    """One tag of a directory; `at` is the byte in the file where its values begin."""

    type: int
    count: int
    at: int
    inline: bytes


@dataclass(frozen=True)
class Directory:
    """The directory of a file of one band in tiles whose tags are all understood.

    Attributes:
        shape: (height, width) of the raster, in pixels.
        block: (height, width) of a tile, in pixels.
        dtype: Type of the pixels.
        compression: GDAL's name of the compression, empty for none.
        predictor: TIFF's number of the predictor.
    """

    shape: tuple[int, int]
    block: tuple[int, int]
    dtype: str
    compression: str
    predictor: int
    _offsets: _Entry
    _sizes: _Entry

    @classmethod
    def of(cls, file: RangeFile) -> Self | None:
        """Read the first directory of a little-endian TIFF; None where GDAL must decode.

        Raises:
            Exception: The error of fetching the bytes.
        """
        return cls._from(_entries(_table(file)))

    @classmethod
    def of_overviews(cls, file: RangeFile) -> list[tuple[Self | None, Mapping[int, str]]] | None:
        """Read the directories of the overviews of a little-endian TIFF, in the order of the file.

        Returns:
            For each overview its directory, None where GDAL must decode it, and what its GDAL metadata and its nodata
            value say as text. None where the chain of directories cannot be followed.

        Raises:
            Exception: The error of fetching the bytes.
        """
        table, seen = _table(file), set[int]()
        found: list[tuple[Self | None, Mapping[int, str]]] = []
        while table is not None and table.next:
            if table.next in seen or len(seen) == _MAX_DIRECTORIES:
                return None
            seen.add(table.next)
            table = _table(file, table.next)
            entries = _entries(table)
            if table is None or entries is None:
                return None
            kind = _number(entries[_SUBFILE]) if _SUBFILE in entries else 0
            if kind == _REDUCED:
                found.append((cls._from(entries, kind), _texts(file, table)))
        return found if table is not None else None

    @classmethod
    def _from(cls, entries: Mapping[int, _Entry] | None, subfile: int = 0) -> Self | None:
        if entries is None or not entries.keys() >= {*_MUST, _TILE_OFFSETS, _TILE_SIZES}:
            return None
        values: dict[int, int] = {tag: known[0] for tag, known in _MAY.items()}
        for tag, entry in entries.items():
            if tag in _IGNORED or tag in (_TILE_OFFSETS, _TILE_SIZES):
                continue
            if tag not in _MUST and tag not in _MAY:
                return None
            value = _number(entry)
            known = (subfile,) if tag == _SUBFILE else _MUST[tag] if tag in _MUST else _MAY[tag]
            if value is None or value < (known is None) or (known is not None and value not in known):
                return None
            values[tag] = value
        dtype = f"{_KINDS[values[_SAMPLE_FORMAT]]}{values[_BITS]}"
        shape, block = (values[_HEIGHT], values[_WIDTH]), (values[_TILE_HEIGHT], values[_TILE_WIDTH])
        blocks = -(-shape[0] // block[0]) * -(-shape[1] // block[1])
        offsets, sizes = entries[_TILE_OFFSETS], entries[_TILE_SIZES]
        if (
            dtype in ("float8", "float16")  # GDAL converts them to wider floats
            or (values[_COMPRESSION] == 1 and values[_PREDICTOR] != 1)
            or any(entry.type not in _NUMBERS or entry.count != blocks for entry in (offsets, sizes))
        ):
            return None
        return cls(shape, block, dtype, COMPRESSIONS[values[_COMPRESSION]], values[_PREDICTOR], offsets, sizes)

    def spans(self, file: RangeFile) -> npt.NDArray[np.int64] | None:
        """Return (rows, columns, 2): first byte of each tile and the first after it; None where the file ends.

        Raises:
            Exception: The error of fetching the bytes.
        """
        starts, sizes = _array(file, self._offsets), _array(file, self._sizes)
        if starts is None or sizes is None or starts.max() > file.size or sizes.max() > file.size:
            return None
        rows, columns = (-(-size // block) for size, block in zip(self.shape, self.block, strict=True))
        begin = starts.astype(np.int64)
        return np.stack([begin, begin + sizes.astype(np.int64)], axis=-1).reshape(rows, columns, 2)


def tables_readable(file: RangeFile) -> bool:
    """Return whether GDAL can read the tables of the places and sizes of blocks: whole numbers inside the file.

    GDAL finds no block in a table that it cannot read, and may then give zeros, as for a block that is left out.

    Raises:
        Exception: The error of fetching the bytes.
    """
    table = _table(file)
    if table is None:
        return True  # GDAL refuses what is no directory
    for tag, kind, values, inline, _ in table.rows:
        size = values * _SIZES.get(kind, 1)
        if tag not in _TABLES or size <= len(inline):
            continue
        if kind not in _NUMBERS or int.from_bytes(inline, table.order) + size > file.size:
            return False
    return True


@dataclass(frozen=True)
class _Table:
    """The rows (tag, type, count, value field, byte where the value field begins) of a directory, as they stand.

    `next` is the place of the directory after it; 0 for none.
    """

    order: Literal["little", "big"]
    rows: tuple[tuple[int, int, int, bytes, int], ...]
    next: int


def _table(file: RangeFile, at: int | None = None) -> _Table | None:
    """Return the directory at a byte of a TIFF or BigTIFF, by default the first; None where it is cut short."""
    head = file.head
    order: Literal["little", "big"] = "big" if head[:2] == b"MM" else "little"
    mark = ">" if order == "big" else "<"
    if head[:4] in (b"II*\x00", b"MM\x00*") and len(head) >= 8:
        (start,), step, counted, form = struct.unpack_from(f"{mark}I", head, 4), 12, 2, f"{mark}HHI4s"
    elif head[:8] in (b"II+\x00\x08\x00\x00\x00", b"MM\x00+\x00\x08\x00\x00") and len(head) >= 16:
        (start,), step, counted, form = struct.unpack_from(f"{mark}Q", head, 8), 20, 8, f"{mark}HHQ8s"
    else:
        return None
    start = start if at is None else at
    first = _bytes(file, start, counted)
    count = 0 if first is None else int.from_bytes(first, order)
    table = _bytes(file, start + counted, count * step) if 0 < count <= _MAX_TAGS else None
    if table is None:
        return None
    after = _bytes(file, start + counted + count * step, 8 if step == 20 else 4) or b""
    rows = []
    for number in range(count):
        tag, kind, values, inline = struct.unpack_from(form, table, number * step)
        rows.append((tag, kind, values, inline, start + counted + (number + 1) * step - len(inline)))
    return _Table(order, tuple(rows), int.from_bytes(after, order))


def _texts(file: RangeFile, table: _Table) -> dict[int, str]:
    """Return the values of the tags of a directory that hold text."""
    found = {}
    for tag, kind, count, inline, field in table.rows:
        if tag in (GDAL_METADATA, NODATA) and kind == _TEXT and count <= _MAX_TEXT:
            at = int.from_bytes(inline, table.order) if count > len(inline) else field
            data = _bytes(file, at, count)
            found[tag] = "" if data is None else data.decode("latin-1").strip("\0 ")
    return found


def _entries(table: _Table | None) -> dict[int, _Entry] | None:
    """Return the tags of a directory; None unless they are little-endian, in order, and each once."""
    if table is None or table.order == "big":
        return None
    entries: dict[int, _Entry] = {}
    before = -1
    for tag, kind, values, inline, field in table.rows:
        if tag <= before:
            return None
        before = tag
        size = np.dtype(_NUMBERS[kind]).itemsize if kind in _NUMBERS else 0
        at = int.from_bytes(inline, "little") if size * values > len(inline) else field
        entries[tag] = _Entry(kind, values, at, inline)
    return entries


def _number(entry: _Entry) -> int | None:
    """Return the only value of a tag; None where it has another type or more values."""
    if entry.type not in (_SHORT, _LONG) or entry.count != 1:
        return None
    return int.from_bytes(entry.inline[: 2 if entry.type == _SHORT else 4], "little")


def _array(file: RangeFile, entry: _Entry) -> npt.NDArray[np.unsignedinteger] | None:
    form = np.dtype(_NUMBERS[entry.type])
    data = _bytes(file, entry.at, entry.count * form.itemsize)
    return None if data is None else np.frombuffer(data, form)


def _bytes(file: RangeFile, start: int, count: int) -> bytes | None:
    """Return the bytes of a file; None where it has fewer."""
    if start + count > file.size:
        return None
    data = file.take(start, start + count)
    if file.error is not None:
        raise file.error
    return data if len(data) == count else None
