"""`Coverage`: how much of the region a scene shows, and how much of that clouds hide, measured on its pixels.

A catalogue states the cloud cover of the whole tile, and the footprint is often the tile's square although the swath
ends within it. The class layer shows both for the region alone. It is read at full resolution where the region is
small, else from the overviews of a GeoTIFF. Levels of a JPEG 2000 file are averages, so classes are never read from
them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ingest.pixels.clip import area_of, clip_text, inside_of
from ingest.pixels.mask import NO_DATA_CLASS
from ingest.plan.target import project_bounds, region_lonlat
from ingest.raster.blocks import BlockReader, check_streams
from ingest.raster.gdal_read import read_window
from ingest.raster.kept import KeptPixels
from ingest.raster.ranges import blocks_of, find_range_file
from ingest.request.config import IngestConfig
from ingest.scenes.scene import AssetRef
from zarr_store.errors import InvalidInput
from zarr_store.grid import Grid
from zarr_store.ground import turn_of

if TYPE_CHECKING:
    from rasterio.io import DatasetReader

__all__ = ["Coverage", "choose_coverage_band", "find_window", "measure_coverage", "read_blocks"]

Bool = npt.NDArray[np.bool_]

_WHOLE_PX = 1 << 22
"""Largest region, in pixels, that is read at full resolution."""
_SIDE_PX = 512
"""Side of a decimated read and of a scattered window, in pixels."""
_PARTS = 3
"""Number of scattered windows along each side."""


@dataclass(frozen=True)
class Coverage:
    """The coverage of the region by a scene.

    Attributes:
        valid: Share of the region, or of the scene's raster where that is smaller, that has data; None where only parts
            of the raster were read.
        hidden: Share of the pixels with data in the region that are of masked classes; None without a class layer or
            without data.
        negative: Share of the pixels with data that are below 0; None for a class layer or without data.
    """

    valid: float | None
    hidden: float | None
    negative: float | None = None


def choose_coverage_band(assets: Mapping[str, AssetRef], mask_layer: str | None) -> str | None:
    """Choose the band that coverage is measured on: the layer for masks, else the first data band; None for neither.

    Args:
        assets: Assets of a scene, by band.
        mask_layer: Class layer of its product that masks are made from.
    """
    if mask_layer in assets:
        return mask_layer
    return next((band for band, asset in assets.items() if asset.kind == "data"), None)


def measure_coverage(
    dataset: DatasetReader, grid: Grid, asset: AssetRef, config: IngestConfig, *, near: KeptPixels | None = None
) -> Coverage | None:
    """Measure how the scene of an open file covers the region of `config`, or its own raster where there is no region.

    Args:
        dataset: Open file of the band that `choose_coverage_band` chose.
        grid: Grid of the file.
        asset: The asset as the metadata describe it.
        config: Region and masked classes.
        near: Pixels of the file that were read before.

    Returns:
        None where the raster does not reach the region.
    """
    place = _window(grid, config)
    if place is None:
        return None
    (row, col, height, width), region_px = place
    is_class = asset.kind == "class"
    if height * width > _WHOLE_PX and (file := find_range_file(dataset)) is not None:
        file.keep = None  # averages, and windows here and there, are of no use for the ingest
    if height * width <= _WHOLE_PX:
        known = near.cut(near.identity, (row, col, height, width)) if near is not None else None
        pixels = known if known is not None else read_blocks(dataset, (row, col, height, width))
        parts = [(grid.window(row, col, height, width), pixels)]
    elif dataset.overviews(1) and not (is_class and dataset.driver != "GTiff"):
        parts = [_decimated(dataset, grid, (row, col, height, width))]
    else:
        windows = _scattered((row, col, height, width))
        parts = [(grid.window(*window), read_blocks(dataset, window)) for window in windows]
    complete = len(parts) == 1
    clip = clip_text(config.selection.geometry) if config.pixels.clip else None
    empty = {value for value in (asset.nodata, dataset.nodata) if value is not None}
    counted = with_data = hidden = negative = 0
    for part, pixels in parts:
        inside = inside_of(clip, part)
        valid = _has_data(pixels, is_class, empty)
        valid = valid if inside is None else valid & inside
        counted += pixels.size if inside is None else int(inside.sum())
        with_data += int(valid.sum())
        if is_class:
            hidden += int((valid & np.isin(pixels, config.pixels.mask_classes)).sum())
        else:
            negative += int((valid & (pixels < 0)).sum())
    if clip is not None:
        region_px = area_of(clip, grid.crs) / math.prod(grid.resolution)
    # share of the region, or of the whole raster where the region is larger
    reach = counted / parts[0][1].size * height * width / max(1.0, min(region_px, float(grid.height * grid.width)))
    return Coverage(
        valid=round(min(1.0, with_data / counted * reach), 6) if complete and counted else None,
        hidden=round(hidden / with_data, 4) if is_class and with_data else None,
        negative=round(negative / with_data, 4) if not is_class and with_data else None,
    )


def find_window(grid: Grid, config: IngestConfig) -> tuple[int, int, int, int] | None:
    """Return (row, col, height, width) of the region in a raster; None where it is too large to be read whole."""
    if region_lonlat(config) is None:
        return None
    place = _window(grid, config)
    return place[0] if place is not None and place[0][2] * place[0][3] <= _WHOLE_PX else None


def _window(grid: Grid, config: IngestConfig) -> tuple[tuple[int, int, int, int], float] | None:
    """Return the window (row, col, height, width) of the region in the raster, and the pixels of the whole region."""
    region = region_lonlat(config)
    if region is None:
        return (0, 0, grid.height, grid.width), float(grid.height * grid.width)
    try:
        left, bottom, right, top = project_bounds(region, grid.crs)
    except InvalidInput:  # the region has no place in this zone
        return None
    (rx, ry), (x0, _, x1, y1) = grid.resolution, grid.bounds
    if turn := turn_of(grid.crs):
        turns = round(((x0 + x1) - (left + right)) / 2.0 / turn) * turn
        left, right = left + turns, right + turns
    row0, row1 = max(0, math.floor((y1 - top) / ry + 1e-6)), min(grid.height, math.ceil((y1 - bottom) / ry - 1e-6))
    col0, col1 = max(0, math.floor((left - x0) / rx + 1e-6)), min(grid.width, math.ceil((right - x0) / rx - 1e-6))
    if row1 <= row0 or col1 <= col0:
        return None
    return (row0, col0, row1 - row0, col1 - col0), (right - left) * (top - bottom) / (rx * ry)


def read_blocks(dataset: DatasetReader, window: tuple[int, int, int, int]) -> npt.NDArray[Any]:
    """Read a window (row, col, height, width) of an open file at full resolution."""
    from rasterio.windows import Window

    row, col, height, width = window
    file = find_range_file(dataset)
    blocks = BlockReader.of(dataset, file) if file is not None else None
    if blocks is not None:
        return blocks.read(row, col, height, width)
    if file is not None:
        file.fetch(blocks_of(dataset, window))
        check_streams(dataset, file, window)
    return read_window(dataset, window=Window(col, row, width, height))


def _decimated(dataset: DatasetReader, grid: Grid, window: tuple[int, int, int, int]) -> tuple[Grid, npt.NDArray[Any]]:
    from rasterio.windows import Window

    row, col, height, width = window
    step = max(1, -(-max(height, width) // _SIDE_PX))
    shape = (-(-height // step), -(-width // step))
    pixels = read_window(dataset, window=Window(col, row, width, height), out_shape=shape)
    left, _, _, top = grid.window(row, col, height, width).bounds
    rx, ry = grid.resolution
    return Grid(grid.crs, (rx * width / shape[1], 0.0, left, 0.0, -ry * height / shape[0], top), shape), pixels


def _scattered(window: tuple[int, int, int, int]) -> list[tuple[int, int, int, int]]:
    """Return small windows that are spread evenly over a large one."""
    row, col, height, width = window
    side = min(_SIDE_PX, height, width)
    along = [(2 * n + 1) / (2 * _PARTS) for n in range(_PARTS)]
    return [
        (row + round(y * (height - side)), col + round(x * (width - side)), side, side) for y in along for x in along
    ]


def _has_data(pixels: npt.NDArray[Any], is_class: bool, empty: set[float]) -> Bool:
    if is_class:
        return np.asarray(pixels != NO_DATA_CLASS, bool)
    valid = np.isfinite(pixels) & (pixels != 0)
    for value in empty:
        if math.isfinite(value):
            valid &= pixels != value
    return np.asarray(valid, bool)
