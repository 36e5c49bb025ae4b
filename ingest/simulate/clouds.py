"""`sky` makes clouds and their shadows, and `scene_classes` the scene classification that matches them.

Each date has one field of optical thickness; shadows are the same field, moved away from the sun by the cloud's height.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from ingest.simulate.config import Acquisition, SimulateConfig
from ingest.simulate.ground import BARE, BUILT, WATER, Ground
from ingest.simulate.noise import F32, fractal, key_of
from ingest.simulate.spectra import Surface
from zarr_store.grid import Grid

__all__ = ["SCL_CLASSES", "SCL_CLOUD", "Sky", "cover", "scene_classes", "sky"]

SCL_CLASSES: tuple[tuple[int, str, str, str], ...] = (
    (0, "no_data", "No data", "000000"),
    (1, "saturated_or_defective", "Saturated or defective pixel", "ff0000"),
    (2, "dark_area_pixels", "Topographic casted shadows", "2f2f2f"),
    (3, "cloud_shadows", "Cloud shadows", "643200"),
    (4, "vegetation", "Vegetation", "00a000"),
    (5, "not_vegetated", "Not vegetated", "ffe65a"),
    (6, "water", "Water", "0000ff"),
    (7, "unclassified", "Unclassified", "808080"),
    (8, "cloud_medium_probability", "Cloud, medium probability", "c0c0c0"),
    (9, "cloud_high_probability", "Cloud, high probability", "ffffff"),
    (10, "thin_cirrus", "Thin cirrus", "64c8ff"),
    (11, "snow", "Snow or ice", "ff96ff"),
)
"""Value, name, description and colour hint of each class of the Sentinel-2 scene classification (ESA, Sen2Cor)."""

SCL_CLOUD = (8, 9, 10)
"""Values that count as cloud cover."""

# Reflectance of thick cloud by band, falling where water droplets absorb.
_CLOUD = np.array([0.66, 0.66, 0.67, 0.67, 0.68, 0.68, 0.68, 0.67, 0.48, 0.36], np.float32)
_CIRRUS = np.array([0.50, 0.48, 0.48, 0.48, 0.48, 0.48, 0.48, 0.48, 0.30, 0.24], np.float32)
# Share of the light that is left in full shadow; it comes from the sky, so more of the blue is left.
_SHADE = np.array([0.52, 0.47, 0.42, 0.41, 0.40, 0.39, 0.38, 0.37, 0.32, 0.30], np.float32)

# Opacity from which Sen2Cor-like masks call a pixel medium and high probability cloud, and shadow.
_MEDIUM, _HIGH, _SHADOWED, _VISIBLE_CIRRUS = 0.12, 0.45, 0.20, 0.035


@dataclass(frozen=True)
class Sky:
    """The sky over one window on one date, as arrays of the window's shape with values 0 … 1.

    Attributes:
        cloud: Opacity of the cloud.
        cirrus: Opacity of thin high cloud.
        shadow: Depth of the cloud's shadow on the ground.
    """

    cloud: F32
    cirrus: F32
    shadow: F32

    def over(self, reflectance: F32, band: int) -> F32:
        """Compute the reflectance of the ground as it is seen through shadow, cloud and cirrus."""
        seen = reflectance * (np.float32(1) - (np.float32(1) - _SHADE[band]) * self.shadow)
        seen += (_CLOUD[band] - seen) * self.cloud
        seen += (_CIRRUS[band] - seen) * self.cirrus
        out: F32 = seen
        return out


def cover(reflectance: F32, opacity: F32, band: int) -> F32:
    """Compute the reflectance under thick cloud of an opacity."""
    covered: F32 = reflectance + (_CLOUD[band] - reflectance) * opacity
    return covered


def shadow_offset(config: SimulateConfig, acquisition: Acquisition, scale: float) -> tuple[float, float]:
    """Compute the metres (east, north) from a cloud to its shadow.

    The cloud base lies at 1100 to 1900 m. Tangent rule: length = height / tan(sun elevation), away from the sun.
    """
    height = scale * (1100.0 + 800.0 * ((0.37 * (config.seed + acquisition.index)) % 1.0))
    length = height / math.tan(math.radians(acquisition.sun_elevation))
    azimuth = math.radians(acquisition.sun_azimuth)
    return (-length * math.sin(azimuth), -length * math.cos(azimuth))


def sky(config: SimulateConfig, acquisition: Acquisition, grid: Grid, scale: float) -> Sky:
    """Make clouds, cirrus and shadows over a grid on one date."""
    if acquisition.cloud_share < 0.005:
        clear = np.zeros(grid.shape, np.float32)
        return Sky(clear, clear, clear)
    cloud = _opacity(config, acquisition, grid, scale)
    east, north = shadow_offset(config, acquisition, scale)
    # the shadow at a place belongs to the cloud that lies towards the sun
    a, b, c, d, e, f = grid.transform
    caster = Grid(grid.crs, (a, b, c - east, d, e, f - north), grid.shape)
    shadow = _opacity(config, acquisition, caster, scale) * (np.float32(1) - cloud)
    key = key_of(config.seed, "cirrus", acquisition.index)
    thin = fractal(key, grid, 3800.0 * scale, octaves=3)
    cirrus = np.float32(0.16) * np.clip((thin - np.float32(1.15)) / np.float32(0.9), 0, 1)
    return Sky(cloud, cirrus, shadow)


def _opacity(config: SimulateConfig, acquisition: Acquisition, grid: Grid, scale: float) -> F32:
    """Make cumulus: a fractal field, cut where the wanted share of the sky is covered."""
    key = key_of(config.seed, "cloud", acquisition.index)
    field = fractal(key, grid, 2300.0 * scale, octaves=6, gain=0.58)
    # the field is close to normal, so the cut for a share is the normal's quantile
    cut = NormalDist().inv_cdf(1.0 - acquisition.cloud_share)
    edge = np.clip((field - np.float32(cut - 0.08)) / np.float32(0.42), 0, 1)
    opacity: F32 = edge * edge * (np.float32(3) - np.float32(2) * edge)
    return opacity


def scene_classes(ground: Ground, surface: Surface, above: Sky) -> npt.NDArray[np.uint8]:
    """Make the scene classification (SCL) of a window, before nodata is set."""
    scl = np.where(surface.vegetated, np.uint8(4), np.uint8(5))
    scl[ground.classes == WATER] = 6
    # the classifier leaves a few bright roofs and gravel pits undecided
    undecided = ((ground.classes == BUILT) & (ground.roof > 0.97)) | ((ground.classes == BARE) & (ground.fine > 2.4))
    scl[undecided] = 7
    scl[above.shadow > _SHADOWED] = 3
    scl[above.cirrus > _VISIBLE_CIRRUS] = 10
    scl[above.cloud > _MEDIUM] = 8
    scl[above.cloud > _HIGH] = 9
    return scl
