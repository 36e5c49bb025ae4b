"""Which scenes make one time step, and which of them wins where they overlap. Pure.

A solar day is counted at one longitude for the whole region, so an orbit that passes near midnight UTC is not torn in
two. Within a step, scenes that need no resampling come first, then those with least cloud over the region, then the
newest processing.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from ingest.scenes.scene import Scene

__all__ = ["Step", "group_scenes", "overlap_order", "parse_time", "solar_day", "step_label"]

Grouping = Literal["solar-day", "item", "month"]


@dataclass(frozen=True)
class Step:
    """One time step of a cube.

    Attributes:
        time: First acquisition of the step, "2023-08-10T10:06:49".
        label: What makes it one step: the solar day, the month or the item id.
        scenes: In the order in which they win.
    """

    time: str
    label: str
    scenes: tuple[Scene, ...]


def parse_time(text: str) -> dt.datetime:
    """An ISO 8601 instant in UTC, whole seconds."""
    moment = dt.datetime.fromisoformat(text)
    moment = moment.replace(tzinfo=dt.UTC) if moment.tzinfo is None else moment.astimezone(dt.UTC)
    return moment.replace(microsecond=0)


def solar_day(moment: dt.datetime, longitude: float) -> dt.date:
    """The day by the sun at `longitude`: UTC plus four minutes a degree.

    >>> solar_day(parse_time("2023-08-10T23:30:00Z"), 175.0).isoformat()
    '2023-08-11'
    """
    wrapped = (longitude + 180.0) % 360.0 - 180.0
    return (moment + dt.timedelta(minutes=4.0 * wrapped)).date()


def group_scenes(
    scenes: Sequence[Scene], *, group: Grouping, longitude: float, order: Callable[[Scene], tuple[object, ...]]
) -> tuple[list[Step], list[str]]:
    """Cut scenes of one collection into time steps.

    Scenes of different orbits of radar stay apart within a day or month: they look at the ground from other sides, so
    a mean over them would be of two different things, and each step has one orbit to name.

    Args:
        scenes: Of one collection.
        group: "solar-day", "month" (by the sun, too), or "item" for one step per scene.
        longitude: Of the middle of the region, degrees.
        order: Sort key; the first scene wins overlaps.

    Returns:
        Steps in order of time, and remarks for the person who reads the plan.
    """
    found: dict[tuple[str, ...], list[Scene]] = {}
    for scene in scenes:
        found.setdefault(step_label(scene, group, longitude), []).append(scene)
    steps, remarks = [], []
    taken: set[dt.datetime] = set()
    by_start = sorted(found.items(), key=lambda entry: (min(parse_time(s.datetime) for s in entry[1]), entry[0]))
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
    rank: Callable[[Scene], int], cloud_share: Callable[[Scene], float | None] = lambda scene: None
) -> Callable[[Scene], tuple[object, ...]]:
    """The sort key of scenes within a step.

    Args:
        rank: 0 for a scene on the target's lattice, 1 for one in its CRS, 2 for any other.
        cloud_share: Of what a scene sees of the region, the share that is masked; None where it was not measured: then
            the catalogue's cloud cover of the whole tile counts.
    """

    def order(scene: Scene) -> tuple[object, ...]:
        share = cloud_share(scene)
        cloud = 100.0 * share if share is not None else 101.0 if scene.cloud_cover is None else scene.cloud_cover
        return (rank(scene), cloud, _descending(scene.baseline), _descending(scene.created), scene.id)

    return order


def step_label(scene: Scene, group: Grouping, longitude: float) -> tuple[str, ...]:
    """What makes scenes one time step: those with the same label."""
    if group == "item":
        return (scene.id,)
    day = solar_day(parse_time(scene.datetime), longitude)
    label = day.strftime("%Y-%m") if group == "month" else day.isoformat()
    if (scene.platform or "").startswith("sentinel-1"):
        return (label, f"orbit {scene.relative_orbit}", scene.orbit_direction or "?")
    return (label,)


def _descending(text: str | None) -> tuple[int, ...]:
    """A sort key that puts the greater text first and None last."""
    return (1,) if text is None else (0, *(-ord(char) for char in text), 1)
