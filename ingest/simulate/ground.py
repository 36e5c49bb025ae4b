"""`Landscape` is the ground truth: a seeded landscape of fields, forest, towns, river, lakes, bare soil and wetland.

Everything here is a function of place. `Landscape` fixes what is global (the towns, the course of the river), and
`Landscape.ground(grid)` evaluates it in any window; windows agree where they overlap.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ingest.raster.cog import Colour
from ingest.simulate.config import SimulateConfig
from ingest.simulate.noise import F32, curve, fractal, key_of, mix, smooth, uniform
from ingest.simulate.parcels import Parcels, parcels
from zarr_store.grid import Grid

__all__ = ["CLASSES", "CROPS", "Ground", "LandClass", "Landscape"]

U8 = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class LandClass:
    """One land cover class, with its value in the raster, name, colour and meaning."""

    value: int
    name: str
    colour: Colour
    description: str


CLASSES: tuple[LandClass, ...] = (
    LandClass(1, "water", (52, 116, 190), "River and lakes"),
    LandClass(2, "wetland", (92, 172, 168), "Reed and marsh beside water, wet for most of the year"),
    LandClass(3, "forest", (28, 96, 44), "Broadleaf and conifer forest"),
    LandClass(4, "grassland", (160, 204, 96), "Meadow and pasture"),
    LandClass(5, "cropland", (238, 208, 110), "Arable parcels, under crop or ploughed"),
    LandClass(6, "bare", (196, 172, 148), "Sand, gravel and quarries without vegetation"),
    LandClass(7, "built", (204, 64, 56), "Towns: roofs, streets and gardens"),
)
WATER, WETLAND, FOREST, GRASS, CROP, BARE, BUILT = (c.value for c in CLASSES)

CROPS = ("winter cereal", "maize", "rapeseed", "soy")
"""Names of the crops; a parcel has an index into this tuple."""


@dataclass(frozen=True)
class Ground:
    """The landscape in one window; every array has the shape of `grid`.

    Attributes:
        grid: The window.
        classes: Value of the land class, 1 … 7.
        crop: Index into CROPS; valid where the class is cropland.
        parcel: Uniform [0, 1) per parcel, from which vigour and sowing date follow.
        margin: Share of the pixel, 0 … 1, that is a grassy field margin or a lane.
        fine: Texture over about 25 m, variance 1.
        coarse: Texture over about 600 m, variance 1.
        blend: Uniform-like [0, 1] field: conifer share, turbidity, soil moisture, garden share, by class.
        roof: Uniform [0, 1) per building plot.
        slope_east, slope_north: Rise of the terrain per metre.
    """

    grid: Grid
    classes: U8
    crop: U8
    parcel: F32
    margin: F32
    fine: F32
    coarse: F32
    blend: F32
    roof: F32
    slope_east: F32
    slope_north: F32


@dataclass(frozen=True)
class _Patch:
    """A round feature, with its centre in metres of the CRS and its radius."""

    x: float
    y: float
    radius_m: float


class Landscape:
    """The landscape of a world: positions that are drawn once, and fields that are evaluated per window.

    Args:
        config: The world.
    """

    def __init__(self, config: SimulateConfig) -> None:
        self.config = config
        world = config.world_grid()
        self.world = world
        left, bottom, right, top = world.bounds
        extent = math.sqrt((right - left) * (top - bottom))
        # small worlds get small features, so that a test world holds every class too
        self.scale = min(1.0, max(0.12, extent / 14_000.0))
        rng = np.random.Generator(np.random.PCG64(key_of(config.seed, "plan")))
        self.river_y = bottom + (top - bottom) * rng.uniform(0.36, 0.64)
        self.river_phase = rng.uniform(0.0, 2 * math.pi)
        area = (right - left) * (top - bottom) / (14_000.0 * self.scale) ** 2
        taken: list[_Patch] = []
        self.lakes = self._place(rng, round(1 + 2.2 * area), (480.0, 950.0), taken)
        self.towns = self._place(rng, round(1 + 8 * area), (300.0, 1080.0), taken)
        self.pits = self._place(rng, round(2 + 9 * area), (170.0, 480.0), taken)

    def _place(
        self, rng: np.random.Generator, count: int, radius_m: tuple[float, float], taken: list[_Patch]
    ) -> tuple[_Patch, ...]:
        """Place discs inside the world, away from the river and from those in `taken`, which is extended."""
        left, bottom, right, top = self.world.bounds
        placed: list[_Patch] = []
        for _ in range(count):
            for _attempt in range(60):
                radius = rng.uniform(*radius_m) * self.scale
                x = rng.uniform(left + 0.7 * radius, right - 0.7 * radius)
                y = rng.uniform(bottom + 0.7 * radius, top - 0.7 * radius)
                to_river = abs(y - float(self.river(np.array([x]))[0]))
                if to_river > 1.25 * radius and all(
                    math.hypot(x - p.x, y - p.y) > 1.2 * (radius + p.radius_m) for p in taken
                ):
                    placed.append(_Patch(x, y, radius))
                    taken.append(placed[-1])
                    break
        return tuple(placed)

    def river(self, x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Compute the northing of the middle of the river at each easting."""
        key, s = key_of(self.config.seed, "river"), self.scale
        bends = 760.0 * curve(key, x, 3600.0 * s) + 250.0 * curve(key + 1, x, 1150.0 * s)
        return self.river_y + s * bends

    def _river_distance(self, grid: Grid) -> F32:
        """Compute the metres to the middle of the river, exact to first order in its slope."""
        x = grid.x()
        middle = self.river(x)
        slope = (self.river(x + 5.0) - self.river(x - 5.0)) / 10.0
        across = (grid.y()[:, None] - middle[None, :]) / np.sqrt(1.0 + slope * slope)[None, :]
        return np.abs(across).astype(np.float32)

    def _inside(self, grid: Grid, patches: tuple[_Patch, ...], ragged: F32, reach: float = 1.0) -> F32:
        """Compute the smallest (distance / radius), made ragged by noise: below 1 inside, 9 where no patch is near."""
        out = np.full(grid.shape, 9.0, np.float32)
        left, bottom, right, top = grid.bounds
        for patch in patches:
            far = patch.radius_m * 1.9 * reach
            if patch.x + far < left or patch.x - far > right or patch.y + far < bottom or patch.y - far > top:
                continue
            cols = np.flatnonzero(np.abs(grid.x() - patch.x) < far)
            rows = np.flatnonzero(np.abs(grid.y() - patch.y) < far)
            if not cols.size or not rows.size:
                continue
            box = (slice(rows[0], rows[-1] + 1), slice(cols[0], cols[-1] + 1))
            dx = (grid.x()[box[1]] - patch.x)[None, :]
            dy = (grid.y()[box[0]] - patch.y)[:, None]
            near = (np.hypot(dx, dy) / patch.radius_m).astype(np.float32) + ragged[box]
            out[box] = np.minimum(out[box], near)
        return out

    def ground(self, grid: Grid) -> Ground:
        """Evaluate the landscape in a window of the world's lattice, or in any grid of its CRS."""
        seed, s = self.config.seed, self.scale
        relief, east, north = self._relief(grid)
        fields: Parcels = parcels(
            key_of(seed, "parcels"), grid, s, origin=(self.world.transform[2], self.world.transform[5])
        )
        fine = fractal(key_of(seed, "fine"), grid, 50.0, octaves=2, gain=0.8)
        coarse = fractal(key_of(seed, "coarse"), grid, 900.0 * s, octaves=3)
        ragged = np.float32(0.2) * fractal(key_of(seed, "ragged"), grid, 620.0 * s, octaves=4, gain=0.6)
        blend = np.float32(0.5) + np.float32(0.32) * fractal(key_of(seed, "blend"), grid, 420.0 * s, octaves=3)
        np.clip(blend, 0.0, 1.0, out=blend)
        woods = fractal(key_of(seed, "woods"), grid, 2100.0 * s, octaves=6, gain=0.55)
        woods += np.float32(0.65) * relief

        river = self._river_distance(grid)
        # the bank varies by a sixth of the width, and a river stays visible at coarse resolutions
        half_width = max(46.0 * s, 1.1 * grid.resolution[0])
        bank = river + np.float32(half_width / 3) * coarse + np.float32(half_width / 6) * fine
        lake = self._inside(grid, self.lakes, ragged, reach=1.3)
        damp = smooth(key_of(seed, "damp"), grid, 480.0 * s) + np.float32(0.5) * ragged * 5
        wetness = np.exp(-river / np.float32(650.0 * s))

        meadow = fields.pick < np.float32(0.16) + np.float32(0.5) * wetness
        classes = np.where(meadow, np.uint8(GRASS), np.uint8(CROP))
        classes[(woods > np.float32(0.78)) | ((fields.pick > np.float32(0.985)) & ~meadow)] = FOREST
        classes[(river < half_width * 2.6) & (coarse > -0.1)] = FOREST  # gallery forest on the banks
        marsh = ((river < 520.0 * s) & (damp > 0.6)) | ((lake < 1.0 + 0.36 * np.clip(damp + 1.0, 0, 2)) & (lake < 1.6))
        classes[marsh] = WETLAND
        classes[self._inside(grid, self.pits, ragged * np.float32(2.3)) < 1.0] = BARE
        town = self._inside(grid, self.towns, ragged * np.float32(2.2))
        classes[town < 1.0] = BUILT
        classes[lake < 1.0] = WATER
        classes[bank < half_width] = WATER
        return Ground(
            grid=grid,
            classes=classes,
            crop=fields.crop,
            parcel=fields.shade,
            margin=fields.margin,
            fine=fine,
            coarse=coarse,
            blend=blend,
            roof=_plots(key_of(seed, "plots"), grid),
            slope_east=east,
            slope_north=north,
        )

    def _relief(self, grid: Grid) -> tuple[F32, F32, F32]:
        """Compute the relative height (variance about 1) and its rise per metre to the east and north."""
        res = grid.resolution[0]
        wide = grid.window(-1, -1, grid.height + 2, grid.width + 2)
        height = fractal(key_of(self.config.seed, "relief"), wide, 5200.0 * self.scale, octaves=6, gain=0.52)
        metres = np.float32(85.0 * self.scale)
        east = (height[1:-1, 2:] - height[1:-1, :-2]) * np.float32(metres / (2 * res))
        north = (height[:-2, 1:-1] - height[2:, 1:-1]) * np.float32(metres / (2 * res))
        return height[1:-1, 1:-1], east, north


def _plots(key: int, grid: Grid) -> F32:
    """Draw a uniform number [0, 1) for each building plot of about 24 m, so that roofs differ."""
    j = np.floor(grid.y() / 24.0).astype(np.int64)[:, None]
    i = np.floor(grid.x() / 24.0).astype(np.int64)[None, :]
    return uniform(mix(j, i, key))
