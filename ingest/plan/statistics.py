"""What a plan knows of its collections besides the tasks: shares, sizes, verdicts, wrong metadata. Pure."""

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
    from ingest.plan.candidates import FoundScene

__all__ = ["collection_statistics", "discrepancies", "resampled_share"]

_PACKED = 0.55
"""Stored over decoded bytes of real 10 m reflectance with blosc zstd-3 bitshuffle; an estimate for people."""
_SOURCE_BLOCK = 512


def collection_statistics(recipe: Recipe, members: Sequence[FoundScene], tasks: Sequence[ShardTask]) -> dict[str, Any]:
    """Facts of one collection: JSON-able, shown in the summary and kept in the cube.

    Returns:
        resampled_share: Of the data pixels that sources give the grid, the share that is not a plain copy.
        offset_verdicts: Item id → verdict, offset and evidence.
        shards, steps, scenes, missing_assets: Counts.
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
            one.scene.id: {"verdict": one.verdict, "dn_offset": one.dn_offset, "evidence": one.scene.offset_evidence}
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
    """Of the data pixels that scenes give a grid, the share that is not a plain copy."""
    known: dict[tuple[Grid, Grid], tuple[int, bool]] = {}
    copied = moved = 0
    for scene in scenes:
        for asset in scene.assets:
            if asset.header is None or asset.kind != "data":
                continue
            place = (scene.extent, asset.header)
            if place not in known:  # the tiles of a cube meet again on every date
                reach = pixel_box(scene.extent, grid)
                pixels = (reach[1] - reach[0]) * (reach[3] - reach[2]) if reach else 0
                known[place] = pixels, nesting_factor(asset.header, grid) == 1
            pixels, exact = known[place]
            copied, moved = copied + pixels * exact, moved + pixels * (not exact)
    return round(moved / (copied + moved), 6) if copied + moved else 0.0


def discrepancies(members: Sequence[FoundScene]) -> list[str]:
    """Where catalogue and files disagree, what is lacking and what could not be opened; one line a kind."""
    said: dict[str, list[str]] = defaultdict(list)
    for one in members:
        for sentence in one.probe.discrepancies if one.probe else ():
            said[sentence].append(one.scene.id)
        for band in one.scene.lacking:
            said[f"no asset for {band}: its pixels will be missing"].append(one.scene.id)
        for note in one.scene.notes:
            said[note].append(one.scene.id)
    return [
        f"{scenes[0] if len(scenes) == 1 else f'{len(scenes)} of {len(members)} scenes'}: {sentence}"
        for sentence, scenes in said.items()
    ]
