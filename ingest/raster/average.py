"""`average_blocks`: the mean of square blocks of whole numbers, as GDAL averages, several times as fast.

Where the pixels of a target hold whole pixels of the source, an average needs no transform and no weights.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ingest.raster.strips import Array, StripReader, WindowReader
from ingest.worker.meters import stage
from ingest.worker.slots import computing
from zarr_store.grid import Grid

__all__ = ["MOST_FACTOR", "average_blocks", "average_onto"]

MOST_FACTOR = 128
"""Largest number of pixels along a block, so that the sums of 16 bits stay within 32."""
_AT_ONCE = 1 << 18
"""Pixels that are summed at once, so that they stay in the processor's cache."""
_STRIP_PX = 1 << 23
"""Pixels of a strip that is averaged at once."""
Whole = npt.NDArray[np.uint16]


def average_onto(read: WindowReader, source: Grid, target: Grid, factor: int, out: Array, block_rows: int) -> None:
    """Average whole source pixels under each target pixel, strip by strip.

    Args:
        read: Function that reads a window of the raster; 0 is no data.
        source: Grid of the raster.
        target: Grid of the result, whose pixels hold whole pixels of the raster.
        factor: Pixels of the raster along one of the target.
        out: Array of 16 bits that takes the result.
        block_rows: Rows of a block of the file.
    """
    (sx, sy), shape = source.resolution, source.shape
    row0 = round((source.transform[5] - target.transform[5]) / sy)
    col0 = round((target.transform[2] - source.transform[2]) / sx)
    # the target's pixels that touch the raster
    top, bottom = (max(0, -row0) // factor, min(target.height, -(-(shape[0] - row0) // factor)))
    left, right = (max(0, -col0) // factor, min(target.width, -(-(shape[1] - col0) // factor)))
    if (top, left) != (0, 0) or (bottom, right) != target.shape:
        out[...] = 0
    if bottom <= top or right <= left:
        return
    first_col, end_col = max(0, col0 + left * factor), min(shape[1], col0 + right * factor)
    end = min(shape[0], row0 + bottom * factor)
    width = end_col - first_col
    strips = StripReader(read, block_rows=block_rows, col=first_col, width=width, end=end, dtype=out.dtype)
    lead = first_col - (col0 + left * factor)
    whole = lead == 0 and width == (right - left) * factor
    step = max(1, _STRIP_PX // max(1, width * factor))
    for at in range(top, bottom, step):
        stop = min(bottom, at + step)
        first, last = row0 + at * factor, row0 + stop * factor
        pixels = strips.rows(max(0, first), min(last, end))
        with computing(), stage("average", pixels.nbytes):
            if not whole or first < 0 or last > end:  # target pixels at the edge are the mean of what the raster has
                padded = np.zeros((last - first, (right - left) * factor), out.dtype)
                above = max(0, -first)
                padded[above : above + len(pixels), lead : lead + width] = pixels
                pixels = padded
            average_blocks(pixels, factor, out[at:stop, left:right])  # type: ignore[arg-type]  # of 16 bits


def average_blocks(pixels: Whole, factor: int, out: Whole) -> None:
    """Average blocks of `factor` × `factor` pixels over those that are not 0; halves are rounded up.

    Args:
        pixels: (height · factor, width · factor); 0 is no data.
        factor: Pixels along each side of a block.
        out: (height, width) that takes the result; 0 where a block has no data.

    >>> out = np.empty((1, 2), np.uint16)
    >>> average_blocks(np.array([[1, 2, 0, 0], [2, 1, 0, 7]], np.uint16), 2, out)
    >>> out.tolist()
    [[2, 7]]
    """
    height, width = out.shape
    rows = max(1, _AT_ONCE // max(1, pixels.shape[1] * factor))
    for top in range(0, height, rows):
        part = pixels[top * factor : (top + rows) * factor].reshape(-1, factor, width * factor)
        total = _summed(part, factor)
        if part.size and part.min() > 0:
            count = factor * factor
            out[top : top + rows] = (total + np.uint32(count // 2)) // np.uint32(count)
        else:
            counts = _summed(part != 0, factor)
            some = np.maximum(counts, 1)
            out[top : top + rows] = (total + some // 2) // some


def _summed(part: npt.NDArray[np.uint16] | npt.NDArray[np.bool_], factor: int) -> npt.NDArray[np.uint32]:
    """Sum (height, factor, width · factor) over blocks: first rows, then the columns of the shorter result."""
    lines = part[:, 0].astype(np.uint32)
    for row in range(1, factor):
        lines += part[:, row]
    total: npt.NDArray[np.uint32] = lines[:, ::factor].copy()
    for column in range(1, factor):
        total += lines[:, column::factor]
    return total
