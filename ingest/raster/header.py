"""`RasterHeader`: the parts of the header of a raster file that reading its pixels needs.

To open a file costs GDAL as much time as to decode some blocks, and all shards of a cube that lie in one scene read the
same files. So each process keeps the headers of the files that it read last (`ingest.raster.access.header_cache`), by
the version of the file. Blocks that can be decoded without GDAL are then also located without it.
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
from ingest.raster.directory import Directory, tables_readable
from ingest.raster.gdal_read import has_mask
from ingest.raster.ranges import RangeFile, block_span
from ingest.raster.values import Stated
from zarr_store.errors import InvalidInput
from zarr_store.grid import Grid, check_on_earth, normal_crs

__all__ = ["RasterHeader", "grid_of"]

_MAX_BLOCKS = 2048
"""Largest number of blocks of a file whose header is kept: 10 980² pixels in blocks of 256 have 1,849, or 30 kB."""

_FARTHEST_PX = 1 << 32
"""Largest distance from the origin of a CRS, in pixels: beyond it a grid's numbers cannot tell its pixels apart."""
_SMALLEST = 1e-12
"""Smallest side of a pixel, in units of the CRS."""


@dataclass(frozen=True)
class RasterHeader:
    """The header of one file.

    Attributes:
        grid: Grid of its pixels.
        dtype: Type of its pixels.
        nodata: Value of pixels without data.
        palette: Whether its numbers stand for colours of a palette.
        packing: Packing of its blocks; None where only GDAL can decode them.
        spans: Array (rows, columns, 2) of the first byte of each block and the first after it; None where a block is
            left out, or there are too many.
        stated: Scale, offset and unit that the file states.
        masked: Whether the file has a mask, which GDAL reads.
    """

    grid: Grid
    dtype: str
    nodata: float | None
    palette: bool
    packing: Packing | None
    spans: npt.NDArray[np.int64] | None = field(compare=False)
    stated: Stated = field(default_factory=Stated)
    masked: bool = False

    @classmethod
    def of(cls, dataset: rasterio.io.DatasetReader, file: RangeFile | None) -> Self:
        """Read the header of an open file.

        Raises:
            InvalidInput: The file has no CRS, or a rotated or south-up transform.
            ContradictionError: GDAL reads something else than the tags of the file state, or they name places that the
                file does not have.
        """
        if dataset.driver == "GTiff" and file is not None and not tables_readable(file):
            raise ContradictionError("the table of its blocks cannot be read: the file is damaged or cut short")
        packing = Packing.of(dataset, file) if file is not None else None
        return cls(
            grid_of(dataset),
            str(dataset.dtypes[0]),
            None if dataset.nodata is None else float(dataset.nodata),
            dataset.colorinterp[0] == ColorInterp.palette,
            packing,
            _spans(dataset, file, packing) if packing is not None and file is not None else None,
            Stated.of(dataset),
            has_mask(dataset),
        )

    @property
    def suffices(self) -> bool:
        """Whether every pixel can be read without GDAL."""
        return self.packing is not None and self.spans is not None and not self.masked


def grid_of(dataset: rasterio.io.DatasetReader) -> Grid:
    """Return the grid that the file header states.

    Raises:
        InvalidInput: The file has no CRS, a rotated or south-up transform, or a place that is not on Earth.
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
    """Return the CRS as a grid spells it, cached: PROJ's search for a code takes as long as decoding some blocks."""
    code = rasterio.crs.CRS.from_wkt(wkt).to_epsg()
    return f"EPSG:{code}" if code else normal_crs(wkt)


def _spans(dataset: rasterio.io.DatasetReader, file: RangeFile, packing: Packing) -> npt.NDArray[np.int64] | None:
    """Locate all blocks by GDAL and check them against the tags; None where one is left out, or there are too many.

    Raises:
        ContradictionError: The tags state other places.
    """
    tall, wide = packing.block
    rows, cols = -(-dataset.height // tall), -(-dataset.width // wide)
    if rows * cols > _MAX_BLOCKS:
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
