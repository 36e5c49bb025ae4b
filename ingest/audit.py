"""A cube beside the catalogue of today: which scenes are missing, superseded or gone."""

from __future__ import annotations

import datetime as dt
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shapely.geometry import box

from ingest.config import IngestConfig
from ingest.footprint import overlap_share
from ingest.plan import Plan
from ingest.scene import Scene
from ingest.search import Found, find_scenes
from ingest.stored import kept_plan

__all__ = ["AuditReport", "News", "audit", "compare"]

_SAME_MOMENT_S = 90
_SAME_GROUND = 0.6
"""As in `ingest.dedupe`: copies of a granule differ by less, halves of a datatake share less."""


@dataclass(frozen=True)
class News:
    """What a catalogue has that a cube has not, and the other way round.

    Attributes:
        missing: Scenes that the cube does not have in any version.
        superseded: (collection, id) of a newer copy → the scene, and the row of the item table that it supersedes.
        removed: (collection, id) of scenes of the cube that the catalogue no longer lists.
    """

    missing: tuple[Scene, ...]
    superseded: Mapping[tuple[str, str], tuple[Scene, int]]
    removed: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class AuditReport:
    """What an audit found, as JSON-able rows."""

    cube: str
    source: str
    scenes: int
    missing: tuple[Mapping[str, Any], ...]
    superseded: tuple[Mapping[str, Any], ...]
    removed: tuple[Mapping[str, Any], ...]

    @property
    def exit_code(self) -> int:
        """0 when the cube is what an ingest of today would make, else 3."""
        return 3 if self.missing or self.superseded or self.removed else 0

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {**vars(self), "exit_code": self.exit_code}


def audit(url: str | os.PathLike[str], config: IngestConfig, *, source: str | None = None) -> AuditReport:
    """Ask the catalogue again and compare; nothing is read or written.

    Args:
        url: The cube.
        config: What to select; `ingest.extend.selection_of` gives what the cube was made with.
        source: Where to ask; None for where the cube's scenes came from.

    Raises:
        NothingFound: The catalogue has no scene left for this selection.
        AccessError: It cannot be reached.
    """
    plan = kept_plan(url)
    asked = source or plan.source
    news = compare(plan, find_scenes(asked, config))
    return AuditReport(
        cube=str(url),
        source=plan.source if source is None else source,
        scenes=sum(len(rows) for rows in plan.items.values()),
        missing=tuple({"collection": s.collection, "id": s.id, "datetime": s.datetime} for s in news.missing),
        superseded=tuple(
            {"collection": s.collection, "id": str(plan.items[s.collection][row]["id"]), "by": s.id,
             "baseline": s.baseline, "created": s.created}
            for s, row in news.superseded.values()
        ),
        removed=tuple({"collection": name, "id": item} for name, item in news.removed),
    )  # fmt: skip


def compare(plan: Plan, found: Found) -> News:
    """What is new in `found` for the cube of `plan`; collections that the cube does not have are passed over. Pure."""
    current = {
        name: {row: dict(item) for row, item in enumerate(rows) if "superseded_by" not in item}
        for name, rows in plan.items.items()
    }
    known = {(name, str(item["id"])): row for name, rows in current.items() for row, item in rows.items()}
    left_out = {(drop.collection, drop.item_id) for drop in plan.drops}
    missing = []
    superseded: dict[tuple[str, str], tuple[Scene, int]] = {}
    for scene in found.scenes:
        rows = current.get(scene.collection)
        if rows is None or scene.key in left_out:
            continue
        row = known.get(scene.key)
        if row is None:
            row = next((number for number, item in rows.items() if _same_acquisition(scene, item)), None)
            if row is None:
                missing.append(scene)
                continue
        if _age(vars(scene)) > _age(rows[row]):
            superseded[scene.key] = (scene, row)
    listed = {scene.key for scene in found.scenes} | {drop.dropped.key for drop in found.duplicates}
    removed = tuple(sorted(key for key in known if key not in listed))
    return News(tuple(missing), superseded, removed)


def _same_acquisition(scene: Scene, row: Mapping[str, Any]) -> bool:
    """Whether a scene and a row of the item table are copies of one granule, by the rules of `ingest.dedupe`."""
    for name in ("platform", "tile", "relative_orbit"):
        if getattr(scene, name) != row.get(name):
            return False
    if _datatake(scene.datatake) != _datatake(row.get("datatake")):
        return False
    apart = dt.datetime.fromisoformat(scene.datetime) - dt.datetime.fromisoformat(str(row["datetime"]))
    if abs(apart.total_seconds()) > _SAME_MOMENT_S:
        return False
    return overlap_share(_box(scene.bbox), _box(row["bbox"])) >= _SAME_GROUND


def _datatake(text: Any) -> str:
    """Without the baseline at its end, which is what differs between copies."""
    return "_".join(str(text or "").split("_")[:2])


def _box(bbox: Any) -> Any:
    west, south, east, north = bbox
    return box(west, south, east + 360.0 if east < west else east, north)


def _age(scene: Mapping[str, Any]) -> tuple[str, str]:
    """Processing baseline, then time of creation: the greater is the newer copy."""
    baseline = str(scene.get("baseline") or "")
    return ("" if baseline.startswith("99") else baseline, str(scene.get("created") or ""))
