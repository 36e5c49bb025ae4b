"""Masking: which pixels of one source's window are observed, and which of them are masked.

A pixel is observed where every band has a value; 0 is one where the other bands and the class show that a provider
clipped a dark pixel there. It is masked where its class is among the masked ones: cloud, shadow
and so on. Growing the mask needs pixels beyond the window, so classes are read with a halo, and shards have no seams.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from zarr_store.grid import Grid

__all__ = ["clipped_pixels", "disc", "halo_pixels", "mask_classes", "observed"]

Bool = npt.NDArray[np.bool_]
Scale = tuple[float, float]
"""Metres on the ground in one unit of a CRS, along x and y."""
NO_DATA_CLASS = 0
"""Class value of pixels without data."""
_NEVER = 100
"""Count of zero bands of a pixel that is no clipped one; more than any product has bands."""
_STRIP_PIXELS = 1 << 18
"""Pixels that are compared at once, so that they stay in the processor's cache."""


def observed(bands: Sequence[npt.NDArray[np.generic]], classes: npt.NDArray[np.uint8] | None) -> Bool:
    """Return the pixels where every band has a value and, if classes are given, the class is not 0.

    Args:
        bands: Arrays (y, x); no data is 0 in whole numbers and NaN in floats.
        classes: Class layer (y, x), or None.

    Returns:
        (y, x).
    """
    seen: Bool = _has_value(bands[0])
    for band in bands[1:]:
        seen &= _has_value(band)
    if classes is not None:
        seen &= classes != NO_DATA_CLASS
    return seen


_DARK_DN = (50, 2000)
"""Range of the brightest other band of a pixel that is dark ground, and no smeared edge of a swath and no hole."""


def clipped_pixels(
    bands: Sequence[npt.NDArray[np.uint16]],
    classes: npt.NDArray[np.uint8] | None,
    *,
    may_be_zero: Sequence[bool],
    finest: Sequence[bool],
) -> Bool:
    """Return the pixels of which some bands hold 0 as a number: reflectance that a provider clipped, and not "no data".

    Such a pixel has a value in another band of the finest pixels, and a class that is not 0: classes are made of all
    bands together. Without classes the other bands decide: at least half of them have a value, and it is dark.

    Args:
        bands: Numbers (y, x), 0 where there is no data or a clipped value.
        classes: Class layer (y, x), or None.
        may_be_zero: Whether 0 may be a number of the band: not where its file has a mask or another nodata value.
        finest: Whether the band has the smallest pixels: at the edge of a swath larger pixels reach beyond it.

    Returns:
        (y, x).

    >>> nir, blue = np.array([[0, 0, 900]], np.uint16), np.array([[0, 250, 250]], np.uint16)
    >>> clipped_pixels([blue, nir], None, may_be_zero=[True, True], finest=[True, True]).tolist()
    [[False, True, False]]
    """
    count = np.zeros(bands[0].shape, np.uint8)
    some = np.zeros(bands[0].shape, bool)
    for band, fine, may in zip(bands, finest, may_be_zero, strict=True):
        zero = band == 0
        count += zero
        count[zero & (not may)] = _NEVER
        if fine:
            some |= ~zero
    clipped: Bool = some & (count > 0) & (count < _NEVER)
    if classes is not None:
        clipped &= classes != NO_DATA_CLASS
    elif clipped.any():
        brightest = functools.reduce(np.maximum, bands)
        clipped &= (2 * count <= len(bands)) & (brightest >= _DARK_DN[0]) & (brightest <= _DARK_DN[1])
    return clipped


def _has_value(band: npt.NDArray[np.generic]) -> Bool:
    return np.asarray(np.isfinite(band) if band.dtype.kind == "f" else band != 0, bool)


def halo_pixels(grid: Grid, dilate_m: float, scale: Scale | None = None) -> tuple[int, int]:
    """Return rows and columns of the halo: masked pixels this far outside a window reach into it when they grow."""
    width, height = _pixel_m(grid, scale)
    return (math.floor(dilate_m / height + 1e-9), math.floor(dilate_m / width + 1e-9))


def disc(grid: Grid, dilate_m: float, scale: Scale | None = None) -> Bool:
    """Return the pixels whose centre lies within `dilate_m` metres of the middle pixel, as an array with odd sides."""
    rows, cols = halo_pixels(grid, dilate_m, scale)
    width, height = _pixel_m(grid, scale)
    y, x = np.mgrid[-rows : rows + 1, -cols : cols + 1]
    inside: Bool = (x * width) ** 2 + (y * height) ** 2 <= dilate_m**2 * (1 + 1e-9)
    return inside


def _pixel_m(grid: Grid, scale: Scale | None) -> tuple[float, float]:
    """Return the width and height of a pixel on the ground, in metres."""
    rx, ry = grid.resolution
    if scale is None:
        return rx / grid.units_per_metre, ry / grid.units_per_metre
    return rx * scale[0], ry * scale[1]


def _among(classes: npt.NDArray[np.uint8], values: Sequence[int]) -> Bool:
    """Return the pixels whose class is among `values`; strips of comparisons are six times as fast as a table."""
    matches = np.zeros(classes.shape, bool)
    rows = max(1, _STRIP_PIXELS // max(1, classes.shape[1]))
    for top in range(0, len(classes), rows):
        strip = slice(top, top + rows)
        for value in values:
            matches[strip] |= classes[strip] == value
    return matches


def mask_classes(
    classes: npt.NDArray[np.uint8],
    masked: Iterable[int],
    *,
    grid: Grid,
    dilate_m: float = 0.0,
    scale: Scale | None = None,
) -> Bool:
    """Return the pixels that are masked.

    Class 0 (no data) is masked but not grown, as the edge of a swath is not a cloud.

    Args:
        classes: Class layer (y, x), with a halo of `halo_pixels` on each side.
        masked: Class values that are masked.
        grid: Grid of the pixels; only its resolution and unit matter.
        dilate_m: Distance by which masked areas grow, metres, measured between pixel centres.
        scale: Metres on the ground in a unit of the CRS along (x, y), the same for all windows of a cube, as
            `zarr_store.ground.ground_scale` gives it; None for the nominal length of the unit.

    Returns:
        (y, x) without the halo.

    >>> metres = Grid("EPSG:32633", (10, 0, 0, 0, -10, 0), (1, 1))
    >>> mask_classes(np.array([[4, 4, 9, 4, 4]] * 3, np.uint8), [9], grid=metres, dilate_m=10).tolist()
    [[True, True, True]]
    """
    values = sorted(set(masked))
    plain = _among(classes, values)
    rows, cols = halo_pixels(grid, dilate_m, scale)
    inner = (slice(rows, classes.shape[0] - rows), slice(cols, classes.shape[1] - cols))
    if not rows and not cols:
        return plain
    core = _among(classes, [value for value in values if value != NO_DATA_CLASS])
    if not core.any():
        return plain[inner]
    # The time of a distance transform grows linearly with the pixels; that of a large structuring element does not.
    width, height = _pixel_m(grid, scale)
    distance = ndimage.distance_transform_edt(~core, sampling=(height, width))
    grown: Bool = np.asarray(distance) <= dilate_m * (1 + 1e-9)
    return plain[inner] | grown[inner]
