"""`scene_strip` and `radar_strip` turn the ground of one strip of a tile into the values that are stored."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ingest.raster.cog import CogWriter
from ingest.simulate.anomalies import Planting
from ingest.simulate.clouds import cover, scene_classes, sky
from ingest.simulate.config import Acquisition
from ingest.simulate.ground import Ground, Landscape
from ingest.simulate.noise import F32, key_of, white
from ingest.simulate.radar import NODATA, RadarPass, backscatter
from ingest.simulate.spectra import BANDS, surface
from ingest.simulate.swath import radar_swath, scene_swath
from zarr_store.grid import Grid

__all__ = ["dn", "radar_strip", "scene_strip"]

U16 = npt.NDArray[np.uint16]
U8 = npt.NDArray[np.uint8]


def dn(reflectance: F32, offset: int) -> U16:
    """Turn reflectance into stored values: 10 000 · reflectance + offset, at least 1, since 0 means nodata."""
    stored: U16 = np.clip(np.rint(reflectance * np.float32(10_000) + np.float32(offset)), 1, 65_535).astype(np.uint16)
    return stored


def scene_strip(
    landscape: Landscape, acquisition: Acquisition, ground: Ground, strip: Grid, planting: Planting | None = None
) -> tuple[dict[str, npt.NDArray[Any]], U8]:
    """Make all layers of one date in one strip by asset key, and the SCL; `ground` is one pixel wider on each side."""
    config, world = landscape.config, landscape.world
    face, seen_ground, hidden = surface(ground, acquisition), ground, None
    if planting:
        face, seen_ground = planting.change_surface(face, ground, acquisition.time.date())
        hidden = planting.cloud(ground.grid, acquisition)
    above = sky(config, acquisition, ground.grid, landscape.scale)
    half = strip.coarsen(2)
    swath = scene_swath(acquisition, world)
    seen = {10: swath.sees(strip), 20: swath.sees(half)}
    layers: dict[str, npt.NDArray[Any]] = {}
    for number, band in enumerate(BANDS):
        light = above.over(face.reflectance(number), number)
        value = _blur(light if hidden is None else cover(light, hidden, number))
        if band.gsd_m == 20:
            value = _halve(value)
        window = strip if band.gsd_m == 10 else half
        lattice = world if band.gsd_m == 10 else world.coarsen(2)
        key = key_of(config.seed, "sensor", acquisition.index, band.key)
        # dark current and shot noise: about 1 % of a bright pixel, 0.1 % absolute of a dark one
        value += white(key, lattice, window, _normal) * (np.float32(0.0011) + np.float32(0.009) * value)
        pixels = dn(value, acquisition.dn_offset)
        pixels[~seen[band.gsd_m]] = 0
        layers[band.key] = pixels
    scl = _majority(scene_classes(seen_ground, face, above)[1:-1, 1:-1])
    scl[~seen[20]] = 0
    layers["scl"] = scl
    layers["landcover"] = np.where(seen[10], ground.classes[1:-1, 1:-1], np.uint8(0))
    return layers, scl


def radar_strip(
    landscape: Landscape,
    overpass: RadarPass,
    outputs: Mapping[str, CogWriter],
    ground: Ground,
    strip: Grid,
    corner: tuple[int, int],
    planting: Planting | None = None,
) -> None:
    """Write one radar pass in one strip, whose first pixel is at `corner` (row, column) of the world."""
    config, world = landscape.config, landscape.world
    inner = _crop(ground, strip)
    # radar needs only the season, so the sun of any overpass will do
    season = dataclasses.replace(config.acquisitions()[0], time=overpass.time)
    face = surface(inner, season)
    unseen = ~radar_swath(overpass, world).sees(strip)
    for name, writer in outputs.items():
        power = backscatter(config, world, inner, face, overpass, name, planting)
        power[unseen] = NODATA
        writer.write(*corner, power)


def _crop(ground: Ground, strip: Grid) -> Ground:
    arrays = {
        field.name: getattr(ground, field.name)[1:-1, 1:-1]
        for field in dataclasses.fields(ground)
        if field.name != "grid"
    }
    return Ground(grid=strip, **arrays)


def _normal(rng: np.random.Generator, shape: tuple[int, int]) -> F32:
    draws: F32 = rng.standard_normal(shape, dtype=np.float32)
    return draws


def _blur(value: F32) -> F32:
    """Mix neighbours as the sensor does, with weights 0.1, 0.8, 0.1 in each direction; the outermost pixels are cut."""
    near, mid = np.float32(0.1), np.float32(0.8)
    rows: F32 = near * (value[:-2] + value[2:]) + mid * value[1:-1]
    blurred: F32 = near * (rows[:, :-2] + rows[:, 2:]) + mid * rows[:, 1:-1]
    return blurred


def _halve(value: F32) -> F32:
    """Average 2 × 2 pixels."""
    pairs = value[0::2] + value[1::2]
    mean: F32 = (pairs[:, 0::2] + pairs[:, 1::2]) * np.float32(0.25)
    return mean


def _majority(classes: U8) -> U8:
    """Take the most frequent of 2 × 2 class pixels; of two pairs the higher value, so that cloud wins."""
    four = np.sort(np.stack([classes[i::2, j::2] for i in (0, 1) for j in (0, 1)]), axis=0)
    a, b, c, d = four
    most: U8 = np.where(c == d, d, np.where(b == c, c, np.where(a == b, b, d)))
    return most
