"""Keep one scene per acquisition: a reprocessed copy replaces the older one; both parts of a split datatake stay."""

from __future__ import annotations

import datetime as dt
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from shapely.geometry import shape

from ingest.scenes.footprint import overlap_share
from ingest.scenes.scene import Scene

__all__ = ["Duplicate", "dedupe", "scene_order"]

_SAME_GROUND = 0.6
"""Smallest share of joint area of two footprints of the same ground; parts of a datatake share a narrow strip."""

_SAME_MOMENT_S = 90
"""Largest time between copies of one granule, in seconds; the satellite crosses a tile in 16 seconds."""


class Duplicate(NamedTuple):
    """A scene that was left out, the scene that replaces it, and the reason."""

    dropped: Scene
    kept: Scene
    reason: str


def scene_order(scene: Scene) -> tuple[str, str, str, str]:
    """Sort key of scenes: collection, time, tile, id."""
    return (scene.collection, scene.datetime, scene.tile or "", scene.id)


def dedupe(scenes: Iterable[Scene]) -> tuple[list[Scene], list[Duplicate]]:
    """Keep one scene of each acquisition, in `scene_order`.

    Scenes of one acquisition share collection, platform, datatake, MGRS tile, relative orbit and ground. The newest
    baseline wins, then the newest creation time, then the greatest id, so that the choice never depends on the order in
    which a catalogue lists its items.
    """
    groups: dict[tuple[object, ...], list[Scene]] = defaultdict(list)
    seen: dict[tuple[str, str], Scene] = {}
    drops: list[Duplicate] = []
    for scene in sorted(scenes, key=_age, reverse=True):
        if scene.key in seen:
            drops.append(Duplicate(scene, seen[scene.key], "listed twice"))
            continue
        seen[scene.key] = scene
        group = groups[_acquisition(scene)]
        kept = next((other for other in group if _same_granule(scene, other)), None)
        if kept is None:
            group.append(scene)
        else:
            drops.append(Duplicate(scene, kept, _why(scene, kept)))
    return sorted((s for group in groups.values() for s in group), key=scene_order), drops


def _acquisition(scene: Scene) -> tuple[object, ...]:
    # "GS2A_20230815T095031_042547_N05.09" ends in the baseline, which is what differs between copies
    datatake = "_".join((scene.datatake or scene.datetime[:10]).split("_")[:2])
    return (scene.collection, scene.platform, datatake, scene.tile, scene.relative_orbit)


def _same_granule(left: Scene, right: Scene) -> bool:
    if abs((_moment(left) - _moment(right)).total_seconds()) > _SAME_MOMENT_S:
        return False
    return overlap_share(shape(dict(left.footprint)), shape(dict(right.footprint))) >= _SAME_GROUND


def _moment(scene: Scene) -> dt.datetime:
    return dt.datetime.fromisoformat(scene.datetime)


def _age(scene: Scene) -> tuple[str, str, str]:
    return (_baseline(scene), scene.created or scene.updated or "", scene.id)


def _baseline(scene: Scene) -> str:
    return "" if scene.baseline is None or scene.baseline.startswith("99") else scene.baseline


def _why(scene: Scene, kept: Scene) -> str:
    if _baseline(scene) != _baseline(kept):
        return f"baseline {scene.baseline or 'unknown'} is superseded by {kept.baseline} ({kept.id})"
    return f"an older copy of {kept.id}"
