"""Appending one date to a cube of many: seconds compared with reading its pixels, for several lengths of the cube."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from distributed import Client, LocalCluster

from ingest.plan.making import plan_scenes
from ingest.plan.stored import kept_plan
from ingest.request.config import IngestConfig
from ingest.run.loop import Job, run, run_job
from ingest.scenes.search import SearchResult
from ingest.testing import make_scene, probe_headers
from ingest.upkeep.extend import plan_extension
from zarr_store.grid import Grid
from zarr_store.ledger import LedgerRow
from zarr_store.lock import CubeLock
from zarr_store.read import open_cube
from zarr_store.spec import Layout

NAME, SIZE, REPEATS = "sentinel-2-l2a", (32, 32), 5
GRID = Grid("EPSG:32633", (20.0, 0.0, 500_000.0, 0.0, -20.0, 5_000_000.0), SIZE)
CONFIG = IngestConfig(bands=("red", "scl"))


def scene(folder: Path, day: int):
    moment = np.datetime64("2015-07-01T10:00:00") + np.timedelta64(day, "D")
    pixels: dict[str, np.ndarray] = {"red": np.full(SIZE, 1000 + day, np.uint16), "scl": np.full(SIZE, 4, np.uint8)}
    return make_scene(folder, f"D{day:04d}", GRID, pixels, datetime=f"{moment}Z", platform="sentinel-2a", tile="33TWL")


def measure(days: int, folder: Path, client: Client) -> float:
    scenes = [scene(folder, day) for day in range(days + REPEATS)]
    plan = plan_scenes(
        scenes[:days], probe_headers(scenes[:days]), CONFIG, layout=Layout("t", (1, 32, 32), (1, 32, 32))
    )
    cube = folder / "cube.zarr"
    run(plan, cube, client=client, config=IngestConfig(limit=1))
    ledger = open_cube(cube).ledger(NAME)
    template = ledger.get((0, 0, 0))
    for task in plan.tasks[1:]:  # as if they had been written: what is measured is not their pixels
        ledger.put(LedgerRow(task.index, task.region, task.key, "done", (), template.checksums, template.stats))
    seconds = []
    for added in range(1, REPEATS + 1):
        started = time.perf_counter()
        with CubeLock(cube, "benchmark") as lock:
            found = SearchResult(tuple(scenes[: days + added]))
            merged = plan_extension(kept_plan(cube), "", CONFIG, append=True, refresh=False, found=found)
            report = run_job(Job(merged, str(cube), lock, grow=True), client=client)
        seconds.append(time.perf_counter() - started)
        assert len(report.written) == 1
    return statistics.median(seconds)


def main() -> None:
    options = {"n_workers": 1, "threads_per_worker": 2, "processes": False, "host": "127.0.0.1", "protocol": "tcp"}
    with LocalCluster(**options, dashboard_address="127.0.0.1:0") as cluster, Client(cluster) as client:
        for days in [int(a) for a in sys.argv[1:]] or [10, 100, 1000]:
            with tempfile.TemporaryDirectory() as folder:
                print(f"{days:5} dates: one more in {measure(days, Path(folder), client):.2f} s (median of {REPEATS})")


if __name__ == "__main__":
    main()
