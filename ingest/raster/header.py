"""`RasterHeader`: what the header of a raster file says, as far as reading its pixels needs it.

Opening a file costs GDAL as much time as decoding some blocks, and all shards of a cube that lie in one scene read the
same files. So the headers of the files read last stay with the process (`ingest.raster.access.headers`), by the version of the
file, and blocks that can be decoded without GDAL are then found without it.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import numpy.typing as npt
import rasterio
from rasterio.enums import ColorInterp

from ingest.raster.blocks import ContradictionError, Packing
from ingest.raster.directory import Directory
from ingest.raster.ranges import RangeFile, block_span
from zarr_store.errors import InvalidInput
from zarr_store.grid import Grid, check_on_earth, normal_crs

__all__ = ["RasterHeader", "grid_of"]

_MOST_BLOCKS = 2048
"""Of a file whose header is kept: 10 980² pixels in blocks of 256 have 1,849, which are 30 kB."""

_FARTHEST_PX = 1 << 32
"""From the origin of a CRS, in pixels: beyond that the numbers of a grid no longer tell its pixels apart."""
_SMALLEST = 1e-12
"""A pixel, in units of the CRS."""


@dataclass(frozen=True)
class RasterHeader:
    """The header of one file.

    Attributes:
        grid: Where its pixels lie.
        dtype: Of its pixels.
        nodata: Value of pixels without data.
        palette: Whether its numbers are colours.
        packing: How its blocks are packed; None where only GDAL can decode them.
        spans: (rows, columns, 2) first byte of each block, and the first behind it; None where a block is left out, or
            there are too many.
    """

    grid: Grid
    dtype: str
    nodata: float | None
    palette: bool
    packing: Packing | None
    spans: npt.NDArray[np.int64] | None = field(compare=False)

    @classmethod
    def of(cls, dataset: rasterio.io.DatasetReader, file: RangeFile | None) -> Self:
        """The header of an open file.

        Raises:
            InvalidInput: It has no CRS, or a rotated or south-up transform.
        ContradictionError: GDAL reads it otherwise than its tags state.
        """
        packing = Packing.of(dataset, file) if file is not None else None
        return cls(
            grid_of(dataset),
            str(dataset.dtypes[0]),
            None if dataset.nodata is None else float(dataset.nodata),
            dataset.colorinterp[0] == ColorInterp.palette,
            packing,
            _spans(dataset, file, packing) if packing is not None and file is not None else None,
        )

    @property
    def suffices(self) -> bool:
        """Whether every pixel can be read without GDAL."""
        return self.packing is not None and self.spans is not None


def grid_of(dataset: rasterio.io.DatasetReader) -> Grid:
    """The grid that the file header states.

    Raises:
        InvalidInput: No CRS, a rotated or south-up transform, or numbers that are no place on Earth.
    """
    if dataset.crs is None:
        raise InvalidInput("the file has no coordinate reference system")
    crs = _crs_name(dataset.crs.to_wkt())
    a, b, c, d, e, f = (float(v) for v in dataset.transform[:6])
    far = max(abs(c), abs(f), abs(a) * dataset.width, abs(e) * dataset.height)
    small = min(abs(a), abs(e))
    if not (small > _SMALLEST and small * _FARTHEST_PX > far and math.isfinite(far + abs(b) + abs(d))):
        raise InvalidInput(f"the file states a place that no pixel has: origin {c:g}, {f:g}, pixels of {a:g} by {e:g}")
    grid = Grid(crs, (a, b, c, d, e, f), (int(dataset.height), int(dataset.width)))
    check_on_earth(grid)
    return grid


@functools.lru_cache(64)
def _crs_name(wkt: str) -> str:
    """As a grid spells it; PROJ's search for a code takes as long as decoding some blocks."""
    code = rasterio.crs.CRS.from_wkt(wkt).to_epsg()
    return f"EPSG:{code}" if code else normal_crs(wkt)


def _spans(dataset: rasterio.io.DatasetReader, file: RangeFile, packing: Packing) -> npt.NDArray[np.int64] | None:
    """Where GDAL finds the blocks, which must be where the tags say; None where one is left out, or there are many."""
    tall, wide = packing.block
    rows, cols = -(-dataset.height // tall), -(-dataset.width // wide)
    if rows * cols > _MOST_BLOCKS:
        return None
    directory = Directory.of(file)
    tagged = directory.spans(file) if directory is not None else None
    spans = np.empty((rows, cols, 2), np.int64)
    for y in range(rows):
        for x in range(cols):
            span = block_span(dataset, y, x)
            if span is None:
                return None
            spans[y, x] = span
    if tagged is None or not np.array_equal(spans, tagged):
        raise ContradictionError("GDAL finds blocks of the file elsewhere than its tags state: it is damaged")
    return spans
