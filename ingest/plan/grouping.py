"""`Step`: the scenes of one time step, in the order in which they win where they overlap.

The solar day is that of one longitude for the whole region, so an orbit that passes near midnight UTC stays one step.
Within a step, scenes that need no resampling come first, then those with the least cloud over the region, then the
newest processing.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

from ingest.raster.resample import nesting_factor
from ingest.scenes.scene import Scene
from zarr_store.grid import Grid

__all__ = [
    "Acquisition",
    "Step",
    "group_scenes",
    "lattice_rank",
    "overlap_order",
    "parse_time",
    "solar_day",
    "step_label",
]

Grouping = Literal["solar-day", "item", "month"]


class Acquisition(Protocol):
    """The properties that decide dates and overlaps; a `Scene` has them, and so has a row of a cube's item table."""

    @property
    def id(self) -> str: ...
    @property
    def datetime(self) -> str: ...
    @property
    def platform(self) -> str | None: ...
    @property
    def relative_orbit(self) -> int | None: ...
    @property
    def orbit_direction(self) -> str | None: ...
    @property
    def baseline(self) -> str | None: ...
    @property
    def created(self) -> str | None: ...
    @property
    def cloud_cover(self) -> float | None: ...


A = TypeVar("A", bound=Acquisition)


@dataclass(frozen=True)
class Step:
    """One time step of a cube.

    Attributes:
        time: Time of the first acquisition of the step, "2023-08-10T10:06:49".
        label: The solar day, the month or the item id that its scenes share.
        scenes: Scenes in the order in which they win.
    """

    time: str
    label: str
    scenes: tuple[Scene, ...]


def parse_time(text: str) -> dt.datetime:
    """Parse an ISO 8601 time to UTC, in whole seconds."""
    moment = dt.datetime.fromisoformat(text)
    moment = moment.replace(tzinfo=dt.UTC) if moment.tzinfo is None else moment.astimezone(dt.UTC)
    return moment.replace(microsecond=0)


def solar_day(moment: dt.datetime, longitude: float) -> dt.date:
    """Return the solar day at `longitude`: UTC plus four minutes for each degree.

    >>> solar_day(parse_time("2023-08-10T23:30:00Z"), 175.0).isoformat()
    '2023-08-11'
    >>> {solar_day(parse_time("2023-08-10T10:00:00Z"), x).isoformat() for x in (180.0, 180 - 3e-14, -180.0)}
    {'2023-08-09'}
    """
    # rounded, so that the last bit of a sum does not decide on which side of the date line a region lies
    wrapped = (round(longitude, 9) + 180.0) % 360.0 - 180.0
    return (moment + dt.timedelta(minutes=4.0 * wrapped)).date()


def group_scenes(
    scenes: Sequence[Scene], *, group: Grouping, longitude: float, order: Callable[[Scene], tuple[object, ...]]
) -> tuple[list[Step], list[str]]:
    """Cut the scenes of one collection into time steps.

    Radar scenes of different orbits never share a step: they see the ground from different sides, so a mean over them
    would mix two different quantities. So each step has exactly one orbit.

    Args:
        scenes: Scenes of one collection.
        group: "solar-day", "month" (of solar days), or "item" for one step per scene.
        longitude: Longitude of the middle of the region, in degrees.
        order: Sort key of the scenes within a step; the first scene wins overlaps.

    Returns:
        Steps in order of time, and remarks for the person who reads the plan.
    """
    by_label: dict[tuple[str, ...], list[Scene]] = {}
    for scene in scenes:
        by_label.setdefault(step_label(scene, group, longitude), []).append(scene)
    steps, remarks = [], []
    taken: set[dt.datetime] = set()
    by_start = sorted(by_label.items(), key=lambda entry: (min(parse_time(s.datetime) for s in entry[1]), entry[0]))
    for label, members in by_start:
        first = moment = min(parse_time(scene.datetime) for scene in members)
        while moment in taken:  # a time axis has no equal values; tiles of one pass share their second
            moment += dt.timedelta(seconds=1)
        taken.add(moment)
        if moment != first:
            remarks.append(
                f"step {'/'.join(label)} is labelled {moment:%H:%M:%S} instead of {first:%H:%M:%S}, "
                "as another step has that second; the item table keeps the true time"
            )
        ordered = tuple(sorted(members, key=order))
        steps.append(Step(moment.strftime("%Y-%m-%dT%H:%M:%S"), "/".join(label), ordered))
    steps.sort(key=lambda step: step.time)
    return steps, remarks


def overlap_order(
    rank: Callable[[A], int], cloud_share: Callable[[A], float | None] = lambda scene: None
) -> Callable[[A], tuple[object, ...]]:
    """Make the sort key of scenes within a step.

    Args:
        rank: Gives the `lattice_rank` of a scene.
        cloud_share: Gives the share of a scene's valid pixels in the region that is masked. Where it gives None, the
            catalogue's cloud cover of the whole tile counts.
    """

    def order(scene: A) -> tuple[object, ...]:
        share = cloud_share(scene)
        cloud = 100.0 * share if share is not None else 101.0 if scene.cloud_cover is None else scene.cloud_cover
        return (rank(scene), cloud, _descending(scene.baseline), _descending(scene.created), scene.id)

    return order


def lattice_rank(grids: Sequence[Grid], target: Grid) -> int:
    """Return a scene's rank in overlaps: 0 if its files share the target's lattice, 1 if its CRS, else 2."""
    if all(nesting_factor(grid, target) for grid in grids):
        return 0
    return 1 if all(grid.crs == target.crs for grid in grids) else 2


def step_label(scene: Acquisition, group: Grouping, longitude: float) -> tuple[str, ...]:
    """Return the label of the time step of a scene; scenes with equal labels make one step."""
    if group == "item":
        return (scene.id,)
    day = solar_day(parse_time(scene.datetime), longitude)
    label = day.strftime("%Y-%m") if group == "month" else day.isoformat()
    if (scene.platform or "").startswith("sentinel-1"):
        return (label, f"orbit {scene.relative_orbit}", scene.orbit_direction or "?")
    return (label,)


def _descending(text: str | None) -> tuple[int, ...]:
    """Return a sort key that puts the greater text first and None last."""
    return (1,) if text is None else (0, *(-ord(char) for char in text), 1)
