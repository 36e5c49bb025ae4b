"""`SimulateConfig` describes a simulated world; tiles and acquisitions follow from it.

Tiles lie around a corner of the real MGRS lattice of UTM zone 33 (near 16.3° E, 45.2° N), where the Sentinel-2 tiles
33TWL, 33TXL, 33TWK and 33TXK meet: each simulated tile is the part of its namesake next to that corner, so the
names, coordinates and overlaps agree with each other.
"""

from __future__ import annotations

import datetime as dt
import math
from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from zarr_store.grid import Bounds, Grid

__all__ = ["CRS", "Acquisition", "Anomaly", "AnomalyKind", "Radiometry", "SimulateConfig", "Tile"]

CRS = "EPSG:32633"

# Left edge of column X and top edge of row K in the Sentinel-2 tiling grid: where the four tiles meet.
_CORNER_X = 600_000.0
_CORNER_Y = 5_000_040.0
# Order in which tiles are added: the two of the upper row, then the lower row.
_TILES = (("33TWL", 0, 0), ("33TXL", 0, 1), ("33TWK", 1, 0), ("33TXK", 1, 1))

Radiometry = Literal["none", "offset", "subtracted", "mislabelled"]
"""How a scene stores reflectance, with DN = 10 000 · reflectance + n:

none: baseline 03.01, n = 0 · offset: baseline ≥ 04.00, n = 1000, as the metadata state · subtracted: baseline 05.09
from a provider that subtracted the 1000 (`earthsearch:boa_offset_applied: true`) but still lists offset −0.1 ·
mislabelled: metadata as for "subtracted", but n = 1000 in the pixels (earth-search#9).
"""
BASELINES: dict[Radiometry, str] = {"none": "03.01", "offset": "05.10", "subtracted": "05.09", "mislabelled": "05.09"}

# Sentinel-2 returns to an orbit after 10 days and 143 revolutions; day 0 is S2A on R122, 2023-08-18, revolution 42590.
_DAY_0 = dt.date(2023, 8, 18)
_ORBIT_OF_DAY = {0: ("A", 122), 2: ("B", 79), 5: ("B", 122), 7: ("A", 79)}
_REVOLUTION_0 = {"A": 42590, "B": 33682}


@dataclass(frozen=True)
class Tile:
    """One MGRS tile, with its name and its grid of full resolution."""

    name: str
    grid: Grid


@dataclass(frozen=True)
class Acquisition:
    """One Sentinel-2 overpass of the whole world.

    Attributes:
        index: Position among the dates of the config.
        time: Sensing time (UTC) of the datatake.
        platform: "A" or "B".
        orbit: Relative orbit; it fixes the swath edge.
        revolution: Absolute orbit.
        radiometry: Relation of DN and reflectance.
        baseline: Processing baseline, e.g. "05.09".
        cloud_share: Share of the sky that clouds should cover.
        sun_elevation: Degrees above the horizon.
        sun_azimuth: Degrees clockwise from north.
    """

    index: int
    time: dt.datetime
    platform: str
    orbit: int
    revolution: int
    radiometry: Radiometry
    baseline: str
    cloud_share: float
    sun_elevation: float
    sun_azimuth: float

    @property
    def day_of_year(self) -> int:
        return self.time.timetuple().tm_yday

    @property
    def dn_offset(self) -> int:
        """Number by which the stored DN exceed 10 000 · reflectance."""
        return 1000 if self.radiometry in ("offset", "mislabelled") else 0


AnomalyKind = Literal["building", "clear-cut", "flood", "burn", "ship", "cloud"]
"""Kinds of anomalies that can be planted; "cloud" is a cloud that the scene classification misses."""


class Anomaly(BaseModel):
    """Anomalies of one kind that are planted in a world.

    Attributes:
        kind: Kind of the anomalies.
        date: First day on which they are visible; a cloud is visible on this day alone.
        until: Last day; None for no end.
        count: Number of them.
        size_m: Length or diameter; None for the usual size of the kind.
        x, y: Centre in the CRS of the world; None draws a place on ground of the right kind.
        seed: Seed of the drawn places, together with the seed of the world.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: AnomalyKind
    date: dt.date
    until: dt.date | None = None
    count: int = Field(default=1, ge=1, le=200)
    size_m: float | None = Field(default=None, ge=10.0, le=20_000.0)
    x: float | None = None
    y: float | None = None
    seed: int = Field(default=0, ge=0, lt=2**63)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.x is None) != (self.y is None):
            raise ValueError("x and y belong together: give both or neither")
        if self.x is not None and self.count > 1:
            raise ValueError(f"count is {self.count}, but x and y name one place: leave count out, or x and y")
        if self.until is not None and self.until < self.date:
            raise ValueError(f"until {self.until} lies before date {self.date}")
        return self


class SimulateConfig(BaseModel):
    """A simulated world; equal configs give equal bytes.

    Attributes:
        seed: Number from which everything random follows.
        tiles: Number of MGRS tiles, 1 to 4 (two side by side, then a second row).
        tile_px: Side of a tile in pixels of `resolution_m`; even, so that the 20 m bands nest.
        overlap_px: Pixels that neighbouring tiles share; even.
        resolution_m: Pixel size of blue, green, red and nir; the other bands have twice that.
        dates: Days of the Sentinel-2 overpasses.
        radiometry: One entry per date, repeated as needed.
        clouds: Mean share of the sky under cloud; each date has its own share around it. 0 for clear skies.
        radar_dates: Days of the Sentinel-1 passes, ascending and descending in turn.
        block_px: Side of the internal tiles of the COGs.
        anomalies: Anomalies to plant; their truth is written next to the scenes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int = Field(default=7, ge=0, lt=2**63)
    tiles: int = Field(default=2, ge=1, le=4)
    tile_px: int = Field(default=1024, ge=32, le=10_980)
    overlap_px: int = Field(default=128, ge=0)
    resolution_m: float = Field(default=10.0, ge=10.0, le=120.0)
    dates: tuple[dt.date, ...] = Field(
        default=(dt.date(2021, 8, 8), dt.date(2022, 4, 20), dt.date(2022, 6, 16), dt.date(2022, 7, 24)),
        min_length=1,
        max_length=40,
    )
    radiometry: tuple[Radiometry, ...] = Field(default=("none", "offset", "subtracted", "offset"), min_length=1)
    clouds: float = Field(default=0.15, ge=0.0, le=0.9)
    radar_dates: tuple[dt.date, ...] = Field(default=(dt.date(2022, 4, 18), dt.date(2022, 7, 23)), max_length=40)
    block_px: int = Field(default=256, ge=128, multiple_of=16)
    anomalies: tuple[Anomaly, ...] = Field(default=(), max_length=1000)

    @field_validator("dates", "radar_dates")
    @classmethod
    def _ascending(cls, dates: tuple[dt.date, ...]) -> tuple[dt.date, ...]:
        if list(dates) != sorted(set(dates)):
            raise ValueError(f"dates must be ascending and each occur once, got {[d.isoformat() for d in dates]}")
        return dates

    @model_validator(mode="after")
    def _sizes(self) -> Self:
        if self.tile_px % 2 or self.overlap_px % 2:
            raise ValueError(f"tile_px and overlap_px must be even, got {self.tile_px} and {self.overlap_px}")
        if self.overlap_px >= self.tile_px:
            raise ValueError(f"overlap_px must be less than tile_px, got {self.overlap_px} of {self.tile_px}")
        if self.resolution_m % 10:
            raise ValueError(f"resolution_m must be a multiple of 10, got {self.resolution_m:g}")
        for one in self.anomalies:
            if one.kind == "cloud" and one.date not in self.dates:
                raise ValueError(
                    f"anomaly cloud: {one.date} is not one of the dates {[d.isoformat() for d in self.dates]}"
                )
            if one.date > max((*self.dates, *self.radar_dates)):
                raise ValueError(f"anomaly {one.kind}: {one.date} is after the last date, so no scene would show it")
        return self

    def tile_list(self) -> tuple[Tile, ...]:
        """List the tiles, first the upper row from west to east."""
        size = self.tile_px * self.resolution_m
        overlap = self.overlap_px * self.resolution_m
        out = []
        for name, row, col in _TILES[: self.tiles]:
            left = _CORNER_X + (0.0 if col else overlap - size)
            top = _CORNER_Y + (0.0 if row else size - overlap)
            transform = (self.resolution_m, 0.0, left, 0.0, -self.resolution_m, top)
            out.append(Tile(name, Grid(CRS, transform, (self.tile_px, self.tile_px))))
        return tuple(out)

    def world_grid(self) -> Grid:
        """Make the smallest grid that holds all tiles."""
        every = [tile.grid.bounds for tile in self.tile_list()]
        bounds: Bounds = (
            min(b[0] for b in every),
            min(b[1] for b in every),
            max(b[2] for b in every),
            max(b[3] for b in every),
        )
        return Grid.from_bounds(CRS, bounds, resolution=self.resolution_m, anchor=(bounds[0], bounds[3]))

    def acquisitions(self) -> tuple[Acquisition, ...]:
        """List the Sentinel-2 overpasses, in order of time."""
        # a low-discrepancy sequence, so that even a few dates are clear and cloudy: 0.29, 1.53, 0.77, 0.01, …
        factors = [2.0 * ((0.62 * i + 0.145) % 1.0) for i in range(len(self.dates))]
        out = []
        for index, (date, factor) in enumerate(zip(self.dates, factors, strict=True)):
            phase = (date - _DAY_0).days % 10
            # a date without a real overpass gets the last orbit before it
            letter, orbit = _ORBIT_OF_DAY[max(day for day in _ORBIT_OF_DAY if day <= phase)]
            time = dt.datetime.combine(date, dt.time(10, 0, 31) if orbit == 122 else dt.time(9, 50, 31), dt.UTC)
            radiometry = self.radiometry[index % len(self.radiometry)]
            elevation, azimuth = _sun(time)
            revolution = _REVOLUTION_0[letter] + round((date - _DAY_0).days * 14.3)
            out.append(
                Acquisition(
                    index=index,
                    time=time,
                    platform=letter,
                    orbit=orbit,
                    revolution=revolution,
                    radiometry=radiometry,
                    baseline=BASELINES[radiometry],
                    cloud_share=min(0.95, self.clouds * factor),
                    sun_elevation=elevation,
                    sun_azimuth=azimuth,
                )
            )
        return tuple(out)

    def to_dict(self) -> dict[str, Any]:
        """Make the JSON form, for the world's manifest; without anomalies it has the form of releases that had none."""
        document = self.model_dump(mode="json")
        if not self.anomalies:
            del document["anomalies"]
        return document


def _sun(time: dt.datetime, lon: float = 16.3, lat: float = 45.2) -> tuple[float, float]:
    """Compute elevation and azimuth of the sun in degrees, to about a degree.

    Declination after P. I. Cooper (1969), "The absorption of radiation in solar stills", Solar Energy 12 (3).
    """
    day = time.timetuple().tm_yday
    declination = math.radians(23.45 * math.sin(math.radians(360.0 * (284 + day) / 365.0)))
    hour_angle = math.radians(15.0 * (time.hour + time.minute / 60 + lon / 15 - 12))
    phi = math.radians(lat)
    sine = math.sin(phi) * math.sin(declination) + math.cos(phi) * math.cos(declination) * math.cos(hour_angle)
    elevation = math.asin(sine)
    # measured from south, west positive; then turned to clockwise from north
    south = math.atan2(
        math.sin(hour_angle), math.cos(hour_angle) * math.sin(phi) - math.tan(declination) * math.cos(phi)
    )
    return (round(math.degrees(elevation), 6), round((math.degrees(south) + 180.0) % 360.0, 6))
