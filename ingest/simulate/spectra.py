"""`surface` gives the surface reflectance of the ground in ten Sentinel-2 bands on a given day.

A pixel mixes two materials; the share of the second follows the season (phenology per crop and parcel), and
brightness follows texture, parcel and the slope towards the sun.

The reflectances are round numbers, set to the order of magnitude and the shape (red edge, water absorption, the rise of
soils towards 1.6 µm) of laboratory and field spectra in the USGS Spectral Library 7 (Kokaly et al. 2017,
doi:10.3133/ds1035) and the ECOSTRESS library (Meerdink et al. 2019, doi:10.1016/j.rse.2019.05.015); they are not
measurements. Seasons are double logistic curves as in Beck et al. 2006 (doi:10.1016/j.rse.2005.10.021).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ingest.simulate.config import Acquisition
from ingest.simulate.ground import BARE, BUILT, CROP, FOREST, GRASS, WATER, WETLAND, Ground
from ingest.simulate.noise import F32

__all__ = ["BANDS", "Band", "Surface", "material", "surface"]


@dataclass(frozen=True)
class Band:
    """One Sentinel-2 band, with asset key, ESA name, nominal pixel size, wavelength and width.

    Wavelengths: ESA Sentinel-2 User Handbook, table of spectral bands (S2A, rounded as Earth Search gives them).
    """

    key: str
    name: str
    gsd_m: int
    wavelength_um: float
    width_um: float
    title: str


BANDS: tuple[Band, ...] = (
    Band("blue", "B02", 10, 0.49, 0.098, "Blue (band 2) - 10m"),
    Band("green", "B03", 10, 0.56, 0.045, "Green (band 3) - 10m"),
    Band("red", "B04", 10, 0.665, 0.038, "Red (band 4) - 10m"),
    Band("rededge1", "B05", 20, 0.704, 0.019, "Red edge 1 (band 5) - 20m"),
    Band("rededge2", "B06", 20, 0.74, 0.018, "Red edge 2 (band 6) - 20m"),
    Band("rededge3", "B07", 20, 0.783, 0.028, "Red edge 3 (band 7) - 20m"),
    Band("nir", "B08", 10, 0.842, 0.145, "NIR 1 (band 8) - 10m"),
    Band("nir08", "B8A", 20, 0.865, 0.033, "NIR 2 (band 8A) - 20m"),
    Band("swir16", "B11", 20, 1.61, 0.143, "SWIR 1 (band 11) - 20m"),
    Band("swir22", "B12", 20, 2.19, 0.242, "SWIR 2 (band 12) - 20m"),
)

# Rows in the order of BANDS: B02 B03 B04 B05 B06 B07 B08 B8A B11 B12.
_MATERIALS: dict[str, tuple[float, ...]] = {
    "clear water": (0.040, 0.038, 0.024, 0.019, 0.015, 0.014, 0.012, 0.011, 0.006, 0.004),
    "turbid water": (0.056, 0.078, 0.066, 0.056, 0.036, 0.034, 0.030, 0.027, 0.012, 0.008),
    "reed": (0.036, 0.064, 0.050, 0.098, 0.225, 0.262, 0.280, 0.292, 0.165, 0.090),
    "conifer": (0.020, 0.032, 0.021, 0.050, 0.150, 0.185, 0.200, 0.212, 0.100, 0.046),
    "broadleaf": (0.023, 0.045, 0.024, 0.075, 0.260, 0.330, 0.350, 0.365, 0.165, 0.075),
    "leafless wood": (0.042, 0.056, 0.066, 0.095, 0.150, 0.172, 0.186, 0.202, 0.205, 0.135),
    "grass": (0.036, 0.070, 0.048, 0.105, 0.255, 0.300, 0.320, 0.335, 0.220, 0.118),
    "ley": (0.030, 0.066, 0.036, 0.097, 0.292, 0.372, 0.398, 0.412, 0.206, 0.103),
    "dry grass": (0.058, 0.088, 0.098, 0.140, 0.210, 0.235, 0.255, 0.270, 0.285, 0.195),
    "green crop": (0.027, 0.064, 0.030, 0.092, 0.320, 0.420, 0.450, 0.465, 0.195, 0.092),
    "straw": (0.082, 0.122, 0.158, 0.192, 0.230, 0.250, 0.272, 0.290, 0.325, 0.240),
    "ploughed soil": (0.062, 0.084, 0.112, 0.132, 0.148, 0.158, 0.172, 0.186, 0.238, 0.205),
    "dry soil": (0.088, 0.115, 0.150, 0.171, 0.188, 0.199, 0.213, 0.228, 0.292, 0.262),
    "sand": (0.118, 0.152, 0.192, 0.212, 0.228, 0.238, 0.250, 0.262, 0.330, 0.300),
    "gravel": (0.098, 0.114, 0.132, 0.142, 0.150, 0.156, 0.164, 0.172, 0.205, 0.192),
    "tile roof": (0.078, 0.098, 0.165, 0.190, 0.205, 0.215, 0.228, 0.238, 0.275, 0.245),
    "asphalt": (0.098, 0.106, 0.114, 0.120, 0.126, 0.131, 0.138, 0.146, 0.166, 0.158),
    "metal roof": (0.205, 0.212, 0.218, 0.222, 0.226, 0.228, 0.232, 0.238, 0.245, 0.228),
    "char": (0.036, 0.042, 0.050, 0.055, 0.061, 0.066, 0.072, 0.080, 0.138, 0.142),
}
_NAMES = tuple(_MATERIALS)
_TABLE = np.array([_MATERIALS[name] for name in _NAMES], np.float32)

# Per crop: days of the year of green-up and ripening, steepness in 1/day, day after which it is ploughed.
_SEASONS = {
    "winter cereal": (78.0, 168.0, 0.10, 228.0),
    "maize": (158.0, 258.0, 0.12, 290.0),
    "rapeseed": (70.0, 166.0, 0.10, 215.0),
    "soy": (164.0, 252.0, 0.12, 280.0),
}


@dataclass(frozen=True)
class Surface:
    """The ground of one day; `reflectance(band)` is bottom-of-atmosphere reflectance without noise or cloud.

    Attributes:
        first, second: Index of each pixel's two materials.
        share: Share of the second material.
        light: Brightness factor.
        margin: Share of the pixel under grass margins.
        vegetated: True where the scene classification is vegetation.
    """

    first: npt.NDArray[np.uint8]
    second: npt.NDArray[np.uint8]
    share: F32
    light: F32
    margin: F32
    vegetated: npt.NDArray[np.bool_]

    def reflectance(self, band: int) -> F32:
        """Compute the reflectance in band number `band` of BANDS, on the ground's grid."""
        column = _TABLE[:, band]
        one = column.take(self.first)
        one += (column.take(self.second) - one) * self.share
        one += (column[_NAMES.index("grass")] - one) * self.margin
        one *= self.light
        return one


def surface(ground: Ground, acquisition: Acquisition) -> Surface:
    """Compute the materials, their shares and the light on the day of an acquisition."""
    day = float(acquisition.day_of_year)
    first = np.zeros(ground.grid.shape, np.uint8)
    second = np.zeros(ground.grid.shape, np.uint8)
    share = np.zeros(ground.grid.shape, np.float32)
    cls = ground.classes

    def put(where: npt.NDArray[np.bool_], one: str, two: str, part: F32 | float) -> None:
        first[where] = _NAMES.index(one)
        second[where] = _NAMES.index(two)
        share[where] = part[where] if isinstance(part, np.ndarray) else part

    summer = _logistic(day, 112.0, 0.10) - _logistic(day, 292.0, 0.08)
    grassy = 0.30 + 0.70 * (_logistic(day, 92.0, 0.09) - _logistic(day, 300.0, 0.06))
    dry = 0.45 * math.exp(-(((day - 215.0) / 32.0) ** 2))  # meadows yellow in high summer

    put(cls == WATER, "clear water", "turbid water", np.clip(ground.blend * 1.5 - 0.2, 0, 1))
    reeds = np.clip(0.50 + 0.30 * summer + 0.16 * ground.fine + 0.12 * ground.coarse, 0.1, 1.0)
    put(cls == WETLAND, "clear water", "reed", reeds)
    greenness = np.clip(grassy - dry * (0.5 + ground.parcel) + 0.12 * ground.coarse + 0.08 * ground.fine, 0, 1)
    put(cls == GRASS, "dry grass", "grass", greenness)
    # sown and fertilised meadows are nearly as lush as a crop
    put((cls == GRASS) & (ground.parcel > 0.6), "dry grass", "ley", np.clip(greenness + 0.1, 0, 1))
    conifer = ground.blend + np.float32(0.08) * ground.fine > 0.62
    put(cls == FOREST, "leafless wood", "broadleaf", float(summer))
    put((cls == FOREST) & conifer, "conifer", "broadleaf", 0.0)
    young = (cls == FOREST) & (ground.blend < 0.2)  # clearings and plantations
    put(young, "grass", "broadleaf", np.clip(0.55 * summer + 0.2 * ground.fine, 0, 1))
    sparse = np.clip(0.16 + 0.12 * ground.fine + 0.10 * ground.coarse, 0, 0.5)  # pioneer plants
    put(cls == BARE, "gravel", "dry grass", sparse)
    put((cls == BARE) & (ground.blend > 0.5), "sand", "dry grass", sparse)
    gardens = np.clip(0.05 + 0.75 * ground.blend + 0.16 * ground.fine, 0.0, 0.92) * np.float32(0.6 + 0.4 * grassy)
    for one, low, high in (("asphalt", 0.0, 0.34), ("tile roof", 0.34, 0.86), ("metal roof", 0.86, 1.0)):
        plot = (cls == BUILT) & (ground.roof >= low) & (ground.roof < high)
        put(plot, one, "grass", gardens)
        put(plot & (ground.roof * 50 % 1 < 0.3), one, "broadleaf" if summer > 0.5 else "leafless wood", gardens)
    crop = cls == CROP
    table, bare_material = _crop_tables(day)
    pick = (ground.crop, (ground.parcel * _SHIFTS).astype(np.uint8))
    first[crop] = bare_material[pick][crop]
    second[crop] = _NAMES.index("green crop")
    share[crop] = np.clip(table[pick] * (1.0 + 0.05 * ground.fine + 0.05 * ground.coarse), 0, 1)[crop]

    vegetated = ((cls == FOREST) & (conifer | (summer > 0.4))) | (cls == GRASS) | (crop & (share > 0.35))
    vegetated |= (cls == WETLAND) & (share > 0.75)
    margin = np.where(crop | (cls == GRASS), ground.margin, np.float32(0))
    return Surface(first, second, share, _light(ground, acquisition), margin, vegetated)


def material(name: str) -> int:
    """Return the index of a material."""
    return _NAMES.index(name)


# Number of steps in which sowing dates and vigour differ.
_SHIFTS = 32


def _logistic(day: float, middle: float, rate: float) -> float:
    return 1.0 / (1.0 + math.exp(-rate * (day - middle)))


def _crop_tables(day: float) -> tuple[F32, npt.NDArray[np.uint8]]:
    """Tabulate green cover and the material under it, by (crop, step of the parcel's shade)."""
    green = np.zeros((len(_SEASONS), _SHIFTS), np.float32)
    under = np.zeros((len(_SEASONS), _SHIFTS), np.uint8)
    for crop, (up, ripe, rate, plough) in enumerate(_SEASONS.values()):
        for step in range(_SHIFTS):
            part = step / (_SHIFTS - 1)
            late = 22.0 * (part - 0.5)  # parcels are sown within three weeks
            vigour = 0.78 + 0.20 * ((part * 7.0) % 1.0)
            green[crop, step] = vigour * max(0.0, _logistic(day - late, up, rate) - _logistic(day - late, ripe, rate))
            is_straw = ripe - 25.0 < day - late < plough + 40.0 * (part - 0.5)
            soil = "dry soil" if step % 3 == 0 else "ploughed soil"
            under[crop, step] = _NAMES.index("straw" if is_straw else soil)
    return green, under


def _light(ground: Ground, acquisition: Acquisition) -> F32:
    """Compute brightness from the texture of the class, parcel, slope to the sun, and view angle of the orbit."""
    # by class value 0 … 7: water, wetland, forest, grass, crop, bare, built
    fine = np.array([0, 0.03, 0.12, 0.17, 0.07, 0.06, 0.11, 0.17], np.float32).take(ground.classes)
    coarse = np.array([0, 0.06, 0.08, 0.09, 0.10, 0.10, 0.12, 0.06], np.float32).take(ground.classes)
    light = np.float32(1) + fine * ground.fine + coarse * ground.coarse
    light += (
        np.float32(0.32) * (ground.parcel - np.float32(0.5)) * ((ground.classes == CROP) | (ground.classes == GRASS))
    )
    # cosine of the sun's angle to the slope over that to the plain, half of it removed as by a terrain correction
    azimuth, cot = math.radians(acquisition.sun_azimuth), 1.0 / math.tan(math.radians(acquisition.sun_elevation))
    to_sun = -(ground.slope_east * math.sin(azimuth) + ground.slope_north * math.cos(azimuth)).astype(np.float32)
    light *= np.float32(1) + np.float32(0.5 * cot) * to_sun * (ground.classes != WATER)
    if acquisition.orbit == 79:  # seen from the west, with the sun at the back: a little brighter
        light *= np.float32(1.03)
    return np.clip(light, 0.3, 1.9)
