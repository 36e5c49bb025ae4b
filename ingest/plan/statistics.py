"""Statistics of the collections of a plan: shares, sizes and verdicts, and the sentences on wrong metadata."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ingest.plan.target import pixel_box
from ingest.plan.task import PlannedScene, Recipe, ShardTask
from ingest.raster.resample import nesting_factor
from zarr_store.grid import Grid

if TYPE_CHECKING:
    from ingest.plan.candidates import ProbedScene

__all__ = ["collect_statistics", "list_discrepancies", "resampled_share"]

_PACKED = 0.55
"""Stored bytes over decoded bytes of real 10 m reflectance with blosc zstd-3 bitshuffle; an estimate for people."""
_SOURCE_BLOCK = 512
"""Side of a source block that the number of requests is estimated with, in pixels."""


def collect_statistics(recipe: Recipe, members: Sequence[ProbedScene], tasks: Sequence[ShardTask]) -> dict[str, Any]:
    """Collect the statistics of one collection, as JSON values; the summary shows them and the cube keeps them.

    Returns:
        resampled_share: Share of the data pixels that is not a plain copy of source pixels.
        offset_verdicts: Item id → verdict, offset and evidence, and all that was weighed: witnesses and pixels.
        scenes, steps, shards, lacking, unopened_assets: Counts.
        bytes_to_read, bytes_to_write, requests: Estimates.
    """
    grid = recipe.spec.grid
    planned: dict[int, PlannedScene] = {scene.item: scene for task in tasks for scene in task.sources}
    probes = {one.scene.id: one.probe for one in members}
    bytes_read = requests = 0
    for scene in planned.values():
        reach = pixel_box(scene.extent, grid)
        for asset in scene.assets:
            if reach is None or asset.header is None:
                continue
            probe = probes[scene.item_id]
            size = probe.assets[asset.band].size_bytes if probe and asset.band in probe.assets else None
            back = pixel_box(grid, asset.header)
            source_px = (back[1] - back[0]) * (back[3] - back[2]) if back else 0
            whole_px = asset.header.height * asset.header.width
            itemsize = np.dtype(asset.stored).itemsize
            bytes_read += round((size or whole_px * itemsize) * source_px / whole_px)
            requests += 2 + source_px // _SOURCE_BLOCK**2
    times, height, width = recipe.spec.shape
    itemsizes = [
        np.dtype(array.dtype).itemsize * (len(recipe.spec.bands) if "band" in array.dims else 1)
        for array in recipe.spec.arrays()
    ]
    return {
        "resampled_share": resampled_share(planned.values(), grid),
        "offset_verdicts": {
            one.scene.id: {
                "verdict": one.verdict,
                "dn_offset": one.dn_offset,
                "evidence": one.scene.offset_evidence,
                "witnesses": [witness.to_dict() for witness in one.scene.witnesses],
                "pixels": one.probe.reading.to_dict() if one.probe and one.probe.reading else None,
            }
            for one in members
        },
        "scenes": len(members),
        "steps": times,
        "shards": len(tasks),
        "lacking": sum(len(scene.lacking) for scene in planned.values()),
        "unopened_assets": sum(asset.header is None for scene in planned.values() for asset in scene.assets),
        "bytes_to_read": bytes_read,
        "bytes_to_write": round(times * height * width * sum(itemsizes) * _PACKED),
        "requests": requests,
    }


def resampled_share(scenes: Iterable[PlannedScene], grid: Grid) -> float:
    """Share of the data pixels that scenes give a grid that is not a plain copy of source pixels."""
    known: dict[tuple[Grid, Grid], tuple[int, bool]] = {}
    copied = moved = 0
    for scene in scenes:
        for asset in scene.assets:
            if asset.header is None or asset.kind != "data":
                continue
            place = (scene.extent, asset.header)
            if place not in known:  # the same tiles meet on every date
                reach = pixel_box(scene.extent, grid)
                pixels = (reach[1] - reach[0]) * (reach[3] - reach[2]) if reach else 0
                known[place] = pixels, nesting_factor(asset.header, grid) == 1
            pixels, exact = known[place]
            copied, moved = copied + pixels * exact, moved + pixels * (not exact)
    return round(moved / (copied + moved), 6) if copied + moved else 0.0


def list_discrepancies(members: Sequence[ProbedScene]) -> list[str]:
    """List, one line each, where catalogue and files disagree and which assets are lacking or cannot be opened."""
    scenes_by_sentence: dict[str, list[str]] = defaultdict(list)
    for one in members:
        for sentence in one.probe.discrepancies if one.probe else ():
            scenes_by_sentence[sentence].append(one.scene.id)
        for band in one.scene.lacking:
            scenes_by_sentence[f"no asset for {band}: its pixels will be missing"].append(one.scene.id)
        for note in one.scene.notes:
            scenes_by_sentence[note].append(one.scene.id)
    return [
        f"{scenes[0] if len(scenes) == 1 else f'{len(scenes)} of {len(members)} scenes'}: {sentence}"
        for sentence, scenes in scenes_by_sentence.items()
    ]
