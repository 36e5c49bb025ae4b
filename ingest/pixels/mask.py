"""Masking: which pixels of one source's window are observed, and which of them are masked.

A pixel is observed where every band has a value. It is masked where its class is among the masked ones: cloud, shadow
and so on. Growing the mask needs pixels beyond the window, so classes are read with a halo, and shards have no seams.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from zarr_store.grid import Grid

__all__ = ["disc", "halo_pixels", "mask_classes", "observed"]

Bool = npt.NDArray[np.bool_]
Scale = tuple[float, float]
"""Metres on the ground in one unit of a CRS, along x and y."""
NO_DATA_CLASS = 0
"""Class value of pixels without data."""
_STRIP_PIXELS = 1 << 18
"""Pixels that are compared at once, so that they stay in the processor's cache."""


def observed(bands: Sequence[npt.NDArray[np.generic]], classes: npt.NDArray[np.uint8] | None) -> Bool:
    """The pixels where every band has a value and, if classes are given, the class is not 0.

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


def _has_value(band: npt.NDArray[np.generic]) -> Bool:
    return np.asarray(np.isfinite(band) if band.dtype.kind == "f" else band != 0, bool)


def halo_pixels(grid: Grid, dilate_m: float, scale: Scale | None = None) -> tuple[int, int]:
    """Rows and columns of the halo: pixels this far outside a window reach into it when masked areas grow."""
    width, height = _pixel_m(grid, scale)
    return (math.floor(dilate_m / height + 1e-9), math.floor(dilate_m / width + 1e-9))


def disc(grid: Grid, dilate_m: float, scale: Scale | None = None) -> Bool:
    """The pixels whose centre lies within `dilate_m` metres of the middle pixel, as an array with odd sides."""
    rows, cols = halo_pixels(grid, dilate_m, scale)
    width, height = _pixel_m(grid, scale)
    y, x = np.mgrid[-rows : rows + 1, -cols : cols + 1]
    inside: Bool = (x * width) ** 2 + (y * height) ** 2 <= dilate_m**2 * (1 + 1e-9)
    return inside


def _pixel_m(grid: Grid, scale: Scale | None) -> tuple[float, float]:
    """Width and height of a pixel on the ground, in metres."""
    rx, ry = grid.resolution
    if scale is None:
        return rx / grid.units_per_metre, ry / grid.units_per_metre
    return rx * scale[0], ry * scale[1]


def _among(classes: npt.NDArray[np.uint8], values: Sequence[int]) -> Bool:
    """The pixels whose class is among `values`; comparing in strips is six times as fast as a table of 256 entries."""
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
    """The pixels that are masked.

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
