"""`scene_swath` and `radar_swath` give the part of the world that a sensor on a given orbit sees."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from shapely.geometry import Polygon, box

from ingest.simulate.config import Acquisition
from ingest.simulate.radar import RadarPass
from zarr_store.grid import Grid

__all__ = ["Swath", "radar_swath", "scene_swath"]

# Ground tracks of sun-synchronous orbits (98.6° and 98.2° inclination) run about this far from north at 45° N.
_TILT = math.tan(math.radians(13.5))


@dataclass(frozen=True)
class Swath:
    """A half plane of the world.

    Attributes:
        x0: Easting of the edge at `y0`.
        y0: Northing where the edge is at `x0`.
        lean: Metres that the edge moves east per metre north.
        keeps_west: True if the side west of the edge was seen.
    """

    x0: float
    y0: float
    lean: float
    keeps_west: bool

    def sees(self, grid: Grid) -> npt.NDArray[np.bool_]:
        """Make a mask of a grid that is True for pixels whose centre was seen."""
        edge = (self.x0 + self.lean * (grid.y() - self.y0))[:, None]
        seen: npt.NDArray[np.bool_] = (grid.x()[None, :] < edge) == self.keeps_west
        return seen

    def polygon(self, grid: Grid) -> Polygon:
        """Make the polygon of the seen part of a grid, in its CRS; empty where nothing was seen."""
        left, bottom, right, top = grid.bounds
        low, high = (self.x0 + self.lean * (y - self.y0) for y in (bottom, top))
        # far beyond the grid, yet finite
        side = (left - 1e6) if self.keeps_west else (right + 1e6)
        seen = Polygon([(low, bottom), (high, top), (side, top), (side, bottom)])
        part = box(left, bottom, right, top).intersection(seen)
        return part if isinstance(part, Polygon) else Polygon()  # they may touch in a line or a point


def scene_swath(acquisition: Acquisition, world: Grid) -> Swath:
    """Make the swath of a scene: R122 misses the south-east corner of the world, R079 the north-west."""
    left, bottom, right, top = world.bounds
    width = right - left
    if acquisition.orbit == 79:
        return Swath(left + 0.16 * width, top, _TILT, keeps_west=False)
    return Swath(right - 0.09 * width, bottom, _TILT, keeps_west=True)


def radar_swath(overpass: RadarPass, world: Grid) -> Swath:
    """Make the swath of a radar pass: ascending misses the south-west corner, descending the south-east."""
    left, bottom, right, _ = world.bounds
    width = right - left
    if overpass.ascending:
        return Swath(left + 0.07 * width, bottom, -_TILT, keeps_west=False)
    return Swath(right - 0.07 * width, bottom, _TILT, keeps_west=True)
