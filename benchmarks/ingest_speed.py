"""From COGs to a Zarr store: terrashard compared with odc-stac, stackstac, and plain decoding and encoding.

All on the same files, two processes of one thread, and clusters that are running already: workers as terrashard starts
them, and beside them workers as Dask starts them by itself, which is what users of the peers have. terrashard also
reads the class layer, masks, mosaics, keeps status and source of each pixel, counts chunks and hashes what it wrote;
the others read and write the four bands. The last part adds 50 ms to every answer of the server, and counts bytes.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness import BANDS, OUT, WORKERS, Row, arguments, medians, publish, world
from peers import LAYERS, run_limit, run_odc, run_stackstac

_LATENCY_S = 0.05


def make_plan(source: str) -> Any:
    from ingest.plan.making import make_plan as plan
    from ingest.request.config import IngestConfig

    return plan(source, IngestConfig(collections=("sentinel-2-l2a",), bands=LAYERS))


def forget_files() -> None:
    """On a worker: know no file from the run before, as a worker that has just begun."""
    from ingest.raster.access import header_cache
    from ingest.raster.download import head_cache

    header_cache(os.getpid()).clear()
    head_cache(os.getpid()).clear()


def run_terrashard(plan: Any, client: Any) -> float:
    """Seconds of a whole run into an empty cube, start and end included."""
    from ingest.request.config import IngestConfig
    from ingest.run.loop import run

    shutil.rmtree(OUT / "cube.zarr", ignore_errors=True)
    client.run(forget_files)
    began = time.perf_counter()
    report = run(plan, OUT / "cube.zarr", config=IngestConfig(workers=WORKERS), client=client)
    if report.exit_code:
        raise SystemExit(report.summary())
    return time.perf_counter() - began


def block_bytes(root: Path, plan: Any) -> int:
    """Stored bytes of the full-resolution blocks of all files of a plan, each once."""
    import rasterio

    total = 0
    hrefs = {asset.href for task in plan.tasks for scene in task.sources for asset in scene.assets}
    for href in hrefs:
        with rasterio.open(root / href.partition("/files/")[2]) as source:
            tall, wide = source.block_shapes[0]
            for y in range(-(-source.height // tall)):
                for x in range(-(-source.width // wide)):
                    total += int(source.get_tag_item(f"BLOCK_SIZE_{x}_{y}", "TIFF", bidx=1) or 0)
    return total


@contextmanager
def workers(settings: Mapping[str, Any]) -> Iterator[Any]:
    """A client on two running processes of one thread."""
    import dask
    from distributed import Client, LocalCluster

    with (
        dask.config.set(settings),
        LocalCluster(n_workers=WORKERS, threads_per_worker=1, host="127.0.0.1", dashboard_address=None) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


def on(client: Any, work: Callable[[], None]) -> Callable[[], None]:
    """`work` with the current client set, by which the peers find their workers."""

    def run() -> None:
        with client.as_current():
            work()

    return run


def near(plan: Any, megabytes: float, repeats: int) -> list[Row]:
    """Local files, beside plain decoding and encoding and beside the peers on both kinds of workers."""
    from ingest.worker.guard import WORKER_SETTINGS

    spawn = multiprocessing.get_context("spawn")
    with workers(WORKER_SETTINGS) as ours, workers({}) as plain, ProcessPoolExecutor(WORKERS, mp_context=spawn) as pool:
        print(f"local files, {megabytes:.0f} MB of pixels")
        took = medians(
            {
                "limit": lambda: run_limit(pool, plan),
                "terrashard": lambda: run_terrashard(plan, ours),
                "odc-stac": on(ours, lambda: run_odc(plan, BANDS)),
                "stackstac": on(ours, lambda: run_stackstac(plan, BANDS)),
                "odc-stac, plain workers": on(plain, lambda: run_odc(plan, BANDS)),
                "stackstac, plain workers": on(plain, lambda: run_stackstac(plan, BANDS)),
            },
            repeats,
        )
    own = took["terrashard"]
    return [
        Row("decoding by GDAL + encoding, MB/s of pixels", megabytes / took["limit"]),
        Row("terrashard, MB/s of pixels", megabytes / own),
        # no aim: this limit decodes by GDAL and encodes blocks of another size, so it is none of ours
        Row("beside decoding by GDAL + encoding, MB/s ÷ MB/s", took["limit"] / own),
        Row("decoding by GDAL + encoding, times faster than odc-stac", took["odc-stac"] / took["limit"]),
        Row("times faster than odc-stac on the same workers", took["odc-stac"] / own, 3.5),
        Row("times faster than stackstac on the same workers", took["stackstac"] / own, 3.5),
        Row("times faster than odc-stac on plain Dask workers", took["odc-stac, plain workers"] / own),
        Row("times faster than stackstac on plain Dask workers", took["stackstac, plain workers"] / own),
    ]


def far(root: Path, megabytes: float, repeats: int) -> list[Row]:
    """Over HTTP with a pause before each answer, and what the server was asked for."""
    from ingest.simulate.server import serve
    from ingest.worker.guard import WORKER_SETTINGS

    with workers(WORKER_SETTINGS) as ours, serve(root, latency_s=_LATENCY_S) as server:
        remote = make_plan(server.stac_url)
        print(f"over HTTP, {_LATENCY_S * 1000:.0f} ms before each answer")
        took = medians(
            {
                "terrashard": lambda: run_terrashard(remote, ours),
                "odc-stac": on(ours, lambda: run_odc(remote, BANDS)),
                "stackstac": on(ours, lambda: run_stackstac(remote, BANDS)),
            },
            repeats,
        )
        ours.restart()  # so that nothing of the files is known to the workers
        server.reset_counters()
        run_terrashard(remote, ours)
        sent, requests = server.bytes_sent, sum(server.requests.values())
    needed = block_bytes(root, remote)
    return [
        Row("50 ms latency: terrashard, MB/s of pixels", megabytes / took["terrashard"]),
        Row("50 ms latency: times faster than odc-stac", took["odc-stac"] / took["terrashard"], 4),
        Row("50 ms latency: times faster than stackstac", took["stackstac"] / took["terrashard"]),
        Row("source bytes read ÷ bytes of the blocks needed", sent / needed, 1.05, True, f"{requests} requests"),
    ]


def main() -> int:
    asked = arguments(__doc__ or "", parts=("near", "far"))
    OUT.mkdir(exist_ok=True)
    catalogue = world(asked.full)
    plan = make_plan(str(catalogue))
    megabytes = sum(len(s.times) for s in plan.specs) * len(BANDS) * plan.grid.height * plan.grid.width * 2 / 1e6
    passed = True
    if asked.part in (None, "near"):
        passed &= publish("ingest-speed", near(plan, megabytes, asked.repeats), full=asked.full)
    if asked.part in (None, "far"):
        passed &= publish("ingest-latency", far(catalogue.parent, megabytes, asked.repeats), full=asked.full)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
