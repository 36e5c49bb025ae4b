"""`find_lost_parts` lists scenes of a catalogue that are parts of a datatake of which a cube has only another part.

Earlier releases took two parts of a split datatake for copies of one scene where both state the whole square of the
tile, and dropped one without a message. The plan of such a cube does not name it, so the catalogue is searched again.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from ingest.plan.plan import Plan
from ingest.plan.stored import check_kept_source
from ingest.request.config import IngestConfig
from ingest.request.settings import make_config
from ingest.scenes.scene import Scene
from ingest.scenes.search import find_scenes
from ingest.upkeep.audit import compare
from zarr_store.errors import TerrashardError

__all__ = ["find_lost_parts"]

log = logging.getLogger(__name__)


def find_lost_parts(url: str, plan: Plan, config: IngestConfig) -> list[tuple[Scene, int]]:
    """Search the catalogue of a cube again for the other parts of its datatakes.

    Returns:
        Each scene with the time step that it belongs to. None where the catalogue is not trusted or cannot be reached;
        `audit` reports the reason.
    """
    try:
        trust = {name: getattr(config.trust, name) for name in type(config.trust).model_fields}
        selection = make_config(make_config(None, dict(plan.config)), trust)
        found = find_scenes(check_kept_source(plan, config, url), selection)
    except TerrashardError as error:
        log.info("%s: the catalogue was not searched for parts of datatakes: %s", url, error)
        return []
    lost = []
    for scene in compare(plan, found).missing:
        row = next((row for row in plan.catalogue_items[scene.collection] if _is_part(scene, row)), None)
        if row is not None:
            lost.append((scene, int(row["step"])))
    return lost


def _is_part(scene: Scene, row: Mapping[str, Any]) -> bool:
    """Return whether a scene is of the datatake and tile of a row of the item table."""
    if not scene.datatake or not scene.tile:
        return False
    return (scene.datatake, scene.tile, scene.platform) == (row.get("datatake"), row.get("tile"), row.get("platform"))
