"""Keep one scene per acquisition: a reprocessed copy replaces the older one; both parts of a split datatake stay."""

from __future__ import annotations

import datetime as dt
import hashlib
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from shapely.geometry import shape

from ingest.scenes.footprint import overlap_share
from ingest.scenes.scene import Scene

__all__ = ["Duplicate", "are_other_strips", "dedupe", "name_apart", "scene_order"]

_SAME_GROUND = 0.6
"""Smallest share of joint area of two footprints of the same ground; parts of a datatake share a narrow strip."""

_SAME_MOMENT_S = 90
"""Largest time between copies of one granule, in seconds; the satellite crosses a tile in 16 seconds."""

_SAME_STRIP_S = 5
"""Largest difference in seconds of the start of one datastrip in two baselines."""

_SAME_NODATA = 2.0
"""Largest difference of the share without data between copies of one granule, in percent."""


class Duplicate(NamedTuple):
    """A scene that was left out, the scene that replaces it, and the reason."""

    dropped: Scene
    kept: Scene
    reason: str


def scene_order(scene: Scene) -> tuple[str, str, str, str]:
    """Return the sort key of a scene: collection, time, tile, id."""
    return (scene.collection, scene.datetime, scene.tile or "", scene.id)


def dedupe(scenes: Iterable[Scene]) -> tuple[list[Scene], list[Duplicate]]:
    """Keep one scene of each acquisition, in `scene_order`.

    Scenes of one acquisition share collection, platform, datatake, MGRS tile, relative orbit, datastrip and ground. The
    newest baseline wins, then the newest creation time, then the greatest id, so that the choice never depends on the
    order in which a catalogue lists its items. Scenes that share an id are not copies for that reason alone.
    """
    groups: dict[tuple[object, ...], list[Scene]] = defaultdict(list)
    by_key: dict[tuple[str, str], list[Scene]] = defaultdict(list)
    drops: list[Duplicate] = []
    for scene in sorted(scenes, key=_age, reverse=True):
        same = by_key[scene.key]
        twice = next((other for other in same if _same_tile(scene, other) and _same_granule(scene, other)), None)
        if twice is not None:
            drops.append(Duplicate(scene, twice, "listed twice"))
            continue
        same.append(scene)
        group = groups[_acquisition(scene)]
        kept = next((other for other in group if _same_granule(scene, other)), None)
        if kept is None:
            group.append(scene)
        else:
            drops.append(Duplicate(scene, kept, _why(scene, kept)))
    return sorted((s for group in groups.values() for s in group), key=scene_order), drops


def name_apart(scenes: Sequence[Scene], taken: Collection[tuple[str, str]] = ()) -> list[Scene]:
    """Rename scenes that share an id: append the tile, else the time, else a digest of their addresses.

    Args:
        scenes: Different scenes, in any order.
        taken: (collection, id) of other scenes, which keep theirs.
    """
    shared = Counter(scene.key for scene in scenes) + Counter(taken)
    groups: dict[tuple[str, str], list[Scene]] = defaultdict(list)
    for scene in scenes:
        groups[scene.key].append(scene)
    new_ids: dict[int, str] = {}
    for key, group in groups.items():
        if shared[key] == 1:
            continue
        tiles, times = [scene.tile for scene in group], [scene.datetime for scene in group]
        for scene in group:
            mark = _addresses(scene)
            if tiles.count(scene.tile) == 1 and scene.tile:
                mark = scene.tile
            elif times.count(scene.datetime) == 1:
                mark = scene.datetime
            new = f"{scene.id}~{mark}"
            new_ids[id(scene)] = f"{new}~{_addresses(scene)}" if (scene.collection, new) in shared else new
    return [
        replace(scene, id=new_ids[id(scene)], catalogue_id=scene.catalogue_id or scene.id)
        if id(scene) in new_ids
        else scene
        for scene in scenes
    ]


def are_other_strips(
    left: str | None,
    right: str | None,
    *,
    same_baseline: bool,
    nodata: tuple[float | None, float | None] = (None, None),
) -> bool:
    """Return whether two scenes of one tile are parts that two stations received of a datatake.

    Both parts may state the whole square of the tile as footprint, so the ground alone does not tell.

    Args:
        left: Start of the datastrip of a scene, as `Scene.datastrip`.
        right: Start of the datastrip of the other scene.
        same_baseline: Whether both have the same baseline; another baseline may round the start to another second.
        nodata: Share without data that each scene states, in percent; it counts where a datastrip is unknown.
    """
    if left and right:
        apart = abs((dt.datetime.fromisoformat(left) - dt.datetime.fromisoformat(right)).total_seconds())
        return apart > (0 if same_baseline else _SAME_STRIP_S)
    return None not in nodata and abs((nodata[0] or 0.0) - (nodata[1] or 0.0)) > _SAME_NODATA


def _addresses(scene: Scene) -> str:
    hrefs = "\n".join(sorted(asset.href for asset in scene.assets.values()))
    return hashlib.sha256(hrefs.encode()).hexdigest()[:8]


def _same_tile(left: Scene, right: Scene) -> bool:
    return left.tile is None or right.tile is None or left.tile == right.tile


def _acquisition(scene: Scene) -> tuple[object, ...]:
    # "GS2A_20230815T095031_042547_N05.09" ends in the baseline, which is what differs between copies
    datatake = "_".join((scene.datatake or scene.datetime[:10]).split("_")[:2])
    return (scene.collection, scene.platform, datatake, scene.tile, scene.relative_orbit)


def _same_granule(left: Scene, right: Scene) -> bool:
    if abs((_moment(left) - _moment(right)).total_seconds()) > _SAME_MOMENT_S:
        return False
    same = _baseline(left) == _baseline(right)
    nodata = (left.nodata_percent, right.nodata_percent)
    if are_other_strips(left.datastrip, right.datastrip, same_baseline=same, nodata=nodata):
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
