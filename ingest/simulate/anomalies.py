"""`plant` places anomalies in a simulated world, and `Planting` shows them in scenes, radar passes and truth.

An anomaly is a function of place and date: a new building, a clear-cut, a flood, a burnt area, a ship on water, or a
cloud that the scene classification misses. Where it lies follows from the seed alone, so equal configurations give
equal bytes.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from shapely.geometry import Polygon
from shapely.geometry import box as rectangle
from shapely.geometry.base import BaseGeometry

from ingest.simulate.config import Acquisition, Anomaly, AnomalyKind
from ingest.simulate.ground import CROP, FOREST, GRASS, WATER, WETLAND, Ground, Landscape
from ingest.simulate.noise import F32, fractal, key_of
from ingest.simulate.spectra import Surface, material
from ingest.simulate.swath import scene_swath
from zarr_store.errors import InvalidInput
from zarr_store.grid import Grid

__all__ = ["KINDS", "Planted", "Planting", "plant"]

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class _Look:
    """The properties of one kind of anomaly.

    Attributes:
        value: Number of the kind in tables.
        on: Land classes on which it is placed; none for all.
        share: Least share of its pixels that must be of these classes.
        ratio: Width over length of a rectangle; None for a ragged disc.
        size_m: Length or diameter, unless the file says otherwise.
        materials: The two materials of its pixels, and the share of the second; None leaves the ground as it is.
        decibels: Mean backscatter in VV and VH; None leaves it as it is.
    """

    value: int
    on: tuple[int, ...]
    share: float
    ratio: float | None
    size_m: float
    materials: tuple[str, str, float] | None
    decibels: tuple[float, float] | None


KINDS: dict[AnomalyKind, _Look] = {
    "building": _Look(1, (GRASS, CROP), 0.9, 0.7, 80.0, ("metal roof", "asphalt", 0.2), (1.0, -6.0)),
    "clear-cut": _Look(2, (FOREST,), 0.9, 0.7, 160.0, ("ploughed soil", "dry grass", 0.3), (-13.0, -21.0)),
    "flood": _Look(3, (WETLAND, GRASS, CROP), 0.5, None, 300.0, ("turbid water", "turbid water", 0.0), (-19.0, -26.5)),
    "burn": _Look(4, (FOREST, GRASS), 0.8, None, 240.0, ("char", "dry grass", 0.1), (-11.5, -17.5)),
    "ship": _Look(5, (WATER,), 0.9, 0.3, 80.0, ("metal roof", "asphalt", 0.4), (8.0, -2.0)),
    "cloud": _Look(6, (), 0.0, None, 260.0, None, None),
}
_CLOUD_OPACITY = 0.85
_TRIES = 400


@dataclass(frozen=True)
class Planted:
    """One anomaly where it lies.

    Attributes:
        number: 1, 2, …, its value in the raster of truth.
        kind: Kind of the anomaly.
        x, y: Centre in the CRS of the world.
        length_m, width_m: Size.
        angle: Direction of its length, radians from east.
        first: First day on which it is there.
        last: Last day on which it is there; None for no end.
        key: Stream of noise of a ragged edge.
    """

    number: int
    kind: AnomalyKind
    x: float
    y: float
    length_m: float
    width_m: float
    angle: float
    first: dt.date
    last: dt.date | None
    key: int

    @property
    def reach_m(self) -> float:
        """Metres from the centre beyond which none of it lies."""
        return 0.75 * max(self.length_m, self.width_m)

    def is_there(self, day: dt.date) -> bool:
        """Return whether it is there on a day."""
        return self.first <= day and (self.last is None or day <= self.last)

    def covers(self, grid: Grid) -> tuple[tuple[slice, slice], Bools] | None:
        """Return the box of a grid that it may touch, and which pixels of the box it covers; None where it is far."""
        x, y = grid.x(), grid.y()
        columns = np.flatnonzero(np.abs(x - self.x) <= self.reach_m)
        rows = np.flatnonzero(np.abs(y - self.y) <= self.reach_m)
        if not columns.size or not rows.size:
            return None
        box = (slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1))
        dx, dy = (x[box[1]] - self.x)[None, :], (y[box[0]] - self.y)[:, None]
        if KINDS[self.kind].ratio is not None:
            along = dx * math.cos(self.angle) + dy * math.sin(self.angle)
            across = dy * math.cos(self.angle) - dx * math.sin(self.angle)
            return box, (np.abs(along) <= self.length_m / 2) & (np.abs(across) <= self.width_m / 2)
        window = grid.window(box[0].start, box[1].start, box[0].stop - box[0].start, box[1].stop - box[1].start)
        ragged = np.clip(0.2 * fractal(self.key, window, self.length_m / 2, octaves=3), -0.45, 0.45)
        return box, np.hypot(dx, dy) <= self.length_m / 2 * (1.0 + ragged)


class Planting:
    """The anomalies of a world.

    Args:
        landscape: The ground under them.
        planted: Where they lie.
    """

    def __init__(self, landscape: Landscape, planted: Sequence[Planted] = ()) -> None:
        self.landscape, self.planted = landscape, tuple(planted)

    def __bool__(self) -> bool:
        return bool(self.planted)

    def change_surface(self, face: Surface, ground: Ground, day: dt.date) -> tuple[Surface, Ground]:
        """Return the surface with what is there on a day, and the ground with flooded land as water."""
        there = [one for one in self.planted if one.is_there(day) and KINDS[one.kind].materials]
        if not there:
            return face, ground
        names = ("first", "second", "share", "light", "margin", "vegetated")
        arrays = {name: getattr(face, name).copy() for name in names}
        classes = ground.classes.copy()
        for one in there:
            found, look = one.covers(ground.grid), KINDS[one.kind].materials
            if found is None or look is None:
                continue
            box, inside = found[0], self._land(one, ground.classes, found)
            bright = 1.0 + 0.05 * ground.fine[box][inside]
            for name, value in (("first", material(look[0])), ("second", material(look[1])), ("share", look[2]),
                                ("light", bright), ("margin", 0.0), ("vegetated", False)):  # fmt: skip
                arrays[name][box][inside] = value
            if one.kind == "flood":
                classes[box][inside] = WATER
        return dataclasses.replace(face, **arrays), dataclasses.replace(ground, classes=classes)

    def cloud(self, grid: Grid, acquisition: Acquisition) -> F32 | None:
        """Return the opacity of the clouds that no mask shows; None where there are none."""
        opacity = None
        for one in self.planted:
            found = one.covers(grid) if one.kind == "cloud" and one.is_there(acquisition.time.date()) else None
            if found is not None:
                opacity = np.zeros(grid.shape, np.float32) if opacity is None else opacity
                opacity[found[0]][found[1]] = _CLOUD_OPACITY
        return opacity

    def change_backscatter(self, power: F32, ground: Ground, day: dt.date, polarisation: str) -> None:
        """Put the mean backscatter of what is there on a day into linear power, in place."""
        for one in self.planted:
            look, found = KINDS[one.kind], one.covers(ground.grid) if one.is_there(day) else None
            if found is not None and look.decibels is not None:
                level = look.decibels[("vv", "vh").index(polarisation)]
                power[found[0]][self._land(one, ground.classes, found)] = 10.0 ** (level / 10.0)

    def numbers(self, ground: Ground) -> npt.NDArray[np.uint16]:
        """Return the truth of a window: the number of the anomaly that covers each pixel on any date, 0 for none."""
        out = np.zeros(ground.grid.shape, np.uint16)
        for one in self.planted:
            found = one.covers(ground.grid)
            if found is not None:
                out[found[0]][self._land(one, ground.classes, found)] = one.number
        return out

    def outline(self, one: Planted) -> BaseGeometry:
        """Return the outline of an anomaly in the CRS of the world, along its pixels."""
        import shapely

        found = one.covers(self.landscape.world)
        if found is None:
            return Polygon()
        world, (rows, columns) = self.landscape.world, found[0]
        window = world.window(rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start)
        inside = self._land(one, self.landscape.ground(window).classes, ((slice(None), slice(None)), found[1]))
        y, x = np.nonzero(inside)
        half_x, half_y = world.resolution[0] / 2, world.resolution[1] / 2
        xs, ys = window.x()[x], window.y()[y]
        joined: BaseGeometry = shapely.union_all(shapely.box(xs - half_x, ys - half_y, xs + half_x, ys + half_y))
        return joined

    def _land(self, one: Planted, classes: npt.NDArray[np.uint8], found: tuple[tuple[slice, slice], Bools]) -> Bools:
        """Return the covered pixels; for a flood, without those that were water before."""
        return found[1] & (classes[found[0]] != WATER) if one.kind == "flood" else found[1]

    def table(self) -> dict[str, list[Any]]:
        """Return the columns of the table of truth."""
        pixel = self.landscape.world.resolution[0] * self.landscape.world.resolution[1]
        areas = [float(self.outline(one).area) for one in self.planted]
        return {
            "number": [one.number for one in self.planted],
            "kind": [one.kind for one in self.planted],
            "x": [one.x for one in self.planted],
            "y": [one.y for one in self.planted],
            "first_date": [one.first.isoformat() for one in self.planted],
            "last_date": [None if one.last is None else one.last.isoformat() for one in self.planted],
            "area_m2": areas,
            "pixels": [round(area / pixel) for area in areas],
        }


def plant(landscape: Landscape) -> Planting:
    """Place the anomalies of a world's configuration.

    Raises:
        InvalidInput: There is no ground of the right kind, or a stated place is outside the world.
    """
    planted: list[Planted] = []
    for entry, anomaly in enumerate(landscape.config.anomalies):
        look = KINDS[anomaly.kind]
        for copy in range(anomaly.count):
            key = key_of(landscape.config.seed, "anomaly", anomaly.seed, entry, copy)
            planted.append(_place(landscape, anomaly, look, key, planted))
    return Planting(landscape, planted)


def _place(landscape: Landscape, anomaly: Anomaly, look: _Look, key: int, taken: Sequence[Planted]) -> Planted:
    rng = np.random.Generator(np.random.PCG64(key))
    length = anomaly.size_m or look.size_m
    last = anomaly.date if anomaly.kind == "cloud" else anomaly.until
    first = Planted(
        len(taken) + 1, anomaly.kind, 0.0, 0.0, length, length * (look.ratio or 1.0),
        float(rng.uniform(0, math.pi)), anomaly.date, last, key,
    )  # fmt: skip
    left, bottom, right, top = landscape.world.bounds
    if anomaly.x is not None and anomaly.y is not None:
        if not (left <= anomaly.x <= right and bottom <= anomaly.y <= top):
            raise InvalidInput(
                f"anomaly {anomaly.kind} at ({anomaly.x:g}, {anomaly.y:g}) lies outside the world, which is "
                f"{left:g} to {right:g} east and {bottom:g} to {top:g} north in {landscape.world.crs}"
            )
        return dataclasses.replace(first, x=anomaly.x, y=anomaly.y)
    # the first scene after it must see it; a world of radar alone has none
    after = [scene for scene in landscape.config.acquisitions() if scene.time.date() >= anomaly.date]
    seen = (
        scene_swath(after[0], landscape.world).polygon(landscape.world)
        if after
        else rectangle(left, bottom, right, top)
    )
    for x, y in _candidates(landscape, look, rng):
        here = dataclasses.replace(first, x=x, y=y)
        reach = here.reach_m
        if not seen.contains(rectangle(x - reach, y - reach, x + reach, y + reach)):
            continue
        if any(math.hypot(x - o.x, y - o.y) < reach + o.reach_m + 30.0 for o in taken):
            continue
        if _fits(landscape, here, look):
            return here
    raise InvalidInput(
        f"the world has no place left for a {anomaly.kind} of {length:g} m: give a smaller size_m or count, another "
        "seed, or a larger tile_px"
    )


def _candidates(landscape: Landscape, look: _Look, rng: np.random.Generator) -> list[tuple[float, float]]:
    """Draw points on ground of the right kind, from a coarse look at the whole world."""
    world = landscape.world
    step = max(1, max(world.shape) // 192)
    wide, high = (side * step for side in world.resolution)
    transform = (wide, 0.0, world.transform[2], 0.0, -high, world.transform[5])
    coarse = Grid(world.crs, transform, (world.height // step, world.width // step))
    classes = landscape.ground(coarse).classes
    right = np.isin(classes, look.on) if look.on else np.ones(classes.shape, bool)
    places = rng.permutation(np.flatnonzero(right))[:_TRIES]
    rows, columns = np.divmod(places, classes.shape[1])
    return list(zip(coarse.x()[columns].tolist(), coarse.y()[rows].tolist(), strict=True))


def _fits(landscape: Landscape, here: Planted, look: _Look) -> bool:
    if not look.on:
        return True
    found = here.covers(landscape.world)
    if found is None:
        return False
    (rows, columns), inside = found
    window = landscape.world.window(rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start)
    classes = landscape.ground(window).classes
    if not inside.any() or np.isin(classes[inside], look.on).mean() < look.share:
        return False
    # a flood touches the water that it comes from
    return here.kind != "flood" or bool((classes == WATER).any())
