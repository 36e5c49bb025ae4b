"""Resample one raster to another grid, so that the result never depends on how the grid is cut.

The geometry decides between four ways. A shared lattice is copied (bit-exact). A raster whose pixels hold whole target
pixels is repeated (exact), if the kernel is "nearest". If target pixels hold whole pixels of a raster of digital
numbers, and the kernel is "average", each becomes their exact mean. Everything else is warped by GDAL. The warp always
runs over the same canonical blocks, which begin at the origin of the CRS and not of the requested window, and always
from the same source pixels. So every window of the grid has the same bytes, and shards meet without seams.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Literal

import numpy as np
import numpy.typing as npt
from pyproj import CRS, Transformer
from rasterio.enums import Resampling
from rasterio.io import MemoryFile
from rasterio.vrt import WarpedVRT

from ingest.raster.average import MOST_FACTOR, average_onto
from ingest.raster.drivers import limit_raster_drivers
from ingest.raster.strips import WindowReader, read_once
from ingest.worker.meters import stage
from ingest.worker.slots import computing
from zarr_store.grid import Grid
from zarr_store.ground import ground_scale, ground_scale_at, turn_of, turn_towards, turned_near

__all__ = [
    "MARGIN_PX", "WindowReader", "axis_ratios", "nesting_factor", "pick_resampling", "place", "reach_margin",
    "reduction_factor", "scale_ratio",
]  # fmt: skip

Array = npt.NDArray[np.generic]


_BLOCK_PX = 256
"""Side of a canonical block, in pixels of the target."""
_MAX_SOURCE_PX = 4096
"""Longest side of the source window of a block, in pixels; blocks are halved to stay below it."""
MARGIN_PX = 6
"""Margin around a block in the source: cubic at pinned scale ≥ 1/2 reaches 4 pixels; the rest is for curvature."""
_STATISTICS = frozenset({"average", "mode"})
"""Kernels that look at the pixels under a target pixel and no others."""
_TOLERANCE_PX = 1e-6
"""Largest error of the approximate transform, in pixels."""
_ROUNDING_PX = 2e-6
"""Largest rounding error of the edge of a canonical block, in pixels of the target."""
_PLANE = "EPSG:3857"
"""A CRS for grids in pixels; as both grids of a warp have it, nothing is projected."""
_UNIT = 2.0
"""Side of a source pixel there: not 1, as GDAL takes the identity for no georeference; a power of two stays exact."""
_OUTLINE_POINTS = 33
"""Number of points along each side of a block that are transformed to the source."""


def scale_ratio(source: Grid, target: Grid) -> float:
    """Return target pixel size divided by source pixel size, both on the ground; above 1 the target is coarser."""
    return math.sqrt(math.prod(axis_ratios(source, target)))


def axis_ratios(source: Grid, target: Grid) -> tuple[float, float]:
    """Return `scale_ratio` along (x, y).

    Both are measured in the middle of the source, so they are the same for every window of the target.
    """
    (sx, sy), (tx, ty) = source.resolution, target.resolution
    if source.crs == target.crs:
        return tx / sx, ty / sy
    at_source, at_target = _scales(source, target.crs)
    return tx * at_target[0] / (sx * at_source[0]), ty * at_target[1] / (sy * at_source[1])


def pick_resampling(kind: Literal["data", "class"], source: Grid, target: Grid, wanted: str) -> str:
    """Choose the kernel for one asset: classes are never interpolated; coarsening averages, unless "nearest" is wanted.

    >>> fine, coarse = (Grid("EPSG:32633", (r, 0, 0, 0, -r, 0), (9, 9)) for r in (10.0, 20.0))
    >>> pick_resampling("data", fine, coarse, "bilinear"), pick_resampling("class", fine, coarse, "bilinear")
    ('average', 'mode')
    """
    ratio = max(axis_ratios(source, target))
    if kind == "class":
        return "mode" if ratio > 1.01 else "nearest"
    return "average" if ratio >= 1.99 and wanted != "nearest" else wanted


def nesting_factor(source: Grid, target: Grid) -> int:
    """Return the target pixels along one side of a source pixel, where the two lattices nest exactly; else 0."""
    if source.crs != target.crs:
        return 0
    (sx, sy), (tx, ty) = source.resolution, target.resolution
    factor = round(sx / tx)
    if factor < 1 or abs(sx - factor * tx) > 1e-9 * sx or abs(sy - factor * ty) > 1e-9 * sy:
        return 0
    col = (target.transform[2] - source.transform[2]) / tx
    row = (source.transform[5] - target.transform[5]) / ty
    return factor if abs(col - round(col)) < 1e-6 and abs(row - round(row)) < 1e-6 else 0


def place(
    read: WindowReader,
    source: Grid,
    target: Grid,
    resampling: str,
    *,
    dtype: npt.DTypeLike,
    nodata: float,
    out: Array | None = None,
    exact_edges: bool = True,
    exact_means: bool = True,
    block_rows: int = 1,
) -> Array:
    """Resample a raster to `target`.

    Args:
        read: Function that reads a window inside the raster; its pixels without data are already `nodata`.
        source: Grid of the raster.
        target: Grid of the result; may reach outside the raster.
        resampling: Name of a rasterio `Resampling`; has no effect where both share a lattice.
        dtype: Type of the source pixels and of the result.
        nodata: Value outside the raster and of pixels without data; such pixels have no weight.
        out: Array of type `dtype` that takes the result.
        exact_edges: Pixel edges that coincide on the ground are equal numbers for GDAL. False only as cubes of an
            earlier release were made: by rounding, a kernel then may look at pixels beside those under a target pixel.
        exact_means: Where target pixels hold whole source pixels, an average is their exact mean, halves rounded up,
            and nothing is read beside them. This holds for uint16 with `nodata` 0, and up to 128 pixels along a side.
            False only as cubes of an earlier release were made: GDAL rounds a half either way, and repeats pixels
            beside the edge of a raster.
        block_rows: Rows of a block of the file: windows that are read one after the other end there.

    Returns:
        `out`, or a fresh array: (height, width) of `target`.
    """
    if out is None:
        out = np.empty(target.shape, dtype)
    source = turn_towards(source, target)
    offset = source.offset_of(target)
    if offset is not None:
        _copy(read, source.shape, offset, nodata, out)
        return out
    factor = nesting_factor(source, target)
    under = reduction_factor(source, target) if exact_edges and exact_means else 0
    if factor > 1 and resampling == "nearest":
        _repeat(read, source, target, factor, nodata, out)
    elif 1 < under <= MOST_FACTOR and resampling == "average" and out.dtype == np.uint16 and nodata == 0:
        average_onto(read, source, target, under, out, block_rows)
    else:
        # whole pixels that lie under the target's: nothing beside them has a weight
        alone = under > 1 and resampling in _STATISTICS
        _warp(read, source, target, resampling, nodata, out, exact_edges=exact_edges, alone=alone,
              block_rows=block_rows)  # fmt: skip
    return out


def reduction_factor(source: Grid, target: Grid) -> int:
    """Return the source pixels along one side of a target pixel, where the two lattices nest exactly; else 0."""
    return nesting_factor(target, source)


def reach_margin(source: Grid, target: Grid) -> int:
    """Return the margin, in source pixels, that resampling may read around the pixels under a target."""
    if source.offset_of(target) is not None or reduction_factor(source, target) > 1:
        return 0
    return _margin(max(axis_ratios(source, target)))


def _margin(ratio: float) -> int:
    return math.ceil(MARGIN_PX * max(1.0, min(ratio, 2.0)))


def _copy(read: WindowReader, size: tuple[int, int], offset: tuple[int, int], nodata: float, out: Array) -> None:
    """Copy pixels that lie on the raster's own lattice; `offset` is the place of the first one in the raster."""
    shape = out.shape
    row0, col0 = max(0, offset[0]), max(0, offset[1])
    row1, col1 = min(size[0], offset[0] + shape[0]), min(size[1], offset[1] + shape[1])
    if (row1 - row0, col1 - col0) != shape:
        out[...] = nodata
    if row1 > row0 and col1 > col0:
        view = out[row0 - offset[0] : row1 - offset[0], col0 - offset[1] : col1 - offset[1]]
        pixels = read(row0, col0, row1 - row0, col1 - col0, into=view)
        if pixels is not view:
            view[...] = pixels


def _repeat(read: WindowReader, source: Grid, target: Grid, factor: int, nodata: float, out: Array) -> None:
    """Repeat each pixel of the raster `factor` times along both axes."""
    tx, ty = target.resolution
    col = round((target.transform[2] - source.transform[2]) / tx)
    row = round((source.transform[5] - target.transform[5]) / ty)
    row0, col0 = row // factor, col // factor
    row1, col1 = -(-(row + target.height) // factor), -(-(col + target.width) // factor)
    coarse = np.empty((row1 - row0, col1 - col0), out.dtype)
    _copy(read, source.shape, (row0, col0), nodata, coarse)
    top, left = row - row0 * factor, col - col0 * factor
    # along rows first, then whole rows: several times as fast as the reverse
    wide = coarse.repeat(factor, axis=1)[:, left : left + target.width]
    for phase in range(factor):
        rows = out[phase::factor]
        first = (top + phase) // factor
        rows[...] = wide[first : first + len(rows)]


def _warp(
    read: WindowReader,
    source: Grid,
    target: Grid,
    resampling: str,
    nodata: float,
    out: Array,
    *,
    exact_edges: bool,
    alone: bool,
    block_rows: int,
) -> None:
    """Warp a raster to the target, canonical block by canonical block."""
    dtype = out.dtype
    out[...] = nodata
    ratios = axis_ratios(source, target)
    ratio = max(ratios)
    side = _BLOCK_PX
    while side > 16 and side * ratio > _MAX_SOURCE_PX:
        side //= 2
    jobs = []
    for block, inside, cut in _canonical_blocks(target, side):
        window = _source_window(source, block, 0 if alone else _margin(ratio))
        if window is not None:
            jobs.append((block, inside, cut, window))
    if not jobs:
        return
    read_part = read_once(read, [window for *_, window in jobs], block_rows, dtype)
    for block, inside, cut, window in jobs:
        row, col, height, width = window
        pixels = read_part(row, col, height, width)
        with computing(), stage("warp", math.prod(block.shape) * np.dtype(dtype).itemsize):
            part = source.window(row, col, height, width)
            if exact_edges and source.crs == target.crs:
                part, block = _in_pixels(part, block)
            result = _warp_block(pixels, part, block, resampling, ratios, nodata)
        out[inside] = result[cut]


def _in_pixels(source: Grid, block: Grid) -> tuple[Grid, Grid]:
    """Return two grids of one CRS in pixels of the source, where edges that coincide are equal numbers.

    In map units an edge may miss the other by a rounding error, and `mode`, `average` and the other statistics of GDAL
    then take in a whole row or column of pixels beside the target pixel.
    """
    (sx, sy), (tx, ty) = source.resolution, block.resolution
    rx, ry = _snapped(tx / sx, 1e-9), _snapped(ty / sy, 1e-9)
    x = _snapped((block.transform[2] - source.transform[2]) / sx, _ROUNDING_PX * max(1.0, rx))
    y = _snapped((source.transform[5] - block.transform[5]) / sy, _ROUNDING_PX * max(1.0, ry))
    own = Grid(_PLANE, (_UNIT, 0.0, 0.0, 0.0, -_UNIT, 0.0), source.shape)
    return own, Grid(_PLANE, (rx * _UNIT, 0.0, x * _UNIT, 0.0, -ry * _UNIT, -y * _UNIT), block.shape)


def _snapped(pixels: float, error: float) -> float:
    """Return a number of pixels without its rounding error, where it is one of few decimals.

    >>> _snapped(494.999999, 6e-6), _snapped(0.0003 / 0.0001, 1e-9), _snapped(4 / 3, 1e-9)
    (495.0, 3.0, 1.3333333333333333)
    """
    near = round(pixels, 3)
    return near if abs(pixels - near) < error else pixels


def _warp_block(
    pixels: Array, source: Grid, block: Grid, resampling: str, ratios: tuple[float, float], nodata: float
) -> Array:
    """Warp one block with GDAL, through a VRT because `rasterio.warp.reproject` ignores `tolerance` before 1.5."""
    profile = {
        "driver": "GTiff",
        "height": source.height,
        "width": source.width,
        "count": 1,
        "dtype": pixels.dtype,
        "crs": _crs(source.crs),
        "transform": source.affine,
    }
    limit_raster_drivers()
    with MemoryFile() as memory:
        with memory.open(**profile) as fresh:
            fresh.write(pixels, 1)
        with (
            memory.open() as dataset,
            WarpedVRT(
                dataset,
                src_nodata=nodata,
                nodata=nodata,
                crs=_crs(block.crs),
                transform=block.affine,
                height=block.height,
                width=block.width,
                resampling=Resampling[resampling],
                # in pixels; the default of 0.125 would approximate each row of the window by its own chord
                tolerance=_TOLERANCE_PX,
                # otherwise GDAL derives the kernel's width from the shape of each window
                XSCALE=min(1.0, 1.0 / ratios[0]),
                YSCALE=min(1.0, 1.0 / ratios[1]),
                SOURCE_EXTRA=MARGIN_PX,
            ) as warped,
        ):
            return np.asarray(warped.read(1))


def _canonical_blocks(target: Grid, side: int) -> Iterator[tuple[Grid, tuple[slice, slice], tuple[slice, slice]]]:
    """Yield the blocks of `side` pixels, counted from the origin of the CRS, that a target touches.

    Yields:
        (block, its place in the target, the part of the block that lies in the target).
    """
    rx, ry = target.resolution
    # pixels from the origin of the CRS; after rounding, every window of one grid has the same fraction
    x, y = round(target.transform[2] / rx, 6), round(-target.transform[5] / ry, 6)
    col0, row0 = math.floor(x), math.floor(y)
    fraction_x, fraction_y = round(x - col0, 6), round(y - row0, 6)
    for by in range(row0 // side, -(-(row0 + target.height) // side)):
        for bx in range(col0 // side, -(-(col0 + target.width) // side)):
            transform = (rx, 0.0, (bx * side + fraction_x) * rx, 0.0, -ry, -(by * side + fraction_y) * ry)
            block = Grid(target.crs, transform, (side, side))
            inside, cut = [], []
            for first, start, size in ((by * side, row0, target.height), (bx * side, col0, target.width)):
                low, high = max(first, start), min(first + side, start + size)
                inside.append(slice(low - start, high - start))
                cut.append(slice(low - first, high - first))
            yield block, (inside[0], inside[1]), (cut[0], cut[1])


def _source_window(source: Grid, block: Grid, margin: int) -> tuple[int, int, int, int] | None:
    """Return (row, col, height, width) of the source pixels that a block can depend on; None where there are none."""
    left, bottom, right, top = block.bounds
    along = np.linspace(0.0, 1.0, _OUTLINE_POINTS)
    xs = np.concatenate([left + (right - left) * along, np.full(_OUTLINE_POINTS, right)] * 2)
    ys = np.concatenate(
        [
            np.full(_OUTLINE_POINTS, top),
            bottom + (top - bottom) * along,
            np.full(_OUTLINE_POINTS, bottom),
            bottom + (top - bottom) * along,
        ]
    )
    xs[3 * _OUTLINE_POINTS :] = left
    if block.crs != source.crs:
        xs, ys = _transformer(block.crs, source.crs).transform(xs, ys)
        finite = np.isfinite(xs) & np.isfinite(ys)
        if not finite.any():
            return None
        xs, ys = xs[finite], ys[finite]
        xs = turned_near(xs, (source.bounds[0] + source.bounds[2]) / 2.0, turn_of(source.crs))
    rx, ry = source.resolution
    cols, rows = (xs - source.transform[2]) / rx, (source.transform[5] - ys) / ry
    if not margin:  # edges coincide but for rounding
        cols, rows = np.round(cols, 5), np.round(rows, 5)
    row0, col0 = max(0, math.floor(rows.min()) - margin), max(0, math.floor(cols.min()) - margin)
    row1, col1 = min(source.height, math.ceil(rows.max()) + margin), min(source.width, math.ceil(cols.max()) + margin)
    return (row0, col0, row1 - row0, col1 - col0) if row1 > row0 and col1 > col0 else None


@functools.lru_cache(maxsize=4096)
def _scales(source: Grid, crs: str) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return the ground scale of the source's CRS and of another one, in the middle of the source."""
    left, bottom, right, top = source.bounds
    x, y = _transformer(source.crs, crs).transform((left + right) / 2.0, (bottom + top) / 2.0)
    return ground_scale(source), ground_scale_at(crs, float(x), float(y))


@functools.lru_cache(maxsize=64)
def _crs(crs: str) -> str:
    return crs if crs.startswith("EPSG:") else CRS(crs).to_wkt("WKT2_2019")


@functools.lru_cache(maxsize=64)
def _transformer(source: str, target: str) -> Transformer:
    return Transformer.from_crs(source, target, always_xy=True)
