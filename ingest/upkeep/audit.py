"""`audit` compares a cube with the current catalogue: which scenes are missing, superseded, replaced or removed."""

from __future__ import annotations

import datetime as dt
import os
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl

from shapely.geometry import box

from ingest.plan.plan import Plan
from ingest.plan.stored import check_kept_source, kept_plan, require_providers
from ingest.raster.asset_file import file_versions
from ingest.raster.limits import Access
from ingest.request.config import IngestConfig
from ingest.scenes.dedupe import are_other_strips
from ingest.scenes.footprint import overlap_share
from ingest.scenes.scene import Scene
from ingest.scenes.search import SearchResult, find_scenes
from ingest.trust.waits import crew
from zarr_store.read import open_cube

__all__ = ["AuditReport", "News", "audit", "compare", "replaced_files"]

_AT_ONCE = 8
"""Number of files that are asked for at once."""

_SAME_MOMENT_S = 90
"""Largest difference in seconds between copies of a granule, as in `ingest.scenes.dedupe`."""
_OTHER_DATE_S = 12 * 3600
"""Smallest difference in seconds that makes a scene of the same id another one, and not one with a corrected time."""
_SAME_GROUND = 0.6
"""Smallest overlap of the footprints of copies, as in `ingest.scenes.dedupe`; halves of a datatake share less."""


@dataclass(frozen=True)
class News:
    """The differences between a catalogue and a cube.

    Attributes:
        missing: Scenes of the catalogue of which the cube has no version.
        superseded: Newer copies by (collection, id): the scene, and the row of the item table that it supersedes. A
            scene whose files were replaced under their old names supersedes itself.
        replaced: Assets of a scene, by (collection, id), whose file is no longer the one that was read.
        removed: (collection, id) of scenes of the cube that the catalogue no longer lists.
    """

    missing: tuple[Scene, ...]
    superseded: Mapping[tuple[str, str], tuple[Scene, int]]
    removed: tuple[tuple[str, str], ...]
    replaced: Mapping[tuple[str, str], tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class AuditReport:
    """The result of an audit, as rows that can be written as JSON.

    Example:
        >>> import ingest
        >>> report = ingest.audit_cube("cube.zarr", "world/catalog.json")
        >>> report.scenes, report.missing
        (2, ())
    """

    cube: str
    source: str
    scenes: int
    missing: tuple[Mapping[str, Any], ...]
    superseded: tuple[Mapping[str, Any], ...]
    removed: tuple[Mapping[str, Any], ...]
    replaced: tuple[Mapping[str, Any], ...] = ()

    @property
    def exit_code(self) -> int:
        """0 if an ingest now would make the same cube, else 3."""
        return 3 if self.missing or self.superseded or self.removed or self.replaced else 0

    def to_dict(self) -> dict[str, Any]:
        """Convert to values that can be written as JSON."""
        return {**vars(self), "exit_code": self.exit_code}


def audit(
    url: str | os.PathLike[str], config: IngestConfig, *, source: str | None = None, files: bool = True
) -> AuditReport:
    """Search the catalogue again and compare it with the cube; no pixel is read and nothing is written.

    Args:
        url: The cube.
        config: The selection; `ingest.upkeep.extend.selection_of` gives that of the cube.
        source: The catalogue; None for the one that the cube names, if `config` or the list of providers trusts it.
        files: Also check whether each file that was read is still the same, with one small request each.

    Raises:
        NothingFound: The catalogue has no scene left for this selection.
        AccessError: The catalogue cannot be reached.
        InvalidInput: The cube names a source that today's options do not trust.
    """
    plan = kept_plan(url)
    require_providers(plan, config)
    asked = source or check_kept_source(plan, config, str(url))
    found = find_scenes(asked, config)
    news = compare(plan, found, replaced_files(url, plan, found, config, source=asked) if files else None)
    return AuditReport(
        cube=str(url),
        source=plan.source if source is None else source,
        scenes=sum(len(rows) for rows in plan.catalogue_items.values()),
        missing=tuple({"collection": s.collection, "id": s.id, "datetime": s.datetime} for s in news.missing),
        superseded=tuple(
            {"collection": s.collection, "id": str(plan.catalogue_items[s.collection][row]["id"]), "by": s.id,
             "baseline": s.baseline, "created": s.created}
            for s, row in news.superseded.values() if s.key not in news.replaced
        ),
        replaced=tuple({"collection": c, "id": i, "assets": list(keys)} for (c, i), keys in news.replaced.items()),
        removed=tuple({"collection": name, "id": item} for name, item in news.removed),
    )  # fmt: skip


def replaced_files(
    url: str | os.PathLike[str], plan: Plan, found: SearchResult, config: IngestConfig, *, source: str
) -> dict[tuple[str, str], tuple[str, ...]]:
    """Find files that were replaced under their old names since shards were made from them.

    The ledger has the size and the ETag or date of each file; the server or the file system is asked for them again.

    Args:
        url: The cube.
        plan: Plan of the cube.
        found: Scenes that the catalogue lists now; only their hrefs are requested, which the search has checked.
        config: Trust, timeouts and retries.
        source: Where the scenes were found.

    Returns:
        Keys of the replaced assets by (collection, id). A file that cannot be requested is not listed.
    """
    access = Access.of(config, source)
    cube = open_cube(url)
    read: dict[tuple[str, int, str], set[str]] = defaultdict(set)
    for name in cube.collections:
        for row in cube.ledger(name).rows().values():
            for outcome in row.sources:
                for key, version in outcome.versions:
                    read[name, outcome.item, key].add(version)
    hrefs = {(scene.key, ref.key): ref.href for scene in found.scenes for ref in scene.assets.values()}
    asked = {
        (task.collection, scene.item, asset.key): ((plan.catalogue(task.collection), scene.item_id), asset.href)
        for task in plan.tasks
        for scene in task.sources
        for asset in scene.assets
        if (task.collection, scene.item, asset.key) in read
        and hrefs.get(((plan.catalogue(task.collection), scene.item_id), asset.key)) == asset.href
    }
    changed: dict[tuple[str, str], set[str]] = defaultdict(set)
    for task in plan.tasks:
        for scene in task.sources:
            for asset in scene.assets:
                scene_key = (plan.catalogue(task.collection), scene.item_id)
                if _asks_for_another(asset.href, hrefs.get((scene_key, asset.key))):
                    changed[scene_key].add(asset.key)
    with crew(_AT_ONCE) as pool:
        present = pool.map(lambda one: file_versions(one[1][1], access, read[one[0]]), asked.items())
        for (place, (scene_key, _)), now in zip(asked.items(), present, strict=True):
            if now is not None and not now.issuperset(read[place]):
                changed[scene_key].add(place[2])
    return {key: tuple(sorted(assets)) for key, assets in sorted(changed.items())}


def _asks_for_another(kept: str, now: str | None) -> bool:
    """Return whether the address in the catalogue has more query than the kept one: older cubes left parts out."""
    if now is None or kept == now or kept.partition("?")[0] != now.partition("?")[0]:
        return False
    before, after = (Counter(parse_qsl(href.partition("?")[2], keep_blank_values=True)) for href in (kept, now))
    return before < after


def compare(plan: Plan, found: SearchResult, replaced: Mapping[tuple[str, str], tuple[str, ...]] | None = None) -> News:
    """Compare a search with the plan of a cube, reading nothing; collections that the cube does not have are ignored.

    Args:
        plan: Plan of the cube.
        found: Scenes that the catalogue lists now.
        replaced: Result of `replaced_files`. An asset also counts as replaced where its item states another checksum
            or size than before.
    """
    changed = {**_restated(plan, found), **(replaced or {})}
    current = {
        name: {row: dict(item) for row, item in enumerate(rows) if "superseded_by" not in item}
        for name, rows in plan.catalogue_items.items()
    }
    known = {(name, str(item["id"])): row for name, rows in current.items() for row, item in rows.items()}
    # all groups of a collection have the same facts of its scenes
    facts_of = {recipe.catalogue: plan.statistics.get(recipe.spec.collection, {}) for recipe in plan.recipes}
    left_out = {(drop.collection, drop.item_id) for drop in plan.drops if drop.copy_of is None}
    missing = []
    seen: set[tuple[str, str]] = set()
    stale: dict[tuple[str, str], tuple[str, ...]] = {}
    superseded: dict[tuple[str, str], tuple[Scene, int]] = {}
    for scene in found.scenes:
        rows = current.get(scene.collection)
        if rows is None or scene.key in left_out:
            continue
        facts = facts_of.get(scene.collection, {})
        row = known.get(scene.key)
        if row is not None and _is_namesake(scene, rows[row]):
            row = None
        if row is None:
            row = next((n for n, item in rows.items() if _has_new_name(scene, item, facts)), None)
        if row is not None:
            seen.add((scene.collection, str(rows[row]["id"])))
        else:
            row = next((n for n, item in rows.items() if _same_acquisition(scene, item, facts)), None)
            if row is None:
                missing.append(scene)
                continue
        if _age(vars(scene)) > _age(rows[row]):
            superseded[scene.key] = (scene, row)
        elif scene.key in changed:
            superseded[scene.key] = (scene, row)
            stale[scene.key] = changed[scene.key]
    listed = seen | {scene.key for scene in found.scenes} | {drop.dropped.key for drop in found.duplicates}
    listed |= {(one.collection, one.item_id) for one in found.unusable}  # still listed, although not usable
    removed = tuple(sorted(key for key in known if key not in listed))
    return News(tuple(missing), superseded, removed, stale)


def _restated(plan: Plan, found: SearchResult) -> dict[tuple[str, str], tuple[str, ...]]:
    """Find assets for which the catalogue states another checksum or size than when the cube was made."""
    stated: dict[tuple[str, str], dict[str, tuple[int | None, str | None]]] = defaultdict(dict)
    for task in plan.tasks:
        for scene in task.sources:
            for asset in scene.assets:
                stated[plan.catalogue(task.collection), scene.item_id][asset.key] = (asset.size_bytes, asset.checksum)
    changed = {}
    for fresh in found.scenes:
        before = stated.get(fresh.key, {})
        keys = sorted(
            ref.key
            for ref in fresh.assets.values()
            if ref.key in before
            and any(
                None not in pair and pair[0] != pair[1]
                for pair in zip(before[ref.key], (ref.size_bytes, ref.checksum), strict=True)
            )
        )
        if keys:
            changed[fresh.key] = tuple(keys)
    return changed


def _is_namesake(scene: Scene, row: Mapping[str, Any]) -> bool:
    """Return whether a scene shares only its id with a row: some catalogues repeat ids over tiles or dates."""
    if scene.tile and row.get("tile") and scene.tile != row["tile"]:
        return True
    return _seconds_apart(scene, row) > _OTHER_DATE_S or not _box(scene.bbox).intersects(_box(row["bbox"]))


def _has_new_name(scene: Scene, row: Mapping[str, Any], facts: Mapping[str, Any]) -> bool:
    """Return whether a scene is that of a row under another name, given because its id is not unique."""
    named = facts.get("catalogue_ids", {}).get(str(row["id"]), str(row["id"]))
    if (scene.catalogue_id or scene.id) != named or (scene.id == named and str(row["id"]) == named):
        return False
    return not _is_namesake(scene, row) and _seconds_apart(scene, row) <= _SAME_MOMENT_S


def _seconds_apart(scene: Scene, row: Mapping[str, Any]) -> float:
    apart = dt.datetime.fromisoformat(scene.datetime) - dt.datetime.fromisoformat(str(row["datetime"]))
    return abs(apart.total_seconds())


def _same_acquisition(scene: Scene, row: Mapping[str, Any], facts: Mapping[str, Any]) -> bool:
    """Return whether a scene and a row of the item table are copies of one granule, as in `ingest.scenes.dedupe`."""
    strip = facts.get("datastrips", {}).get(str(row["id"]))
    if are_other_strips(scene.datastrip, strip, same_baseline=scene.baseline == row.get("baseline")):
        return False
    for name in ("platform", "tile", "relative_orbit"):
        if getattr(scene, name) != row.get(name):
            return False
    if _datatake(scene.datatake) != _datatake(row.get("datatake")):
        return False
    if _seconds_apart(scene, row) > _SAME_MOMENT_S:
        return False
    return overlap_share(_box(scene.bbox), _box(row["bbox"])) >= _SAME_GROUND


def _datatake(text: Any) -> str:
    """Cut the baseline off the end of a datatake id, as it differs between copies."""
    return "_".join(str(text or "").split("_")[:2])


def _box(bbox: Any) -> Any:
    west, south, east, north = bbox
    return box(west, south, east + 360.0 if east < west else east, north)


def _age(scene: Mapping[str, Any]) -> tuple[str, str]:
    """Make a key that orders copies by processing baseline, then by time of creation; the newest is the greatest."""
    baseline = str(scene.get("baseline") or "")
    return ("" if baseline.startswith("99") else baseline, str(scene.get("created") or ""))
