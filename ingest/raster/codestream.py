"""Number of tiles that a JPEG 2000 codestream claims, read before GDAL opens it.

OpenJPEG keeps a record of some kilobytes for each tile as soon as it opens a file, so a header of a hundred bytes could
claim half a gigabyte. The layout is that of ISO/IEC 15444-1, annex A.5.1 (SIZ) and A.4.2 (SOT).
"""

from __future__ import annotations

import struct

from ingest.raster.faults import PermanentError

__all__ = ["check_tiles", "count_tiles"]

_START = b"\xff\x4f\xff\x51"
"""Markers SOC and SIZ, with which every codestream begins."""
_SIZES = struct.Struct(">HHIIIIIIII")
"""Length of the marker segment, capabilities, then size, offset, tile size and tile offset, each as x and y."""
_LEAST_TILE_BYTES = 14
"""Bytes of the markers SOT and SOD, without which no tile is in a file."""
_MOST_TILES = 65_535
"""Largest number of tiles: their index has 16 bits, of which the last value is not used."""


def count_tiles(head: bytes) -> int | None:
    """Count the tiles that the first codestream in `head` claims; None if no codestream begins there.

    >>> sizes = (47, 0, 10_980, 10_980, 0, 0, 1_024, 1_024, 0, 0)
    >>> count_tiles(b"boxes" + _START + _SIZES.pack(*sizes))
    121
    """
    start = head.find(_START)
    if start < 0 or len(head) < start + len(_START) + _SIZES.size:
        return None
    _, _, right, bottom, _, _, width, height, left, top = _SIZES.unpack_from(head, start + len(_START))
    if width == 0 or height == 0:
        return None
    columns, rows = -(-(right - left) // width), -(-(bottom - top) // height)
    return int(max(0, columns) * max(0, rows))


def check_tiles(head: bytes, size: int | None) -> None:
    """Refuse a codestream that claims more tiles than its file can hold.

    Args:
        head: First bytes of the file.
        size: Size of the file in bytes; None if it is unknown.

    Raises:
        PermanentError: It claims too many.
    """
    tiles = count_tiles(head)
    if tiles is None:
        return
    limit = _MOST_TILES if size is None else min(_MOST_TILES, size // _LEAST_TILE_BYTES)
    if tiles > limit:
        raise PermanentError(f"the JPEG 2000 header claims {tiles} tiles; a file of {size} bytes holds at most {limit}")
