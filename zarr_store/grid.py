"""`Grid`: the one georeference that a cube, its shards and a map share.

A grid is a CRS, an affine transform and a shape. Geometry comes from odc-geo's `GeoBox`; this module adds
snapping to an anchor, integer offsets between grids, and a JSON form.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt
from affine import Affine
from pyproj import CRS

from zarr_store.crs import parse_crs, refuse_file_names, transformer_between
from zarr_store.errors import InvalidInput

if TYPE_CHECKING:
    from odc.geo.geobox import GeoBox

__all__ = ["Bounds", "Grid", "check_on_earth", "check_pixel_size", "normal_crs"]

Transform = tuple[float, float, float, float, float, float]
Bounds = tuple[float, float, float, float]
"""Bounds (left, bottom, right, top) in units of the CRS."""

# Offsets between grids are compared in pixels; 1e-6 px of a 10 m pixel is 10 µm, far above double rounding.
_ALIGNED_PX = 1e-6


@dataclass(frozen=True)
class Grid:
    """A north-up pixel grid.

    Attributes:
        crs: Coordinate reference system, as "EPSG:<code>" where it has a code, else WKT.
        transform: (a, b, c, d, e, f) of the pixel-corner affine: x = a·col + b·row + c, y = d·col + e·row + f.
        shape: (height, width) in pixels.

    Example:
        >>> grid = Grid.from_bounds("EPSG:32633", (600_000, 5_000_000, 605_120, 5_005_120), resolution=10)
        >>> grid.shape, grid.epsg
        ((512, 512), 32633)
    """

    crs: str
    transform: Transform
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        # equal grids have one JSON form: 10 and 10.0 would be written differently
        a, b, c, d, e, f = (float(value) for value in self.transform)
        if not all(math.isfinite(value) for value in (a, b, c, d, e, f)):
            raise InvalidInput(f"grid must have a transform of six finite numbers, got {self.transform}")
        object.__setattr__(self, "transform", (a, b, c, d, e, f))
        if b or d or a <= 0 or e >= 0:
            raise InvalidInput(
                f"grid must be north-up (a > 0, e < 0, no rotation), got transform {self.transform}; "
                "warp the data to a north-up grid first"
            )
        if self.crs.lstrip().startswith("{"):
            parse_crs(self.crs)
        refuse_file_names(self.crs)
        if min(self.shape) < 1:
            raise InvalidInput(f"grid must have at least one pixel, got shape {self.shape} (height, width)")

    @classmethod
    def from_bounds(
        cls,
        crs: str,
        bounds: Bounds,
        *,
        resolution: float | tuple[float, float],
        anchor: tuple[float, float] = (0.0, 0.0),
    ) -> Self:
        """Return the smallest grid of `resolution` that covers `bounds` with pixel edges on `anchor + n·resolution`.

        Args:
            crs: CRS of bounds, resolution and anchor.
            bounds: (left, bottom, right, top).
            resolution: Pixel size in CRS units, one number or (x, y).
            anchor: A point that lies on a pixel corner.

        >>> Grid.from_bounds("EPSG:32633", (499_990, 0, 500_030, 60), resolution=20, anchor=(499_980, 0)).shape
        (3, 3)
        """
        rx, ry = (resolution, resolution) if isinstance(resolution, int | float) else resolution
        if not (rx > 0 and ry > 0 and math.isfinite(rx) and math.isfinite(ry)):
            raise InvalidInput(f"resolution must be a positive number of CRS units, got {resolution}")
        left, bottom, right, top = bounds
        if not (right > left and top > bottom):
            raise InvalidInput(f"bounds must be (left, bottom, right, top) with positive area, got {bounds}")
        ax, ay = anchor
        # round() first: 41665.99999999999 must not become one pixel more
        col0 = math.floor(round((left - ax) / rx, 6))
        col1 = math.ceil(round((right - ax) / rx, 6))
        row0 = math.floor(round((ay - top) / ry, 6))
        row1 = math.ceil(round((ay - bottom) / ry, 6))
        shape = (row1 - row0, col1 - col0)
        return cls(normal_crs(crs), (rx, 0.0, ax + col0 * rx, 0.0, -ry, ay - row0 * ry), shape)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Make the object from its JSON form, which `to_dict` returns."""
        height, width = data["shape"]
        a, b, c, d, e, f = (float(v) for v in data["transform"])
        return cls(str(data["crs"]), (a, b, c, d, e, f), (int(height), int(width)))

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form: crs, transform (six numbers), shape."""
        return {"crs": self.crs, "transform": list(self.transform), "shape": list(self.shape)}

    @property
    def height(self) -> int:
        return self.shape[0]

    @property
    def width(self) -> int:
        return self.shape[1]

    @property
    def resolution(self) -> tuple[float, float]:
        """Pixel size (x, y) in CRS units, both positive."""
        return (self.transform[0], -self.transform[4])

    @property
    def affine(self) -> Affine:
        return Affine(*self.transform)

    @cached_property
    def geobox(self) -> GeoBox:
        from odc.geo.geobox import GeoBox  # here, as it loads Dask and takes longer to import than all else

        return GeoBox(self.shape, self.affine, self.crs)

    @property
    def bounds(self) -> Bounds:
        a, _, c, _, e, f = self.transform
        return (c, f + e * self.height, c + a * self.width, f)

    @property
    def epsg(self) -> int | None:
        return _crs(self.crs).to_epsg()

    @property
    def wkt(self) -> str:
        return _crs(self.crs).to_wkt()

    @property
    def units_per_metre(self) -> float:
        """CRS units in one metre: 1 for UTM; for a geographic CRS, degrees at the equator."""
        crs = _crs(self.crs)
        return 1.0 / 111_319.49 if crs.is_geographic else 1.0 / crs.axis_info[0].unit_conversion_factor

    def x(self) -> npt.NDArray[np.float64]:
        """Return the x coordinates of pixel centres, shape (width,)."""
        return np.asarray(self.transform[2] + self.transform[0] * (np.arange(self.width) + 0.5), np.float64)

    def y(self) -> npt.NDArray[np.float64]:
        """Return the y coordinates of pixel centres, shape (height,), descending."""
        return np.asarray(self.transform[5] + self.transform[4] * (np.arange(self.height) + 0.5), np.float64)

    def window(self, y0: int, x0: int, height: int, width: int) -> Grid:
        """Return the sub-grid of `height` × `width` pixels whose first pixel is (y0, x0); may reach outside."""
        a, b, c, d, e, f = self.transform
        return Grid(self.crs, (a, b, c + a * x0, d, e, f + e * y0), (height, width))

    def coarsen(self, factor: int) -> Grid:
        """Return the grid of `factor`-times larger pixels over the same origin, rounded up to cover all pixels."""
        a, b, c, d, e, f = self.transform
        shape = (-(-self.height // factor), -(-self.width // factor))
        return Grid(self.crs, (a * factor, b, c, d, e * factor, f), shape)

    def offset_of(self, other: Grid) -> tuple[int, int] | None:
        """Return (row, column) of the first pixel of `other` in this grid, or None if CRS or pixel lattice differ."""
        if other.crs != self.crs or other.resolution != self.resolution:
            return None
        rx, ry = self.resolution
        col = (other.transform[2] - self.transform[2]) / rx
        row = (self.transform[5] - other.transform[5]) / ry
        if abs(col - round(col)) > _ALIGNED_PX or abs(row - round(row)) > _ALIGNED_PX:
            return None
        return (round(row), round(col))

    def lonlat_bounds(self) -> Bounds:
        """Return (west, south, east, north) in degrees; edges get more points, as they are curved in degrees."""
        to_lonlat = transformer_between(self.crs, "EPSG:4326")
        west, south, east, north = to_lonlat.transform_bounds(*self.bounds, densify_pts=21)
        return (west, south, east, north)

    def __str__(self) -> str:
        rx, ry = self.resolution
        res = f"{rx:g}" if rx == ry else f"{rx:g}×{ry:g}"
        return f"{self.crs.partition(chr(10))[0][:40]} {self.height}×{self.width} px at {res}"


def check_pixel_size(crs: str, size: float) -> None:
    """Refuse a pixel size that seems to be in other units than those of the CRS: 10 degrees, 0.0001 m.

    Args:
        crs: CRS as `normal_crs` gives it.
        size: Pixel size in units of the CRS.

    Raises:
        InvalidInput: The pixel would be smaller than 1 mm or larger than 100 km.

    >>> check_pixel_size("EPSG:4326", 0.0001)
    """
    metres = _metres_per_unit(crs)
    if not math.isfinite(metres) or _CHOSEN_PIXEL_M[0] <= size * metres <= _CHOSEN_PIXEL_M[1]:
        return
    unit = _crs(crs).axis_info[0].unit_name
    ground = f"{size * metres / 1000:g} km" if size * metres >= 1000 else f"{size * metres:g} m"
    near = f"{10 / metres:.2g}"
    raise InvalidInput(
        f"resolution {size:g} is in units of {_short(crs)}, which are {unit}s: a pixel would be {ground} wide; "
        f"expected {_CHOSEN_PIXEL_M[0]:g} m to {_CHOSEN_PIXEL_M[1] / 1000:g} km. 10 m are about {near} there: "
        f"give --resolution in {unit}s, or another --crs"
    )


_CHOSEN_PIXEL_M = (1e-3, 1e5)
"""Smallest and largest pixel size that a user may choose, metres."""
_FILE_PIXEL_M = (1e-3, 1e6)
"""Smallest and largest pixel size of a file, metres."""
_REACH_M = 1e8
"""Largest distance from the origin of a CRS, metres; the equator is 4e7 m long."""


def check_on_earth(grid: Grid) -> None:
    """Refuse a grid from a header or an item that cannot lie on Earth.

    A wrong header of one file must not determine the grid of a cube, nor cause numbers that overflow.

    Raises:
        InvalidInput: The CRS is neither geographic nor projected, the pixels are too small or too large, or the grid
            lies too far from the origin of its CRS.
    """
    metres = _metres_per_unit(grid.crs)
    if not (math.isfinite(metres) and metres > 0):
        raise InvalidInput(
            f"its CRS {_short(grid.crs)} is neither geographic nor projected: its coordinates are not places on Earth"
        )
    for size in grid.resolution:
        if not _FILE_PIXEL_M[0] <= size * metres <= _FILE_PIXEL_M[1]:
            raise InvalidInput(
                f"its pixels would be {size * metres:g} m wide in {_short(grid.crs)}; expected {_FILE_PIXEL_M[0]:g} to "
                f"{_FILE_PIXEL_M[1]:g} m"
            )
    if not all(abs(value) * metres <= _REACH_M for value in grid.bounds):
        raise InvalidInput(
            f"it would lie at {tuple(float(f'{value:.6g}') for value in grid.bounds)} in {_short(grid.crs)}, which is "
            "not a place on Earth"
        )


@lru_cache(64)
def _metres_per_unit(text: str) -> float:
    """Return the metres in one unit of a CRS (degrees as at the equator); nan for a CRS without a place on Earth."""
    crs = _crs(text)
    if not (crs.is_geographic or crs.is_projected) or not crs.axis_info:
        return math.nan
    factor = crs.axis_info[0].unit_conversion_factor  # of radians or metres
    return math.degrees(factor) * 111_319.49 if crs.is_geographic else factor


def _short(crs: str) -> str:
    return crs.partition(chr(10))[0][:40]


@lru_cache(64)
def _crs(text: str) -> CRS:
    """Return the parsed CRS; cached, as PROJ takes long for it and each shard needs it."""
    return parse_crs(text)


def normal_crs(crs: object) -> str:
    """Return the one spelling of a CRS: "EPSG:<code>" if there is a code, else WKT2.

    Raises:
        InvalidInput: The CRS is not known to PROJ, or names a file.
    """
    return _normal_text(crs) if isinstance(crs, str) else _normal(crs)


@lru_cache(256)
def _normal_text(text: str) -> str:
    """Return the spelling of a CRS that is given as text; cached, as catalogues repeat the same few in every item."""
    return _normal(text)


def _normal(crs: object) -> str:
    parsed = parse_crs(crs)
    epsg = parsed.to_epsg()
    return f"EPSG:{epsg}" if epsg else parsed.to_wkt()
