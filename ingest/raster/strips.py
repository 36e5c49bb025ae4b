"""`StripReader` reads a raster from top to bottom, so that each of its blocks is decoded once.

Windows that are needed one after the other overlap, or end within a block. A reader that began again for each would
decode the blocks at their edges two or four times.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["StripReader", "WindowReader", "read_once"]

Array = npt.NDArray[np.generic]
Window = tuple[int, int, int, int]
"""(row, col, height, width) of pixels in a raster."""
_WHOLE_READ_PX = 1 << 25
"""Largest window that is read in one go for several blocks, in pixels."""


class WindowReader(Protocol):
    """Function that reads a window inside a raster."""

    def __call__(self, row: int, col: int, height: int, width: int, into: Array | None = None) -> Array:
        """Read pixels (height, width), straight `into` that view and return it where its type allows this."""


class StripReader:
    """Reader of rows of some columns of a raster; the requested rows may only move down.

    Args:
        read: Function that reads a window (row, col, height, width), straight `into` an array where its type allows.
        block_rows: Rows of a block of the file.
        col: First column.
        width: Number of columns.
        end: First row that is not needed.
        dtype: Type of the pixels.
    """

    def __init__(self, read: WindowReader, *, block_rows: int, col: int, width: int, end: int, dtype: Any) -> None:
        self._read = read
        # of a very tall block only a part is held, so it is decoded once for each part
        self._block_rows = max(1, min(block_rows, _WHOLE_READ_PX // max(1, width)))
        self._col, self._width, self._end = col, width, end
        self._top = self._bottom = 0
        self._pixels: Array = np.empty((0, width), dtype)

    def rows(self, first: int, end: int) -> Array:
        """Return the rows from `first` to `end`; those above `first` can no longer be asked for."""
        if first < self._top:
            raise ValueError(f"rows from {first} were dropped, the first one that is here is {self._top}")
        if end > self._bottom:
            start = max(first, self._bottom)
            stop = min(self._end, -(-end // self._block_rows) * self._block_rows)
            kept = self._pixels[max(0, first - self._top) :]
            pixels = np.empty((len(kept) + stop - start, self._width), self._pixels.dtype)
            pixels[: len(kept)] = kept
            view = pixels[len(kept) :]
            fresh = self._read(start, self._col, stop - start, self._width, into=view)
            if fresh is not view:
                view[...] = fresh
            self._pixels, self._top, self._bottom = pixels, min(first, start), stop
        return self._pixels[first - self._top : end - self._top]


def read_once(read: WindowReader, windows: list[Window], block_rows: int, dtype: npt.DTypeLike) -> WindowReader:
    """Read what the windows share once: all of it, or strips from top to bottom where that is too large."""
    row0, col0 = min(w[0] for w in windows), min(w[1] for w in windows)
    row1, col1 = max(w[0] + w[2] for w in windows), max(w[1] + w[3] for w in windows)
    width = col1 - col0
    if (row1 - row0) * width > _WHOLE_READ_PX:
        return _read_strips(read, windows, (col0, width, row1), block_rows, dtype)
    whole = read(row0, col0, row1 - row0, width)

    def part(row: int, col: int, height: int, width: int, into: Array | None = None) -> Array:
        return np.ascontiguousarray(whole[row - row0 : row - row0 + height, col - col0 : col - col0 + width])

    return part


def _read_strips(
    read: WindowReader,
    windows: list[Window],
    place: tuple[int, int, int],
    block_rows: int,
    dtype: npt.DTypeLike,
) -> WindowReader:
    """Read each row of windows as a strip of all columns; by itself each where such a strip is too large as well."""
    col0, columns, end = place
    lowest = [min(w[0] for w in windows[at:]) for at in range(len(windows))]  # rows that a later window still needs
    tallest = max(w[0] + w[2] - low for w, low in zip(windows, lowest, strict=True))
    if (tallest + block_rows) * columns > _WHOLE_READ_PX:
        return read
    strips = StripReader(read, block_rows=block_rows, col=col0, width=columns, end=end, dtype=dtype)
    firsts = iter(lowest)

    def part(row: int, col: int, height: int, width: int, into: Array | None = None) -> Array:
        first = next(firsts)
        rows = strips.rows(first, max(row + height, first))
        return np.ascontiguousarray(rows[row - first : row - first + height, col - col0 : col - col0 + width])

    return part
