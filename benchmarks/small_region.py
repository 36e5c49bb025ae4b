"""A small region over many dates: 60 dates × 4 bands of 256², from COGs in blocks of 1024², 50 ms before every answer.

Whole commands, each in a process of its own: search, planning, the start of a cluster and the cube. Beside terrashard
runs odc-stac with the threads of its process, and with a Dask cluster of two processes. The server counts bytes and
requests. The files of all dates are links to four files of noise over smooth ground; the region touches four blocks.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from harness import BANDS, OUT, Row, publish

_LATENCY_S = 0.05
_SIDE, _BLOCK, _REGION = 4096, 1024, 256
_LEFT, _TOP = 600_000.0, 5_000_040.0
_RATIO, _EXCESS, _EFFORT = 0.6, 1.05, 0.05
_PEER = """
import sys, odc.stac, pystac_client
from odc.geo.geobox import GeoBox
url, out, left, bottom, right, top, kind = sys.argv[1:]
box = tuple(map(float, (left, bottom, right, top)))
geobox = GeoBox.from_bbox(box, crs="EPSG:32633", resolution=10)
items = list(pystac_client.Client.open(url).search(
    collections=["sentinel-2-l2a"], bbox=list(geobox.geographic_extent.boundingbox)).items())
def load():
    data = odc.stac.load(items, bands=["blue", "green", "red", "nir"], geobox=geobox, chunks={"time": 1},
                         groupby="solar_day")
    data.to_zarr(out, mode="w")
if kind == "threads":
    odc.stac.configure_rio(cloud_defaults=True)
    load()
elif __name__ == "__main__":
    from distributed import Client, LocalCluster
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster, Client(cluster) as client:
        odc.stac.configure_rio(cloud_defaults=True, client=client)
        load()
"""


def make_world(dates: int) -> Path:
    """A catalogue of scenes over one tile; made once for each number of dates."""
    import numpy as np
    import rasterio

    root = OUT / f"small-region-{dates}"
    if (root / "catalog.json").is_file():
        return root
    shutil.rmtree(root, ignore_errors=True)
    folder = root / "sentinel-2-l2a"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(7)
    rows, cols = np.mgrid[0:_SIDE, 0:_SIDE]
    ground = 700.0 + 300.0 * np.sin(rows / 170.0) * np.cos(cols / 230.0)
    for number, band in enumerate(BANDS):
        pixels = (ground * (1 + number / 2) + rng.normal(0, 45, ground.shape)).clip(60, 9_000).astype(np.uint16)
        profile = {
            "driver": "COG", "height": _SIDE, "width": _SIDE, "count": 1, "dtype": "uint16", "nodata": 0,
            "crs": "EPSG:32633", "transform": rasterio.Affine(10, 0, _LEFT, 0, -10, _TOP),
            "blocksize": _BLOCK, "compress": "DEFLATE", "predictor": 2, "overviews": "AUTO",
        }  # fmt: skip
        with rasterio.open(root / f"{band}.tif", "w", **profile) as file:
            file.write(pixels, 1)
    first = dt.datetime(2022, 5, 2, 10, 0, 31, tzinfo=dt.UTC)
    links = [_item(folder, root, first + dt.timedelta(days=5 * day)) for day in range(dates)]
    west, south, east, north = _lonlat(_bounds(0, 0, _SIDE))
    collection = {
        "type": "Collection", "stac_version": "1.0.0", "id": "sentinel-2-l2a", "description": "a small region",
        "license": "CC0-1.0", "links": links,
        "extent": {
            "spatial": {"bbox": [[west, south, east, north]]},
            "temporal": {"interval": [["2022-01-01T00:00:00Z", None]]},
        },
    }  # fmt: skip
    (folder / "collection.json").write_text(json.dumps(collection))
    catalog = {
        "type": "Catalog", "stac_version": "1.0.0", "id": "small", "description": "a small region",
        "links": [{"rel": "child", "href": "./sentinel-2-l2a/collection.json"}],
    }  # fmt: skip
    (root / "catalog.json").write_text(json.dumps(catalog))
    return root


def _item(folder: Path, root: Path, when: dt.datetime) -> dict[str, str]:
    name = f"S2A_33TWL_{when:%Y%m%d}_0_L2A"
    (folder / name).mkdir()
    west, south, east, north = _lonlat(_bounds(0, 0, _SIDE))
    grid = {"proj:shape": [_SIDE, _SIDE], "proj:transform": [10.0, 0.0, _LEFT, 0.0, -10.0, _TOP]}
    assets = {}
    for band in BANDS:
        os.link(root / f"{band}.tif", folder / name / f"{band}.tif")
        assets[band] = {
            "href": f"./{band}.tif", "type": "image/tiff; application=geotiff; profile=cloud-optimized",
            "roles": ["data"], "eo:bands": [{"name": band, "common_name": band}], **grid,
            "raster:bands": [{"nodata": 0, "data_type": "uint16"}],
        }  # fmt: skip
    item = {
        "type": "Feature", "stac_version": "1.0.0", "id": name, "collection": "sentinel-2-l2a",
        "stac_extensions": [
            "https://stac-extensions.github.io/projection/v1.1.0/schema.json",
            "https://stac-extensions.github.io/raster/v1.1.0/schema.json",
            "https://stac-extensions.github.io/eo/v1.1.0/schema.json",
        ],
        "bbox": [west, south, east, north],
        "geometry": {
            "type": "Polygon",
            "coordinates": [[[west, south], [east, south], [east, north], [west, north], [west, south]]],
        },
        "properties": {
            "datetime": when.strftime("%Y-%m-%dT%H:%M:%SZ"), "proj:epsg": 32633, "platform": "sentinel-2a",
            "s2:processing_baseline": "05.09", "earthsearch:boa_offset_applied": True, "s2:mgrs_tile": "33TWL",
            "eo:cloud_cover": 3.0,
        },
        "assets": assets, "links": [],
    }  # fmt: skip
    (folder / name / f"{name}.json").write_text(json.dumps(item))
    return {"rel": "item", "href": f"./{name}/{name}.json"}


def _bounds(row: int, col: int, side: int) -> tuple[float, float, float, float]:
    left, top = _LEFT + 10 * col, _TOP - 10 * row
    return left, top - 10 * side, left + 10 * side, top


def _lonlat(bounds: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    from zarr_store.grid import Grid

    left, bottom, right, top = bounds
    shape = (round((top - bottom) / 10), round((right - left) / 10))
    return Grid("EPSG:32633", (10.0, 0.0, left, 0.0, -10.0, top), shape).lonlat_bounds()


def region() -> tuple[float, float, float, float]:
    """Bounds of the region: about 256², over the corner of four blocks."""
    start = _BLOCK - _REGION // 2
    return _bounds(start, start, _REGION)


def timed(command: list[str]) -> tuple[float, float]:
    """Wall and processor seconds of a command with all its processes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wall = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{command[:3]} ended with {done.returncode}: {done.stderr[-2000:]}")
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def needed_bytes(root: Path, dates: int) -> int:
    """Stored bytes of the four blocks of each file that the region touches."""
    import rasterio

    total = 0
    for band in BANDS:
        with rasterio.open(root / f"{band}.tif") as file:
            total += sum(int(file.get_tag_item(f"BLOCK_SIZE_{x}_{y}", "TIFF", bidx=1)) for x in (0, 1) for y in (0, 1))
    return total * dates


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="60 dates; else 12")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side, in turns; the median counts")
    parser.add_argument("--sides", default="terrashard,threads,processes", help="which sides to run")
    asked = parser.parse_args()
    from ingest.simulate.server import serve

    OUT.mkdir(exist_ok=True)
    dates = 60 if asked.full else 12
    root = make_world(dates)
    needed = needed_bytes(root, dates)
    left, bottom, right, top = region()
    inner = _lonlat((left + 15, bottom + 15, right - 15, top - 15))
    terrashard = str(Path(sys.executable).parent / "terrashard")
    options = ["--collection", "sentinel-2-l2a", "--bands", ",".join(BANDS), "--mask", "none",
               f"--bbox={','.join(map(str, inner))}"]  # fmt: skip
    sides = asked.sides.split(",")
    took: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    sent: dict[str, tuple[int, int]] = {}
    with serve(root, latency_s=_LATENCY_S) as server:
        commands = {
            "terrashard": [terrashard, "ingest", server.stac_url, str(OUT / "small.zarr"), *options],
            **{
                kind: [sys.executable, "-c", _PEER, server.stac_url, str(OUT / f"small-{kind}.zarr"),
                       *map(str, (left, bottom, right, top)), kind]
                for kind in ("threads", "processes")
            },
        }  # fmt: skip
        for _ in range(asked.repeats):
            for side in sides:
                shutil.rmtree(OUT / "small.zarr", ignore_errors=True)
                server.reset_counters()
                took[side].append(timed(commands[side]))
                files = {path: n for path, n in server.requests.items() if path.startswith("/files/")}
                sent[side] = (server.bytes_sent, sum(files.values()))
                wall, cpu = took[side][-1]
                print(f"  {side:12} {wall:6.2f} s, {cpu:6.2f} s of processors, {sent[side][0] / 1e6:.0f} MB in "
                      f"{sent[side][1]} requests", flush=True)  # fmt: skip
        told = stated_effort(terrashard, server.stac_url, options) if "terrashard" in sides else 0
    walls = {side: statistics.median(w for w, _ in runs) for side, runs in took.items()}
    cpus = {side: statistics.median(c for _, c in runs) for side, runs in took.items()}
    rows: list[Row] = [Row("bytes of the blocks needed, MB", needed / 1e6)]
    for side in sides:
        name = side if side == "terrashard" else f"odc-stac, {side}"
        rows += [
            Row(f"{name}: seconds in all", walls[side], note=f"{cpus[side]:.1f} s of processors"),
            Row(f"{name}: MB sent by the server", sent[side][0] / 1e6, note=f"{sent[side][1]} requests"),
        ]
    if "terrashard" in sides:
        ours = sent["terrashard"][0]
        rows.append(Row("terrashard: bytes sent ÷ bytes of the blocks needed", ours / needed, _EXCESS, at_most=True))
        rows.append(Row("terrashard: |stated effort ÷ bytes sent − 1|", abs(told / ours - 1), _EFFORT, at_most=True))
        rows += [
            Row(f"seconds ÷ those of odc-stac, {side}", walls["terrashard"] / walls[side], _RATIO, at_most=True)
            for side in sides
            if side != "terrashard"
        ]
    return 0 if publish("small-region", rows, full=asked.full) else 1


def stated_effort(terrashard: str, url: str, options: list[str]) -> int:
    """Bytes to read that `terrashard plan` states."""
    command = [terrashard, "plan", url, *options, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    plan: dict[str, Any] = json.loads(done.stdout)
    return sum(int(facts["bytes_to_read"]) for facts in plan["facts"].values())


if __name__ == "__main__":
    sys.exit(main())
