"""TIFF files that say what no writer would write: tags of a good file, put over by wild ones."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path

WIDTH, HEIGHT, TILE_WIDTH, TILE_OFFSETS = 256, 257, 322, 324
PIXEL_SCALE, TIEPOINT, GEO_KEYS, GDAL_METADATA, NODATA = 33550, 33922, 34735, 42112, 42113
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 11: 4, 12: 8, 16: 8}
Tag = tuple[int, bytes]
"""TIFF's number of the type, and the bytes of the values."""


def doubles(*values: float) -> Tag:
    return 12, struct.pack(f"<{len(values)}d", *values)


def longs(*values: int) -> Tag:
    return 4, struct.pack(f"<{len(values)}I", *values)


def shorts(*values: int) -> Tag:
    return 3, struct.pack(f"<{len(values)}H", *values)


def text(value: str) -> Tag:
    return 2, value.encode() + b"\0"


def with_tags(source: Path, target: Path, tags: Mapping[int, Tag | None]) -> Path:
    """Copy a little-endian classic TIFF with its first directory written anew behind it; None takes a tag away."""
    data = bytearray(source.read_bytes())
    assert data[:4] == b"II*\0"
    (at,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, at)
    entries = {}
    for number in range(count):
        tag, kind, length, value = struct.unpack_from("<HHI4s", data, at + 2 + 12 * number)
        entries[tag] = (kind, length, value)
    for tag, new in tags.items():
        entries.pop(tag, None)
        if new is None:
            continue
        kind, raw = new
        length = len(raw) // _SIZES[kind]
        if len(raw) > 4:
            data += b"\0" * (len(data) % 2)
            entries[tag] = (kind, length, struct.pack("<I", len(data)))
            data += raw
        else:
            entries[tag] = (kind, length, raw.ljust(4, b"\0"))
    data += b"\0" * (len(data) % 2)
    struct.pack_into("<I", data, 4, len(data))
    data += struct.pack("<H", len(entries))
    for tag in sorted(entries):
        kind, length, value = entries[tag]
        data += struct.pack("<HHI4s", tag, kind, length, value)
    data += struct.pack("<I", 0)
    target.write_bytes(data)
    return target
