"""Peak memory of a worker above the idle one, in shards; and whether it grows with the number of items."""

from __future__ import annotations

import dataclasses
import datetime as dt
import shutil
import statistics
import sys
import threading
from typing import Any

import psutil
from harness import BANDS, OUT, WORKERS, Row, arguments, publish, world


def plan_of(source: str, copies: int) -> Any:
    """A plan of a source's scenes, each repeated `copies` times with later dates: the files stay the same."""
    from ingest.plan.making import plan_scenes
    from ingest.plan.probe import probe_scenes
    from ingest.request.config import IngestConfig
    from ingest.scenes.search import find_scenes

    config = IngestConfig(collections=("sentinel-2-l2a",), bands=(*BANDS, "scl"))
    found = find_scenes(source, config).scenes
    probes = probe_scenes(found, config)
    scenes, headers = [], {}
    for copy in range(copies):
        for scene in found:
            when = dt.datetime.fromisoformat(scene.datetime) + dt.timedelta(days=100 * copy)
            name = f"{scene.id}_{copy}"
            scenes.append(dataclasses.replace(scene, id=name, datetime=when.strftime("%Y-%m-%dT%H:%M:%SZ")))
            headers[name] = probes[scene.key]
    return plan_scenes(scenes, headers, config, source=source)


def peak_bytes(plan: Any) -> float:
    """Largest resident size of any worker during a run, above what it was before, in bytes."""
    import dask
    from distributed import Client, LocalCluster

    from ingest.request.config import IngestConfig
    from ingest.run.loop import run
    from ingest.worker.guard import WORKER_SETTINGS

    cube = OUT / "memory.zarr"
    shutil.rmtree(cube, ignore_errors=True)
    options: dict[str, Any] = {"host": "127.0.0.1", "dashboard_address": None}
    with (
        dask.config.set(WORKER_SETTINGS),
        LocalCluster(n_workers=WORKERS, threads_per_worker=1, **options) as cluster,
        Client(cluster) as client,
    ):
        client.run(__import__, "ingest.run.loop")  # imports are no part of a shard
        processes = [psutil.Process(nanny.pid) for nanny in cluster.workers.values()]
        idle = [process.memory_info().rss for process in processes]
        peaks = list(idle)
        done = threading.Event()

        def watch() -> None:
            while not done.wait(0.01):
                for number, process in enumerate(processes):
                    peaks[number] = max(peaks[number], process.memory_info().rss)

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            report = run(plan, cube, config=IngestConfig(workers=WORKERS), client=client)
        finally:
            done.set()
            watcher.join()
    if report.exit_code:
        raise SystemExit(report.summary())
    return float(max(peak - start for peak, start in zip(peaks, idle, strict=True)))


def main() -> int:
    from ingest.simulate.server import serve

    asked = arguments(__doc__ or "")
    catalogue = world(asked.full)
    one, ten = plan_of(str(catalogue), 1), plan_of(str(catalogue), 10)
    region = one.tasks[0].region
    spec = one.specs[0]
    pixel = 2 * len(BANDS) + len(spec.class_layers) + 1 + 2  # bands, class layers, status, source item
    shard = pixel * region.shape[1] * region.shape[2]
    repeats = max(1, asked.repeats // 2)
    few = statistics.median(peak_bytes(one) for _ in range(repeats))
    many = statistics.median(peak_bytes(ten) for _ in range(repeats))
    with serve(catalogue.parent, latency_s=0.05) as server:
        remote = plan_of(server.stac_url, 10)
        far = statistics.median(peak_bytes(remote) for _ in range(repeats))
    rows = [
        Row("peak of a worker above idle, in shards", few / shard, 4, True, note=f"{shard / 1e6:.0f} MB each"),
        Row("the same with ten times the items ÷ that", many / few, 1.1, at_most=True),
        Row("over HTTP with 50 ms before each answer, in shards", far / shard, 4, True),
    ]  # fmt: skip
    return 0 if publish("ingest-memory", rows, full=asked.full) else 1


if __name__ == "__main__":
    sys.exit(main())
