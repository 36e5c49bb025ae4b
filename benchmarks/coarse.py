"""Coarse cubes: 1/2, 1/4 and 1/8 of the files' resolution, from all pixels and from overviews, compared with odc-stac.

Whole tiles of simulated scenes in COGs whose overviews are averages, on two running workers of one thread, as for
`ingest_speed.py --part near`. odc-stac reads overviews by itself, and keeps no status, source, counts or hashes. Also
how often a block of the files is decoded where all pixels are averaged.
"""

from __future__ import annotations

import shutil
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from harness import BANDS, OUT, WORKERS, Row, arguments, medians, publish, world
from ingest_speed import forget_files, on, workers
from peers import run_odc

_RESOLUTIONS = {2: 20, 4: 40, 8: 80}


def make_plan(source: Path, resolution: int, overviews: bool) -> Any:
    from ingest.plan.making import make_plan as plan
    from ingest.request.config import IngestConfig

    config = IngestConfig(
        collections=("sentinel-2-l2a",), bands=BANDS, mask="none", resolution=resolution, read_overviews=overviews
    )
    return plan(str(source), config)


def run_terrashard(plan: Any, client: Any) -> float:
    """Seconds of a whole run into an empty cube, start and end included."""
    from ingest.request.config import IngestConfig
    from ingest.run.loop import run

    shutil.rmtree(OUT / "coarse.zarr", ignore_errors=True)
    client.run(forget_files)
    began = time.perf_counter()
    report = run(plan, OUT / "coarse.zarr", config=IngestConfig(workers=WORKERS), client=client)
    if report.exit_code:
        raise SystemExit(report.summary())
    return time.perf_counter() - began


def decoded_twice(plan: Any) -> float:
    """Blocks that one pass over all shards of a plan decodes ÷ blocks of its files, counted in this process."""
    from ingest.raster import blocks
    from ingest.run.shard import fill_shard

    counted, files = [0], set()
    decode = blocks.BlockReader._decode

    def count(self: Any, *given: Any) -> None:
        counted[0] += 1
        decode(self, *given)

    blocks.BlockReader._decode = count  # type: ignore[method-assign, assignment]
    try:
        for task in plan.tasks:
            fill_shard(task, plan.recipe(task.collection))
            files |= {asset.href for scene in task.sources for asset in scene.assets}
    finally:
        blocks.BlockReader._decode = decode  # type: ignore[method-assign]
    import rasterio

    whole = 0
    for href in files:
        with rasterio.open(href) as source:
            tall, wide = source.block_shapes[0]
            whole += -(-source.height // tall) * -(-source.width // wide)
    return counted[0] / whole


def main() -> int:
    asked = arguments(__doc__ or "")
    from ingest.worker.guard import WORKER_SETTINGS

    OUT.mkdir(exist_ok=True)
    catalogue = world(asked.full)
    rows = []
    with workers(WORKER_SETTINGS) as client:
        for factor, resolution in _RESOLUTIONS.items():
            all_pixels, smaller = (make_plan(catalogue, resolution, overviews) for overviews in (False, True))
            (spec,) = all_pixels.specs
            megabytes = len(spec.times) * len(BANDS) * spec.grid.height * spec.grid.width * factor**2 * 2 / 1e6
            print(f"1/{factor}: {megabytes:.0f} MB of pixels in the files, {spec.grid}")
            took = medians(
                {
                    "all pixels": partial(run_terrashard, all_pixels, client),
                    "overviews": partial(run_terrashard, smaller, client),
                    "odc-stac": on(client, partial(run_odc, all_pixels, BANDS)),
                },
                asked.repeats,
            )
            ours, full, peer = (took[side] for side in ("overviews", "all pixels", "odc-stac"))
            per = f"{ours:.2f} s, odc-stac {peer:.2f} s"
            rows += [
                Row(f"1/{factor}: overviews, times as fast as odc-stac", peer / ours, 1.0, note=per),
                Row(f"1/{factor}: all pixels, MB/s of pixels in the files", megabytes / full),
                Row(f"1/{factor}: all pixels, times as fast as odc-stac", peer / full),
                Row(f"1/{factor}: all pixels, blocks decoded ÷ blocks of the files", decoded_twice(all_pixels), 1.0,
                    at_most=True),
            ]  # fmt: skip
    return 0 if publish("coarse", rows, full=asked.full) else 1


if __name__ == "__main__":
    sys.exit(main())
