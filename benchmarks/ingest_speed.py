"""How long an ingest takes beside what it cannot avoid, and beside stackstac: simulated scenes, all in one run.

    make bench            # about three minutes on two cores; results also in benchmarks/out/ingest.json

Three ways from the same COGs to a Zarr store with the same bands, dates and grid, each with two processes:

- floor: every file decoded once with rasterio and every array encoded once as in the cube; no masks, no mosaic, no
  statistics, no ledger. Nothing that reads and writes these pixels can be much faster.
- terrashard: `ingest.run` with its own cluster, start-up included.
- stackstac: stack, mosaic of each day, `to_zarr` with unsharded chunks of the same size. It applies no offset, no
  mask and no status, and its items are given the projection fields that it needs.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

OUT = Path(__file__).resolve().parent / "out"
BANDS = ("blue", "green", "red", "nir")
WORKERS = 2
REPEATS = 3


def make_world() -> Path:
    import datetime as dt

    from ingest.simulate import SimulateConfig, simulate

    dates = (dt.date(2022, 4, 20), dt.date(2022, 6, 16), dt.date(2022, 7, 24))
    config = SimulateConfig(tiles=2, tile_px=2048, overlap_px=256, dates=dates, radar_dates=())
    return simulate(OUT / "world", config).catalog


def copy_scene(task: tuple[str, list[tuple[str, str]]]) -> int:
    """Floor: decode all files of one scene, encode them as one shard of the cube's layout."""
    import rasterio
    import tensorstore as ts

    from zarr_store.spec import LAYOUTS

    target, files = task
    layers = {}
    for band, path in files:
        with rasterio.open(path) as source:
            layers[band] = source.read(1)
    main = np.stack([layers[band] for band in BANDS])[np.newaxis]
    layout = LAYOUTS["train"]
    codec = {
        "name": "sharding_indexed",
        "configuration": {
            "chunk_shape": [1, len(BANDS), *layout.chunk[1:]],
            "codecs": [
                {"name": "bytes", "configuration": {"endian": "little"}},
                {
                    "name": "blosc",
                    "configuration": {
                        "cname": layout.cname,
                        "clevel": layout.clevel,
                        "shuffle": "bitshuffle",
                        "typesize": 2,
                    },
                },
                {"name": "crc32c"},
            ],
        },
    }
    store = ts.open(
        {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": target},
            "metadata": {
                "shape": list(main.shape),
                "data_type": "uint16",
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [1, len(BANDS), *main.shape[2:]]}},
                "codecs": [codec],
            },
        },
        create=True,
        delete_existing=True,
    ).result()
    store.write(main).result()
    np.save(Path(target) / "scl.npy", layers["scl"])
    return main.nbytes


def run_floor(plan: Any) -> None:
    scenes = {scene.item_id: scene for task in plan.tasks for scene in task.sources}
    shutil.rmtree(OUT / "floor", ignore_errors=True)
    tasks = [
        (str(OUT / "floor" / f"{name}.zarr"), [(asset.band, asset.href) for asset in scene.assets])
        for name, scene in scenes.items()
    ]
    with ProcessPoolExecutor(WORKERS, mp_context=get_context("spawn")) as pool:
        list(pool.map(copy_scene, tasks))


def run_terrashard(plan: Any) -> None:
    from ingest.config import IngestConfig
    from ingest.run import run

    shutil.rmtree(OUT / "cube.zarr", ignore_errors=True)
    report = run(plan, OUT / "cube.zarr", config=IngestConfig(workers=WORKERS))
    if report.exit_code:
        raise SystemExit(report.summary())


def run_stackstac(plan: Any) -> None:
    import stackstac
    from distributed import Client, LocalCluster

    shutil.rmtree(OUT / "stackstac.zarr", ignore_errors=True)
    grid = plan.grid
    items: dict[str, dict[str, Any]] = {}
    rows = plan.items[plan.specs[0].collection]
    for task in plan.tasks:
        for scene in task.sources:
            assets = {
                a.band: {
                    "href": a.href,
                    "proj:epsg": grid.epsg,
                    "proj:shape": list(a.header.shape),
                    "proj:transform": list(a.header.transform),
                }
                for a in scene.assets
            }
            items[scene.item_id] = {
                "type": "Feature",
                "id": scene.item_id,
                "properties": {"datetime": rows[scene.item]["datetime"]},
                "assets": assets,
            }
    with (
        LocalCluster(n_workers=WORKERS, threads_per_worker=1, host="127.0.0.1", dashboard_address=None) as cluster,
        Client(cluster),
    ):
        stack = stackstac.stack(
            list(items.values()),
            assets=[*BANDS, "scl"],
            epsg=grid.epsg,
            resolution=grid.resolution[0],
            bounds=grid.bounds,
            snap_bounds=False,
            chunksize=1024,
            dtype=np.dtype("uint16"),
            fill_value=np.uint16(0),
            rescale=False,
            properties=False,
            band_coords=False,
        )
        days = stack.groupby("time.date").map(lambda day: stackstac.mosaic(day, nodata=0))
        array = days.data.rechunk((1, -1, 256, 256))
        array.to_zarr(str(OUT / "stackstac.zarr"))


def best_of(run: Callable[[Any], None], plan: Any) -> list[float]:
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        run(plan)
        seconds.append(round(time.perf_counter() - began, 2))
    return seconds


def main() -> None:
    from ingest.config import IngestConfig
    from ingest.plan import make_plan

    OUT.mkdir(exist_ok=True)
    catalogue = make_world()
    began = time.perf_counter()
    plan = make_plan(str(catalogue), IngestConfig(collections=("sentinel-2-l2a",), bands=(*BANDS, "scl")))
    planning = round(time.perf_counter() - began, 2)
    height, width = plan.grid.shape
    megapixels = sum(len(s.times) for s in plan.specs) * (len(BANDS) + 1) * height * width / 1e6
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {WORKERS} processes each")
    scenes, dates = len(plan.items["sentinel-2-l2a"]), len(plan.specs[0].times)
    print(f"{scenes} scenes → {dates} dates × {height}×{width} px × {len(BANDS)} bands + scl")
    print(f"planning (search, headers, offset verdicts): {planning:.1f} s")
    results = {
        name: best_of(run, plan)
        for name, run in (("floor", run_floor), ("terrashard", run_terrashard), ("stackstac", run_stackstac))
    }
    floor = min(results["floor"])
    for name, seconds in results.items():
        best = min(seconds)
        print(f"{name:11} best {best:6.1f} s of {seconds}  {megapixels / best:7.1f} Mpx/s  {best / floor:5.2f} × floor")
    ratio = min(results["stackstac"]) / min(results["terrashard"])
    print(f"terrashard takes {1 / ratio:.2f} of stackstac's time, and adds offsets, masks, status, sources, checksums")
    document = {
        "seconds": results,
        "planning_s": planning,
        "megapixels": megapixels,
        "cores": os.cpu_count(),
        "repeats": REPEATS,
    }
    (OUT / "ingest.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
