"""`Overview`: a smaller copy of the pixels inside a GeoTIFF, for grids that are at least twice as coarse.

A cube is made from all pixels of a file, unless `--overviews` asks for these copies. They are whatever the maker of the
file made of its pixels, so each one is checked before it is used: its place, its type, its blocks, and that pixels
without data had no weight in it. One that does not fit is not used, with the reason. Classes are never read from it.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import rasterio

from ingest.raster.blocks import ContradictionError, Packing
from ingest.raster.directory import GDAL_METADATA, NODATA, Directory
from ingest.raster.gdal_read import has_mask
from ingest.raster.lru import LruCache
from ingest.raster.ranges import RangeFile, block_span
from ingest.raster.resample import axis_ratios
from zarr_store.grid import Grid

__all__ = [
    "AT_LEAST",
    "ROUNDING",
    "UNSTATED",
    "Overview",
    "Overviews",
    "choose_overview",
    "find_overviews",
    "overview_cache",
]

_MAX_BLOCKS = 2048
"""Largest number of blocks of an overview: one of 10 980² pixels at 1/2 in blocks of 256 has 484."""
_BLOCK_BYTES = 8 << 20
"""Decoded bytes that a block may have, also where those of the file have fewer: 2048² pixels of 16 bits."""
_FILES = 1024
"""Number of files whose overviews one process remembers."""
AT_LEAST = 1.99
"""Smallest ratio of the pixels of the target to those of the file at which pixels are averaged, as for full images."""
ROUNDING = 1.001
"""Largest ratio of overview pixels to target pixels: 1,373 pixels of 10,980 are not exactly an eighth."""
_STATED = re.compile(r'<Item name="RESAMPLING"[^<>]{0,200}>([A-Za-z0-9_]{1,40})</Item>')
UNSTATED = "not stated"
"""Resampling of an overview whose file does not state it."""


@dataclass(frozen=True)
class Overview:
    """One overview of a file.

    Attributes:
        factor: How many pixels of the file lie along one of its pixels, rounded.
        grid: Its grid, which covers the same ground as the file.
        resampling: How its pixels were made, as the file states it in lower case: "average", "nearest" and so on.
        packing: Packing of its blocks.
        spans: Array (rows, columns, 2) of the first byte of each block and the first after it.
    """

    factor: int
    grid: Grid
    resampling: str
    packing: Packing
    spans: npt.NDArray[np.int64] = field(compare=False)

    def block_bytes(self, window: tuple[int, int, int, int]) -> float:
        """Return the mean stored bytes of the blocks that a window (row, col, height, width) of the file touches."""
        (tall, wide), (rows, cols) = self.packing.block, self.spans.shape[:2]
        row, col, height, width = (value / self.factor for value in window)
        top, left = min(int(row) // tall, rows - 1), min(int(col) // wide, cols - 1)
        bottom, right = max(top + 1, int(-(-(row + height) // tall))), max(left + 1, int(-(-(col + width) // wide)))
        touched = self.spans[top:bottom, left:right]
        return float((touched[..., 1] - touched[..., 0]).mean())


@dataclass(frozen=True)
class Overviews:
    """The overviews of one file that can be used, the finest first.

    Attributes:
        usable: These overviews.
        refusal: Why others are not used; empty where all are.
    """

    usable: tuple[Overview, ...] = ()
    refusal: str = ""


class Reduced(Protocol):
    """An overview, or what is known of one."""

    @property
    def factor(self) -> int: ...
    @property
    def grid(self) -> Grid: ...


R = TypeVar("R", bound=Reduced)


@functools.lru_cache(maxsize=2)
def overview_cache(pid: int) -> LruCache[Overviews]:
    """Return the cache of overviews of the files that were read last, by version; one cache per process."""
    return LruCache(_FILES)


def choose_overview(usable: Iterable[R], grid: Grid, target: Grid) -> R | None:
    """Choose the coarsest overview whose pixels are no larger than those of the target; None for the file itself.

    Args:
        usable: Overviews of the file.
        grid: Grid of the file.
        target: Grid of the result.
    """
    if min(axis_ratios(grid, target)) < AT_LEAST:
        return None
    fitting = [one for one in usable if min(axis_ratios(one.grid, target)) * ROUNDING >= 1.0]
    return max(fitting, key=lambda one: one.factor, default=None)


def find_overviews(dataset: rasterio.io.DatasetReader, file: RangeFile | None, grid: Grid) -> Overviews:
    """Find the overviews of an open file of reflectance, and check them.

    Args:
        dataset: The open file.
        file: Its bytes.
        grid: Its grid.

    Raises:
        ContradictionError: GDAL finds blocks of an overview elsewhere than the tags of the file state.
    """
    if dataset.driver != "GTiff" or file is None:
        return Overviews(refusal="only those of GeoTIFF files are used")
    factors = [int(factor) for factor in dataset.overviews(1)]
    if not factors:
        return Overviews(refusal="it has none")
    if dataset.nodata != 0:
        # without it, zeros beside a swath were averaged with its pixels
        stated = "no nodata value" if dataset.nodata is None else f"nodata {dataset.nodata:g}"
        return Overviews(refusal=f"the file states {stated}, expected 0")
    if has_mask(dataset):
        return Overviews(refusal="the file has a mask")
    directories = Directory.of_overviews(file)
    if directories is None or len(directories) != len(factors):
        return Overviews(refusal="their directories cannot be read without GDAL")
    usable, refusals = [], []
    for number, (factor, (directory, texts)) in enumerate(zip(factors, directories, strict=True)):
        reason = _refusal(dataset, factor, directory, texts)
        spans = None if reason or directory is None else _spans(dataset, file, number, directory)
        if directory is None or spans is None:
            refusals.append(f"1/{factor}: {reason or 'it leaves out blocks'}")
            continue
        found = _STATED.search(texts.get(GDAL_METADATA, ""))
        packing = Packing(directory.block, directory.dtype, directory.compression, str(directory.predictor))
        resampling = found[1].lower() if found else UNSTATED
        usable.append(Overview(factor, _stretched(grid, directory.shape), resampling, packing, spans))
    usable.sort(key=lambda one: one.factor)
    return Overviews(tuple(usable), "; ".join(refusals))


def _refusal(
    dataset: rasterio.io.DatasetReader, factor: int, directory: Directory | None, texts: Mapping[int, str]
) -> str:
    """Return why an overview is not used; empty where it can be."""
    if directory is None:
        return "its blocks cannot be decoded without GDAL"
    packing = Packing(directory.block, directory.dtype, directory.compression, str(directory.predictor))
    expected = tuple(-(-size // factor) for size in dataset.shape)
    if factor < 2 or any(abs(is_ - size) > 1 for is_, size in zip(directory.shape, expected, strict=True)):
        tall, wide = directory.shape
        return f"it has {tall}×{wide} pixels, expected {expected[0]}×{expected[1]}"
    if directory.dtype != dataset.dtypes[0]:
        return f"it holds {directory.dtype}, the file {dataset.dtypes[0]}"
    if not packing.decodable or math.prod(_counts(directory)) > _MAX_BLOCKS:
        return "its blocks cannot be decoded without GDAL"
    itemsize = np.dtype(directory.dtype).itemsize
    if math.prod(directory.block) * itemsize > max(math.prod(dataset.block_shapes[0]) * itemsize, _BLOCK_BYTES):
        return f"its blocks of {directory.block[0]}×{directory.block[1]} pixels are larger than those of the file"
    stated = texts.get(NODATA)
    if stated is not None and _number(stated) != dataset.nodata:
        return f"it states nodata {stated[:20]}, the file {dataset.nodata:g}"
    return ""


def _spans(
    dataset: rasterio.io.DatasetReader, file: RangeFile, number: int, directory: Directory
) -> npt.NDArray[np.int64] | None:
    """Locate the blocks of an overview by its tags, and check them against GDAL; None where one is left out.

    Raises:
        ContradictionError: GDAL finds them elsewhere.
    """
    tagged = directory.spans(file)
    rows, cols = _counts(directory)
    if tagged is None or (tagged[..., 1] <= tagged[..., 0]).any():
        return None
    for y in range(rows):
        for x in range(cols):
            if block_span(dataset, y, x, overview=number, block=directory.block) != tuple(tagged[y, x].tolist()):
                raise ContradictionError(
                    "GDAL finds blocks of an overview elsewhere than the tags of the file state: it is damaged"
                )
    return tagged


def _counts(directory: Directory) -> tuple[int, int]:
    """Return the number of blocks along (y, x)."""
    (height, width), (tall, wide) = directory.shape, directory.block
    return -(-height // tall), -(-width // wide)


def _stretched(grid: Grid, shape: tuple[int, int]) -> Grid:
    """Return the ground of a grid in fewer pixels; the pixel size changes where the factor does not divide a side."""
    a, b, c, d, e, f = grid.transform
    return Grid(grid.crs, (a * grid.width / shape[1], b, c, d, e * grid.height / shape[0], f), shape)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
