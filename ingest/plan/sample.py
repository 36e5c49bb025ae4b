"""`Sample`: pixels of one band that show whether the offset is in them.

Where a region is small, its blocks are needed anyway, so they are looked at first. Only where they do not settle the
offset is more of the file read: an overview, or windows that are spread over it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ingest.plan.coverage import read_blocks
from ingest.raster.gdal_read import read_window
from ingest.raster.kept import KeptPixels
from ingest.raster.ranges import BlockPlaceError, block_span, find_range_file
from ingest.scenes.offsets import OffsetReading, read_offset

if TYPE_CHECKING:
    from rasterio.io import DatasetReader

    from ingest.raster.values import Values

__all__ = ["Sample", "is_read_whole", "measure_blocks", "read_near", "read_sample", "trim"]

_SIDE_PX = 512
"""Longest side of a sample, in pixels."""
_FULL_READ_PIXELS = 2048 * 2048
"""Largest raster without overviews that is read whole for a sample, in pixels."""
_SMALL_PIXELS = 1024 * 1024
"""Largest raster that is read whole although it has overviews, in pixels."""
_MARGIN_PX = 16
"""Pixels around a region that are kept."""
_MEASURED_BLOCKS = 64
"""Largest number of blocks of one file whose stored sizes are looked up."""


@dataclass(frozen=True)
class Sample:
    """Pixels of one band.

    Attributes:
        windows: Parts of the raster.
        full_resolution: Whether they are pixels of the file, and not of an overview.
    """

    windows: tuple[npt.NDArray[Any], ...]
    full_resolution: bool

    @property
    def reading(self) -> OffsetReading:
        """Evidence of these pixels on the offset."""
        return read_offset(*self.windows, full_resolution=self.full_resolution)

    def in_numbers_of_the_cube(self, values: Values) -> Sample:
        """Return the sample in digital numbers of 1e-4, whatever scale the file has."""
        if values.factor == 1.0:
            return self
        return replace(self, windows=tuple(values.store(window, "uint16", set()) for window in self.windows))

    @classmethod
    def of_blocks(cls, near: KeptPixels) -> Sample:
        """Make a sample of the blocks of a region; every n-th pixel of every n-th row suffices."""
        step = max(1, -(-max(near.pixels.shape) // _SIDE_PX))
        return cls((near.pixels[::step, ::step],), full_resolution=True)


def is_read_whole(dataset: DatasetReader) -> bool:
    """Return whether a raster is so small that a sample is all of it."""
    return int(dataset.height) * int(dataset.width) <= (_SMALL_PIXELS if dataset.overviews(1) else _FULL_READ_PIXELS)


def read_sample(dataset: DatasetReader, *, closely: bool = False) -> Sample:
    """Read about 512² pixels of the raster, from an overview or as nine windows; of a small raster all pixels.

    Args:
        dataset: The open file.
        closely: Whether to read from the file itself, never from an overview.
    """
    from rasterio.windows import Window

    height, width = int(dataset.height), int(dataset.width)
    if is_read_whole(dataset):
        whole = read_window(dataset)
        rows, cols = -(-height // 3), -(-width // 3)
        parts = [whole[y : y + rows, x : x + cols] for y in range(0, height, rows) for x in range(0, width, cols)]
        return Sample(tuple(parts), full_resolution=True)
    if dataset.overviews(1) and not closely:
        step = max(1, -(-max(height, width) // _SIDE_PX))
        return Sample((read_window(dataset, out_shape=(-(-height // step), -(-width // step))),), full_resolution=False)
    rows, cols = min(_SIDE_PX // 3, height), min(_SIDE_PX // 3, width)
    windows = [
        Window(round(x * (width - cols)), round(y * (height - rows)), cols, rows)
        for y in (0.1, 0.5, 0.9)
        for x in (0.1, 0.5, 0.9)
    ]
    return Sample(tuple(read_window(dataset, window=window) for window in windows), full_resolution=True)


def read_near(dataset: DatasetReader, window: tuple[int, int, int, int]) -> KeptPixels:
    """Read the whole blocks that a window (row, col, height, width) touches: the ingest needs each of them anyway."""
    row, col, height, width = window
    tall, wide = dataset.block_shapes[0]
    top, left = row // tall * tall, col // wide * wide
    bottom = min(dataset.height, -(-(row + height) // tall) * tall)
    right = min(dataset.width, -(-(col + width) // wide) * wide)
    around = (top, left, bottom - top, right - left)
    file = find_range_file(dataset)
    return KeptPixels(None if file is None else file.identity, around, read_blocks(dataset, around))


def trim(near: KeptPixels, window: tuple[int, int, int, int]) -> KeptPixels:
    """Cut the pixels of blocks to a window and a margin around it, for grids that are a little larger or resampled."""
    (row, col, height, width), (top, left, tall, wide) = window, near.window
    row0, col0 = max(top, row - _MARGIN_PX), max(left, col - _MARGIN_PX)
    row1, col1 = min(top + tall, row + height + _MARGIN_PX), min(left + wide, col + width + _MARGIN_PX)
    pixels = near.pixels[row0 - top : row1 - top, col0 - left : col1 - left].copy()
    pixels.flags.writeable = False  # several shards may use them
    return KeptPixels(near.identity, (row0, col0, row1 - row0, col1 - col0), pixels)


def measure_blocks(dataset: DatasetReader, window: tuple[int, int, int, int]) -> float | None:
    """Return the mean stored bytes of the blocks that a window touches, of at most 64; None if it is not a TIFF.

    Args:
        dataset: The open file.
        window: (row, col, height, width).
    """
    if dataset.driver != "GTiff":
        return None
    row, col, height, width = window
    tall, wide = dataset.block_shapes[0]
    rows = range(row // tall, -(-(row + height) // tall))
    cols = range(col // wide, -(-(col + width) // wide))
    count = len(rows) * len(cols)
    if not count:
        return None
    chosen = np.unique(np.linspace(0, count - 1, min(count, _MEASURED_BLOCKS)).round().astype(int))
    try:
        spans = [block_span(dataset, rows[at // len(cols)], cols[at % len(cols)]) for at in chosen.tolist()]
    except BlockPlaceError:  # reading the block will report it
        return None
    return sum(stop - start for start, stop in (span or (0, 0) for span in spans)) / len(spans)
