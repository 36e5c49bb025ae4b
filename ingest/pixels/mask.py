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


def halo_pixels(grid: Grid, dilate_m: float) -> tuple[int, int]:
    """Rows and columns of the halo: pixels this far outside a window reach into it when masked areas grow."""
    rx, ry = grid.resolution
    reach = dilate_m * grid.units_per_metre
    return (math.floor(reach / ry + 1e-9), math.floor(reach / rx + 1e-9))


def disc(grid: Grid, dilate_m: float) -> Bool:
    """The pixels whose centre lies within `dilate_m` metres of the middle pixel, as an array with odd sides."""
    rows, cols = halo_pixels(grid, dilate_m)
    rx, ry = grid.resolution
    reach = dilate_m * grid.units_per_metre
    y, x = np.mgrid[-rows : rows + 1, -cols : cols + 1]
    inside: Bool = (x * rx) ** 2 + (y * ry) ** 2 <= reach**2 * (1 + 1e-9)
    return inside


def _among(classes: npt.NDArray[np.uint8], values: Sequence[int]) -> Bool:
    """The pixels whose class is among `values`; comparing in strips is six times as fast as a table of 256 entries."""
    matches = np.zeros(classes.shape, bool)
    rows = max(1, _STRIP_PIXELS // max(1, classes.shape[1]))
    for top in range(0, len(classes), rows):
        strip = slice(top, top + rows)
        for value in values:
            matches[strip] |= classes[strip] == value
    return matches


def mask_classes(classes: npt.NDArray[np.uint8], masked: Iterable[int], *, grid: Grid, dilate_m: float = 0.0) -> Bool:
    """The pixels that are masked.

    Class 0 (no data) is masked but not grown, as the edge of a swath is not a cloud.

    Args:
        classes: Class layer (y, x), with a halo of `halo_pixels` on each side.
        masked: Class values that are masked.
        grid: Grid of the pixels; only its resolution and unit matter.
        dilate_m: Distance by which masked areas grow, metres, measured between pixel centres.

    Returns:
        (y, x) without the halo.

    >>> metres = Grid("EPSG:32633", (10, 0, 0, 0, -10, 0), (1, 1))
    >>> mask_classes(np.array([[4, 4, 9, 4, 4]] * 3, np.uint8), [9], grid=metres, dilate_m=10).tolist()
    [[True, True, True]]
    """
    values = sorted(set(masked))
    plain = _among(classes, values)
    rows, cols = halo_pixels(grid, dilate_m)
    inner = (slice(rows, classes.shape[0] - rows), slice(cols, classes.shape[1] - cols))
    if not rows and not cols:
        return plain
    core = _among(classes, [value for value in values if value != NO_DATA_CLASS])
    if not core.any():
        return plain[inner]
    # The time of a distance transform grows linearly with the pixels; that of a large structuring element does not.
    rx, ry = grid.resolution
    distance = ndimage.distance_transform_edt(~core, sampling=(ry, rx))
    reach = dilate_m * grid.units_per_metre
    grown: Bool = np.asarray(distance) <= reach * (1 + 1e-9)
    return plain[inner] | grown[inner]
