"""`backscatter` simulates Sentinel-1 over the same ground: terrain-corrected gamma0 in linear power, VV and VH.

The mean backscatter of a class carries multiplicative speckle: for L looks, intensity is gamma distributed with shape L
and mean 1 (Oliver and Quegan 2004, "Understanding Synthetic Aperture Radar Images", ch. 4). Speckle is independent
from pixel to pixel here, where real products correlate over neighbours.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ingest.simulate.config import SimulateConfig
from ingest.simulate.ground import BARE, BUILT, CROP, FOREST, Ground
from ingest.simulate.noise import F32, key_of, white
from ingest.simulate.spectra import Surface
from zarr_store.grid import Grid

__all__ = ["ENL", "NODATA", "POLARISATIONS", "RadarPass", "backscatter", "mean_backscatter", "radar_passes"]

POLARISATIONS = ("vv", "vh")
NODATA = -32768.0

ENL = 4.4
"""Equivalent number of looks; 4.4 is what ESA states for IW GRD in high resolution (Sentinel-1 product definition)."""

# Mean gamma0 in dB by class value 0 … 7: none, water, wetland, forest, grass, crop, bare, built. Round numbers of the
# order seen at C band over temperate land: smooth water darkest, volume scatter in forest, corners in towns.
_MEAN_DB = {
    "vv": (0.0, -19.0, -11.5, -8.8, -12.6, -12.4, -14.5, -4.0),
    "vh": (0.0, -26.5, -18.6, -13.8, -19.6, -20.6, -24.0, -11.0),
}


@dataclass(frozen=True)
class RadarPass:
    """One Sentinel-1 overpass.

    Attributes:
        index: Position among the radar dates.
        time: Start of sensing (UTC).
        ascending: Direction of flight.
        orbit: Relative orbit.
    """

    index: int
    time: dt.datetime
    ascending: bool
    orbit: int


def radar_passes(config: SimulateConfig) -> tuple[RadarPass, ...]:
    """List the Sentinel-1 passes of a world in order of time: ascending at dusk and descending at dawn, in turn."""
    out = []
    for index, date in enumerate(config.radar_dates):
        ascending = index % 2 == 0
        clock = dt.time(16, 50, 12) if ascending else dt.time(5, 1, 43)
        out.append(RadarPass(index, dt.datetime.combine(date, clock, dt.UTC), ascending, 146 if ascending else 51))
    return tuple(out)


def mean_backscatter(ground: Ground, surface: Surface, overpass: RadarPass, polarisation: str) -> F32:
    """Compute gamma0 in linear power, before speckle."""
    level = np.array(_MEAN_DB[polarisation], np.float32).take(ground.classes)
    cls = ground.classes
    # a closed canopy scatters in its volume; wind roughens water from pass to pass
    level += np.float32(4.2 if polarisation == "vh" else 1.8) * surface.share * (cls == CROP)
    level += np.array([0, 0.5, 1.2, 0.5, 0.5, 0.5, 0.8, 0.9], np.float32).take(cls) * ground.coarse
    level += np.float32(3.2) * (ground.roof - np.float32(0.5)) * (cls == BUILT)
    level += np.float32(1.4) * (ground.blend - np.float32(0.5)) * ((cls == BARE) | (cls == FOREST))
    # slopes that face the sensor stay a little brighter after terrain correction
    towards = ground.slope_east if overpass.ascending else -ground.slope_east
    level -= np.float32(4.0) * towards
    if overpass.index % 2:
        level += np.float32(1.5) * (cls == 1)
    power: F32 = np.power(np.float32(10.0), level * np.float32(0.1))
    return power


class Change(Protocol):
    """Whatever changes the mean backscatter of a window on a day."""

    def change_backscatter(self, power: F32, ground: Ground, day: dt.date, polarisation: str) -> None: ...


def backscatter(
    config: SimulateConfig, world: Grid, ground: Ground, surface: Surface, overpass: RadarPass, polarisation: str,
    change: Change | None = None,
) -> F32:  # fmt: skip
    """Compute gamma0 with speckle, as float32 of linear power; what is planted scatters in its own way."""
    key = key_of(config.seed, "speckle", overpass.index, polarisation)

    def draw(rng: np.random.Generator, shape: tuple[int, int]) -> F32:
        return rng.standard_gamma(ENL, shape, dtype=np.float32) * np.float32(1.0 / ENL)

    mean = mean_backscatter(ground, surface, overpass, polarisation)
    if change is not None:
        change.change_backscatter(mean, ground, overpass.time.date(), polarisation)
    power = mean * white(key, world, ground.grid, draw)
    return _round_mantissa(power)


def _round_mantissa(values: F32, keep_bits: int = 11) -> F32:
    """Round float32 to `keep_bits` of mantissa: 0.02 % of the value, far below speckle; files shrink by half."""
    drop = 23 - keep_bits
    bits = values.view(np.uint32) + np.uint32(1 << (drop - 1))
    return (bits & np.uint32(0xFFFFFFFF << drop & 0xFFFFFFFF)).view(np.float32)
