"""The floor of an ingest: the fastest decoding and encoding of the same pixels, one process per core, nothing else.

Blocks are inflated by libdeflate and their predictor undone, both straight from the file's bytes; chunks are encoded as
the cube stores them, and nothing is written. Beside it runs terrashard with everything that it does: probing blocks,
status and source of each pixel, counts, checksums, hashes, files that are synced. Both on the files of
`small_region.py`, whole tiles: 4 bands × 4096². Then one shard in one thread, and where its time goes.
"""

from __future__ import annotations

import argparse
import cProfile
import multiprocessing
import os
import pstats
import shutil
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from harness import BANDS, OUT, WORKERS, Row, publish
from small_region import make_world

_SIDE = 2048


def decode_and_encode(task: tuple[list[str], int, int]) -> int:
    """Decode a window of the bands of one scene, encode it in chunks as the cube's, and return the packed bytes."""
    import imagecodecs
    import rasterio

    inflate: Any = imagecodecs.deflate_decode  # their types know no arrays
    pack: Any = imagecodecs.blosc_encode
    paths, row, col = task
    pixels = np.empty((len(paths), _SIDE, _SIDE), np.uint16)
    for number, path in enumerate(paths):
        with rasterio.open(path) as source, open(path, "rb") as file:
            tall, wide = source.block_shapes[0]
            scratch = np.empty((tall, wide), np.uint16)
            for y in range(row // tall, (row + _SIDE) // tall):
                for x in range(col // wide, (col + _SIDE) // wide):
                    at = int(source.get_tag_item(f"BLOCK_OFFSET_{x}_{y}", "TIFF", bidx=1))
                    size = int(source.get_tag_item(f"BLOCK_SIZE_{x}_{y}", "TIFF", bidx=1))
                    inflate(os.pread(file.fileno(), size, at), out=scratch.reshape(-1).view(np.uint8))
                    top, left = y * tall - row, x * wide - col
                    imagecodecs.delta_decode(scratch, axis=-1, out=pixels[number, top : top + tall, left : left + wide])
    packed = 0
    for y in range(0, _SIDE, 256):
        for x in range(0, _SIDE, 256):
            chunk = np.ascontiguousarray(pixels[:, y : y + 256, x : x + 256])
            packed += len(
                pack(chunk.data, level=1, compressor="zstd", shuffle="bitshuffle", blocksize=1 << 19, numthreads=1)
            )
    return packed


def profile_one(plan: Any, cube: Path) -> list[tuple[str, float]]:
    """Milliseconds of one shard in one thread, by what it does."""
    from ingest.raster.limits import Access
    from ingest.run.task import ingest_shard
    from zarr_store.create import create_cube

    shutil.rmtree(cube, ignore_errors=True)
    create_cube(cube, plan.specs, items=plan.item_tables(), provenance=plan.provenance())
    for task in plan.tasks[:2]:  # imports and memory
        ingest_shard(task, plan.recipe(task.collection), str(cube), Access())
    task = plan.tasks[2]
    profile = cProfile.Profile(time.process_time)  # of this one thread
    began = time.process_time()
    profile.runcall(ingest_shard, task, plan.recipe(task.collection), str(cube), Access())
    whole = (time.process_time() - began) * 1e3
    spent: dict[str, float] = {}
    for (_, _, name), (_, _, own, *_) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        spent[name] = spent.get(name, 0.0) + own * 1e3
    top = sorted(spent.items(), key=lambda item: -item[1])[:8]
    return [("whole shard, processor milliseconds", whole), *((f"of these: {name}", value) for name, value in top)]


def _timed(plan: Any, config: Any, client: Any) -> float:
    """Seconds of one run into an empty cube."""
    from ingest.run.loop import run

    shutil.rmtree(OUT / "floor.zarr", ignore_errors=True)
    began = time.perf_counter()
    report = run(plan, OUT / "floor.zarr", config=config, client=client)
    if report.exit_code:
        raise SystemExit(report.summary())
    return time.perf_counter() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="6 dates; else 2")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side, in turns; the median counts")
    asked = parser.parse_args()
    from ingest.plan.making import make_plan
    from ingest.request.config import IngestConfig

    OUT.mkdir(exist_ok=True)
    root = make_world(60 if asked.full else 12)
    until = "2022-05-27" if asked.full else "2022-05-07"
    config = IngestConfig(collections=("sentinel-2-l2a",), bands=BANDS, mask="none", datetime=f"2022-05-02/{until}")
    plan = make_plan(str(root / "catalog.json"), config)
    fast = make_plan(str(root / "catalog.json"), config.model_copy(update={"profile": "fast"}))
    scenes = {scene.item_id: [a.href for a in scene.assets] for task in plan.tasks for scene in task.sources}
    parts = [(paths, row, col) for paths in scenes.values() for row in (0, _SIDE) for col in (0, _SIDE)]
    megabytes = len(parts) * len(BANDS) * _SIDE * _SIDE * 2 / 1e6
    running = config.running.model_copy(update={"workers": WORKERS})
    # with more dates, what a run costs once weighs less
    longer = config.model_copy(update={"datetime": "2022-05-02/2022-08-25"})
    long_plan = make_plan(str(root / "catalog.json"), longer) if asked.full else None
    seconds: dict[str, list[float]] = {"floor": [], "terrashard": [], "fast": []}
    from ingest.run.cluster import open_cluster

    spawn = multiprocessing.get_context("spawn")
    with (
        open_cluster(config.model_copy(update={"running": running})) as client,
        ProcessPoolExecutor(WORKERS, mp_context=spawn) as pool,
    ):
        for turn in range(asked.repeats + 1):
            began = time.perf_counter()
            packed = sum(pool.map(decode_and_encode, parts))
            middle = time.perf_counter()
            ours_s, fast_s = _timed(plan, config, client), _timed(fast, config, client)
            if turn:  # the first turn warms imports and caches
                seconds["floor"].append(middle - began)
                seconds["terrashard"].append(ours_s)
                seconds["fast"].append(fast_s)
                print({side: round(values[-1], 2) for side, values in seconds.items()}, flush=True)
        long_took = [_timed(long_plan, config, client) for _ in range(2)] if long_plan is not None else []
    floor, ours = (statistics.median(seconds[side]) for side in ("floor", "terrashard"))
    rows = [
        Row("floor, MB/s of pixels", megabytes / floor, note=f"packed to {packed / megabytes / 1e6:.2f}"),
        Row("terrashard, MB/s of pixels", megabytes / ours),
        Row("terrashard ÷ floor", floor / ours, 0.70),
        Row("layout fast, times as fast as train", ours / statistics.median(seconds["fast"]), 1.3),
        *(Row(name, value) for name, value in profile_one(plan, OUT / "floor.zarr")),
    ]  # fmt: skip
    if long_plan is not None:
        # the seconds of the shards that the longer run has more, beside the floor of as many
        added = (min(long_took) - ours) / (len(long_plan.tasks) - len(plan.tasks))
        rows += [
            Row("24 dates: terrashard ÷ floor", floor / len(parts) * len(long_plan.tasks) / min(long_took)),
            Row("each further shard ÷ floor", floor / len(parts) / added,
                note="without what a run costs once: the cube's metadata, the plan, the report"),
        ]  # fmt: skip
    return 0 if publish("ingest-floor", rows, full=asked.full) else 1


if __name__ == "__main__":
    sys.exit(main())
