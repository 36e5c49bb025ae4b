"""`CubeReader` reads boxes of a cube as physical numbers, with NaN where nothing clear was observed.

Backscatter becomes decibels, in which speckle is added to the signal and no longer multiplies it. Boxes are whole
chunks inside one column of shards, in row-major order, and no larger than a fixed number of values.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from jaxtrain.tasks.table import Feature
from zarr_store.errors import InvalidInput, UnknownName
from zarr_store.lookup import find_band
from zarr_store.read import Cube, open_cube
from zarr_store.regions import Region
from zarr_store.spec import STATUS_OBSERVED, BandSpec, CubeSpec

__all__ = ["BY_BANDS", "Box", "CubeReader", "open_reader"]

Values = npt.NDArray[np.float32]
BY_BANDS = "others with --bands"
"""How other bands are chosen, for errors."""
_MOST_VALUES = 8 << 20
"""Largest number of values of a box over all dates and bands: 32 MB as float32, and about three times that at work."""


@dataclass(frozen=True, order=True)
class Box:
    """A box of rows and columns of a cube, over all its chosen dates."""

    y0: int
    y1: int
    x0: int
    x1: int

    @property
    def shape(self) -> tuple[int, int]:
        """Size as (height, width)."""
        return (self.y1 - self.y0, self.x1 - self.x0)

    def grown(self, pixels: int, shape: tuple[int, int]) -> Box:
        """Return the box with `pixels` more on each side, cut at a grid of `shape`."""
        return Box(max(0, self.y0 - pixels), min(shape[0], self.y1 + pixels),
                   max(0, self.x0 - pixels), min(shape[1], self.x1 + pixels))  # fmt: skip

    def inside(self, outer: Box) -> tuple[slice, slice]:
        """Return the slices that cut this box out of an array of `outer`."""
        return (slice(self.y0 - outer.y0, self.y1 - outer.y0), slice(self.x0 - outer.x0, self.x1 - outer.x0))


class CubeReader:
    """Reader of chosen bands, indices and dates of one collection.

    Args:
        cube: The cube.
        collection: Group of the cube; None for its first.
        bands: Names of bands and of stored indices; none for all bands.
        time: Dates, ranges or positions; None for all.

    Raises:
        UnknownName: A name means no collection, band, index or date.
        InvalidInput: Backscatter is not above 0, so it is not power, and its unit does not say decibels.
    """

    remedy = BY_BANDS

    def __init__(
        self, cube: Cube, *, collection: str | None = None, bands: str | tuple[str, ...] = (), time: str | None = None
    ) -> None:
        self.cube = cube
        self.spec: CubeSpec = cube.spec(collection or cube.collections[0])
        self.dates: tuple[int, ...] = (
            tuple(range(len(self.spec.times))) if time is None else self.spec.find_times(time, option="--time")
        )
        self._positions, self._indices, self.names = _choose(self.spec, bands)
        self.radar = self.spec.kind == "backscatter"
        if self.radar:
            _check_power(cube, self.spec)
        rows = cube.ledger(self.spec.collection).rows()
        self._there = {index for index, row in rows.items() if row.state != "failed"}
        self.absent = sum(index not in self._there for index, _ in self.spec.iterate_shards())
        self.asked: dict[str, Any] = {"bands": self.names}
        self.made_by: dict[str, str] = {}
        self.warnings: tuple[str, ...] = (
            (f"{self.absent} of {self.spec.shard_count} shards of {cube.url} were never written: no data there",)
            if self.absent
            else ()
        )

    @property
    def features(self) -> tuple[Feature, ...]:
        """The bands and indices, without a date."""
        by_name = {band.name: band for band in self.spec.bands}
        return tuple(
            Feature(name, ("dB" if self.radar else by_name[name].unit) if name in by_name else "1",
                    wavelength_um=by_name[name].wavelength_um if name in by_name else None)
            for name in self.names
        )  # fmt: skip

    @property
    def times(self) -> tuple[str, ...]:
        """ISO times of the chosen dates."""
        return tuple(self.spec.times[at] for at in self.dates)

    @functools.cached_property
    def boxes(self) -> tuple[Box, ...]:
        """The boxes that together cover the grid."""
        (_, height, width), (_, sy, sx), (_, cy, cx) = self.spec.shape, self.spec.layout.shard, self.spec.layout.chunk
        per_pixel = max(1, len(self.dates) * len(self.names))
        wide = min(sx, max(1, _MOST_VALUES // (per_pixel * cy * cx)) * cx)
        high = min(sy, max(1, _MOST_VALUES // (per_pixel * cy * wide)) * cy)
        return tuple(
            Box(y, min(y + high, y_end, height), x, min(x + wide, x_end, width))
            for y_start in range(0, height, sy) for x_start in range(0, width, sx)
            for y_end, x_end in [(y_start + sy, x_start + sx)]
            for y in range(y_start, min(y_end, height), high) for x in range(x_start, min(x_end, width), wide)
        )  # fmt: skip

    def read(self, box: Box, dates: tuple[int, ...] | None = None) -> tuple[Values, npt.NDArray[np.bool_]]:
        """Read one box.

        Args:
            box: Rows and columns.
            dates: Positions in the cube; None for the chosen ones.

        Returns:
            float32 (time, band, y, x) with NaN where a number is absent or not clear; bool (time, y, x), whether the
            pixel was observed clear.
        """
        wanted = self.dates if dates is None else dates
        values = np.full((len(wanted), len(self.names), *box.shape), np.nan, np.float32)
        clear = np.zeros((len(wanted), *box.shape), bool)
        for part, run in self._parts(box, wanted):
            first = wanted.index(run[0])
            there = (slice(first, first + len(run)), slice(part.y0 - box.y0, part.y1 - box.y0),
                     slice(part.x0 - box.x0, part.x1 - box.x0))  # fmt: skip
            region = Region(run[0], run[-1] + 1, part.y0, part.y1, part.x0, part.x1)
            self._fill(region, values[there[0], :, there[1], there[2]], clear[there])
        return values, clear

    def bands_without_numbers(self) -> tuple[str, ...]:
        """Return the bands and indices that hold no number anywhere, whatever is known of their pixels."""
        lacking = set(self.names)
        for index, region in self.spec.iterate_shards():
            if not lacking:
                break
            if index not in self._there or not set(range(region.t0, region.t1)) & set(self.dates):
                continue
            values = np.empty((region.t1 - region.t0, len(self.names), *region.shape[1:]), np.float32)
            self._read_values(region, values)
            lacking -= {name for at, name in enumerate(self.names) if np.isfinite(values[:, at]).any()}
        return tuple(name for name in self.names if name in lacking)

    def _fill(self, region: Region, values: Values, clear: npt.NDArray[np.bool_]) -> None:
        clear[...] = self.cube.read(self.spec.collection, "status", region) == STATUS_OBSERVED
        self._read_values(region, values)
        values[~np.broadcast_to(clear[:, None], values.shape)] = np.nan

    def _read_values(self, region: Region, values: Values) -> None:
        spec, name = self.spec, self.spec.collection
        if self._positions:
            stored = self.cube.read(name, spec.kind, region, bands=[p for p, _ in self._positions])
            for number, (position, at) in enumerate(self._positions):
                band = spec.bands[position]
                linear = self.radar and not _in_decibels(band)
                values[:, at] = _physical(stored[:, number], band.nodata, band.scale, band.offset, radar=linear)
        for index, at in self._indices:
            derived = next(one for one in spec.derived if one.name == index)
            values[:, at] = _physical(self.cube.read(name, index, region), derived.nodata, derived.scale, 0.0)

    def _parts(self, box: Box, wanted: tuple[int, ...]) -> list[tuple[Box, tuple[int, ...]]]:
        """Cut a box at the edges of shards that were written; dates that follow each other stay together."""
        st, sy, sx = self.spec.layout.shard
        found = []
        for y in range(box.y0 // sy, -(-box.y1 // sy)):
            for x in range(box.x0 // sx, -(-box.x1 // sx)):
                part = Box(
                    max(box.y0, y * sy), min(box.y1, (y + 1) * sy), max(box.x0, x * sx), min(box.x1, (x + 1) * sx)
                )
                run: list[int] = []
                for date in wanted:
                    if run and date != run[-1] + 1:
                        found.append((part, tuple(run)))
                        run = []
                    if (date // st, y, x) in self._there:
                        run.append(date)
                    elif run:
                        found.append((part, tuple(run)))
                        run = []
                if run:
                    found.append((part, tuple(run)))
        return found


def open_reader(url: str, **chosen: Any) -> CubeReader:
    """Open a cube as a `CubeReader`."""
    return CubeReader(open_cube(url), **chosen)


def _choose(
    spec: CubeSpec, bands: str | tuple[str, ...]
) -> tuple[list[tuple[int, int]], list[tuple[str, int]], tuple[str, ...]]:
    """Return (position of the band, position in the values), the same of indices, and all names."""
    asked = [text.strip() for text in (bands.split(",") if isinstance(bands, str) else bands) if text.strip()]
    if not asked:
        return [(at, at) for at in range(len(spec.bands))], [], spec.band_names
    known = (*spec.band_names, *(one.name for one in spec.derived))
    found = {text: find_band(text, known) for text in asked}
    if wrong := [text for text, name in found.items() if name is None]:
        raise UnknownName.of("band", wrong, known, f"collection {spec.collection} (--bands)")
    names = tuple(str(found[text]) for text in asked)
    if len(set(names)) != len(names):
        raise InvalidInput(f"--bands names one band twice: {', '.join(asked)}; name each once")
    positions = [(spec.band_names.index(name), at) for at, name in enumerate(names) if name in spec.band_names]
    return positions, [(name, at) for at, name in enumerate(names) if name not in spec.band_names], names


def _in_decibels(band: BandSpec) -> bool:
    return band.unit.strip().lower() in ("db", "decibel", "decibels")


def _check_power(cube: Cube, spec: CubeSpec) -> None:
    """Refuse backscatter whose mean is not above 0 and whose unit does not say decibels; no pixel is read."""
    index = cube.index(spec.collection)
    if not index.observed.any():
        return
    for band, mean in zip(spec.bands, index.statistics()[0], strict=True):
        physical = float(mean) * band.scale + band.offset
        if not _in_decibels(band) and physical <= 0:
            raise InvalidInput(
                f"{cube.url}: band {band.name} of {spec.collection} has the mean {physical:.4g}, and power is above 0: "
                "if the numbers are decibels, the cube must state the unit dB"
            )


def _physical(
    stored: npt.NDArray[Any], nodata: float | None, scale: float, offset: float, *, radar: bool = False
) -> Values:
    values: Values = stored.astype(np.float32)
    if scale != 1.0 or offset != 0.0:
        values = values * np.float32(scale) + np.float32(offset)
    if nodata is not None and np.isfinite(nodata):
        values[stored == nodata] = np.nan
    if radar:
        with np.errstate(divide="ignore", invalid="ignore"):
            values = np.float32(10.0) * np.log10(values)
    values[~np.isfinite(values)] = np.nan
    return values
