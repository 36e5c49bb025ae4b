"""`recheck_offset` decides the offset of a scene of a cube again, from its files and from what the cube keeps of it.

A cube that was made with a wrong offset is consistent with its plan, so only this shows it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ingest.plan.plan import Plan
from ingest.plan.probe import measure_offset
from ingest.plan.task import PlannedScene
from ingest.raster.limits import Access
from ingest.request.products import find_product
from ingest.scenes.identity import baselines_of
from ingest.scenes.offsets import settle_offset
from ingest.scenes.scene import AssetRef, Scene
from ingest.scenes.witnesses import OFFSET_DN, Witness, baseline_has_offset

__all__ = ["recheck_offset"]

_KEPT = 2
"""Weight of the baseline in the item table of a cube that keeps no evidence: nothing states its source."""


def recheck_offset(plan: Plan, collection: str, planned: PlannedScene, access: Access) -> str | None:
    """Decide the offset of a scene again.

    Args:
        plan: The plan that the cube keeps.
        collection: Collection of the scene.
        planned: The scene as it was read.
        access: Limits and retries.

    Returns:
        Why another offset would be right; None if the cube's offset is right, or cannot be checked.
    """
    used = {asset.dn_offset for asset in planned.assets if asset.kind == "data" and asset.stored == "uint16"}
    scene = _scene_of(plan, collection, planned)
    if scene is None or len(used) != 1:
        return None
    (stored,) = used
    reading = measure_offset(scene, access)
    if reading is None:
        return None
    policy = str(plan.config.get("offset_policy", "repair"))
    offset, _, why = settle_offset(scene, reading, policy="repair" if policy == "fail" else policy)
    if offset == stored:
        return None
    return (
        f"scene {planned.item_id} is stored with an offset of {stored:+d}, right is {offset:+d}: "
        f"{why or scene.offset_evidence}; make the cube again"
    )


def _scene_of(plan: Plan, collection: str, planned: PlannedScene) -> Scene | None:
    """Return the scene as its metadata described it, as far as the cube keeps them; None without an offset."""
    row = next((row for row in plan.items.get(collection, ()) if row["id"] == planned.item_id), None)
    entry = plan.statistics.get(collection, {}).get("offset_verdicts", {}).get(planned.item_id)
    named = plan.catalogue(collection)
    product = find_product({"id": planned.item_id, "properties": row or {}}, named)
    if row is None or entry is None or product is None or not product.offsets:
        return None
    decided = int(entry["dn_offset"])
    by_metadata = OFFSET_DN - decided if entry["verdict"] == "repaired" else decided
    assets = {
        asset.band: AssetRef(
            band=asset.band, key=asset.key, href=asset.href, kind=asset.kind, unit=asset.unit,
            scale=1.0 if asset.scale is None else asset.scale, presigned=bool(asset.presigned),
        )
        for asset in planned.assets
    }  # fmt: skip
    if entry.get("witnesses"):
        witnesses = tuple(Witness.from_dict(one) for one in entry["witnesses"])
    else:
        witnesses = _kept_witnesses(row, [asset.href for asset in assets.values()], by_metadata)
    return Scene(
        id=planned.item_id,
        collection=named,
        provider=str(row.get("provider") or ""),
        datetime=str(row["datetime"]),
        assets=assets,
        lacking=planned.lacking,
        footprint={},
        bbox=(0.0, 0.0, 0.0, 0.0),
        baseline=row.get("baseline"),
        dn_offset=by_metadata,
        offset_evidence=str(entry.get("evidence") or ""),
        product=product.name,
        witnesses=witnesses,
    )


def _kept_witnesses(row: Mapping[str, Any], hrefs: Sequence[str], by_metadata: int) -> tuple[Witness, ...]:
    """Return what the item table and the hrefs of a cube of an earlier release say about the offset.

    Only a baseline before 04.00 needs them: it may have been the version of a processor.
    """
    baseline = row.get("baseline")
    if by_metadata != 0 or baseline_has_offset(baseline) is not False:
        return ()
    named = baselines_of({"s2:datatake_id": row.get("datatake")}, [str(row["id"])], hrefs)
    against = [Witness(place, said, OFFSET_DN, 1) for place, said in named.items() if baseline_has_offset(said)]
    return (Witness("item table", str(baseline), 0, _KEPT), *against)
