"""Statistics of the collections of a plan: shares, sizes and verdicts, and the sentences on wrong metadata."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ingest.plan.overviews import list_overviews
from ingest.plan.target import pixel_box
from ingest.plan.task import PlannedScene, Recipe, ShardTask
from ingest.raster.ranges import HEAD_BYTES
from ingest.raster.resample import nesting_factor, reach_margin
from ingest.trust.hrefs import is_url
from zarr_store.grid import Grid

if TYPE_CHECKING:
    from ingest.plan.candidates import ProbedScene

__all__ = ["collect_statistics", "count_blocks", "fetched_pixels", "list_discrepancies", "resampled_share"]

_PACKED = 0.55
"""Stored bytes over decoded bytes of real 10 m reflectance with blosc zstd-3 bitshuffle; an estimate for people."""


def collect_statistics(recipe: Recipe, members: Sequence[ProbedScene], tasks: Sequence[ShardTask]) -> dict[str, Any]:
    """Collect the statistics of one collection, as JSON values; the summary shows them and the cube keeps them.

    Returns:
        resampled_share: Share of the data pixels that is not a plain copy of source pixels.
        offset_verdicts: Item id → verdict, offset and evidence, and all that was weighed: witnesses and pixels.
        datastrips, catalogue_ids: Item id → start of its datastrip, and its id in the catalogue if that is another.
        overviews: Item id → band → factor and resampling of the overview that is read; absent where none is.
        scenes, steps, shards, empty_shards, lacking, unopened_assets: Counts.
        bytes_to_read, bytes_to_write, requests: Estimates. Reading counts the whole blocks that each shard fetches, and
            of remote files the header, which planning has fetched.
    """
    grid = recipe.spec.grid
    planned: dict[int, PlannedScene] = {scene.item: scene for task in tasks for scene in task.sources}
    probes = {one.scene.id: one.probe for one in members}
    bytes_read = requests = 0
    fetched: dict[tuple[Grid, tuple[int, int] | None, tuple[int, int]], tuple[int, int, int]] = {}
    for task in tasks:
        place = (task.region.y0, task.region.x0)
        for scene in task.sources:
            probe = probes[scene.item_id]
            for asset in scene.assets:
                if asset.header is None:
                    continue
                about = probe.assets.get(asset.band) if probe else None
                reduced = about.overview(asset.overview) if about and asset.overview else None
                header = reduced.grid if reduced else asset.header
                block = reduced.block if reduced else about.block if about else None
                key = (header, block, place)
                if key not in fetched:  # the same tiles and shards meet on every date
                    window = grid.window(*place, *task.region.shape[1:])
                    fetched[key] = (
                        *fetched_pixels(header, block, window),
                        count_blocks(header, block, window) if block is not None else 0,
                    )
                touched, rows, blocks = fetched[key]
                block_bytes = reduced.block_bytes if reduced else about.block_bytes if about else None
                if block_bytes is not None and block is not None:
                    bytes_read += round(block_bytes * blocks)
                else:
                    whole = asset.header.height * asset.header.width
                    size = (about.size_bytes if about else None) or whole * np.dtype(asset.stored).itemsize
                    bytes_read += round(size * touched / whole)
                requests += rows
    # the header of each file is one more request
    opened = [asset for scene in planned.values() for asset in scene.assets if asset.header is not None]
    requests += len(opened)
    bytes_read += HEAD_BYTES * sum(is_url(asset.href) for asset in opened)
    written = sum(math.prod(task.region.shape) for task in tasks if task.sources)  # empty shards cost no file
    itemsizes = [
        np.dtype(array.dtype).itemsize * (len(recipe.spec.bands) if "band" in array.dims else 1)
        for array in recipe.spec.arrays()
    ]
    overviews = list_overviews(planned.values(), members)
    return {
        **({"overviews": overviews} if overviews else {}),
        "resampled_share": resampled_share(planned.values(), grid),
        "offset_verdicts": {
            one.scene.id: {
                "verdict": one.verdict,
                "dn_offset": one.dn_offset,
                **({"band_offsets": dict(one.band_offsets)} if one.band_offsets else {}),
                "evidence": one.scene.offset_evidence,
                "witnesses": [witness.to_dict() for witness in one.scene.witnesses],
                "pixels": one.probe.reading.to_dict() if one.probe and one.probe.reading else None,
            }
            for one in members
        },
        "datastrips": {one.scene.id: one.scene.datastrip for one in members if one.scene.datastrip},
        "catalogue_ids": {one.scene.id: one.scene.catalogue_id for one in members if one.scene.catalogue_id},
        "scenes": len(members),
        "steps": len(recipe.spec.times),
        "shards": len(tasks),
        "empty_shards": sum(not task.sources for task in tasks),
        "lacking": sum(len(scene.lacking) for scene in planned.values()),
        "unopened_assets": sum(asset.header is None for scene in planned.values() for asset in scene.assets),
        "bytes_to_read": bytes_read,
        "bytes_to_write": round(written * sum(itemsizes) * _PACKED),
        "requests": requests,
    }


def fetched_pixels(header: Grid, block: tuple[int, int] | None, window: Grid) -> tuple[int, int]:
    """Count the pixels of a file that are fetched for a window of the cube, and the requests.

    Files are fetched in whole blocks.

    Args:
        header: Grid of the file.
        block: (height, width) of its blocks; None where that is unknown, for single pixels.
        window: Part of the cube's grid.
    """
    tall, wide = block or (1, 1)
    (row0, row1), (col0, col1) = _touched(header, (tall, wide), window)
    # blocks of one row that lie side by side are fetched by one request
    rows = -(-(row1 - row0) // tall) if block else int(row1 > row0)
    return (row1 - row0) * (col1 - col0), rows


def count_blocks(header: Grid, block: tuple[int, int], window: Grid) -> int:
    """Count the blocks of a file that are fetched for a window of the cube; arguments as for `fetched_pixels`."""
    (row0, row1), (col0, col1) = _touched(header, block, window)
    return -(-(row1 - row0) // block[0]) * -(-(col1 - col0) // block[1])


def _touched(header: Grid, block: tuple[int, int], window: Grid) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the rows and the columns of all blocks of a file that a window of the cube touches."""
    reach = pixel_box(window, header)
    if reach is None:
        return (0, 0), (0, 0)
    margin = reach_margin(header, window)
    return (
        _in_blocks(reach[0] - margin, reach[1] + margin, block[0], header.height),
        _in_blocks(reach[2] - margin, reach[3] + margin, block[1], header.width),
    )


def _in_blocks(first: int, end: int, block: int, size: int) -> tuple[int, int]:
    """Return the pixels of all blocks along one axis that a range touches, within the file."""
    return max(0, first) // block * block, min(size, -(-min(end, size) // block) * block)


def resampled_share(scenes: Iterable[PlannedScene], grid: Grid) -> float:
    """Return the share of the data pixels of scenes that a grid does not copy unchanged from source pixels."""
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
    """List, one line each, where catalogue and files disagree and which assets are absent or cannot be opened."""
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
