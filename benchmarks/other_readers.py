"""Readers of COGs that do only a part of an ingest, on the job of `small_region.py`: a small region over many dates.

lazycogs, async-geotiff and rasteret, each by its own documented way and in an environment of its own. LAZYCOGS_PYTHON,
ASYNC_GEOTIFF_PYTHON and RASTERET_PYTHON name their interpreters (Python 3.12 or later, with obstore and zarr too). One
that is not named is left out. Same files, same server, the same 50 ms before every answer; all write the pixels to a
Zarr array.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
from pathlib import Path

from harness import BANDS, OUT, Row, publish
from small_region import _LATENCY_S, _lonlat, make_world, needed_bytes, region, timed

_LAZYCOGS = """
import asyncio, sys
import lazycogs, rustac
from obstore.store import HTTPStore
url, out, left, bottom, right, top, *lonlat = sys.argv[1:]
box, lonlat = tuple(map(float, (left, bottom, right, top))), list(map(float, lonlat))
parquet = out + ".parquet"
async def search():
    await rustac.search_to(parquet, url, collections=["sentinel-2-l2a"], bbox=lonlat, limit=100)
asyncio.run(search())
server = url.partition("//")[0] + "//" + url.partition("//")[2].partition("/")[0]
store = HTTPStore.from_url(server, client_options={"allow_http": True})
data = lazycogs.open(parquet, bbox=box, crs="EPSG:32633", resolution=10.0, bands=["blue", "green", "red", "nir"],
                     store=store, path_from_href=lambda href: href.partition(server + "/")[2])
data = data.load()
assert data.shape[1:] in ((4, 256, 256), (len(data.time), 256, 256)) or data.size == len(data.time) * 4 * 256 * 256
assert int((data.values > 0).sum()) == data.size, "pixels are missing"
import zarr
zarr.save_array(out, data.values)
"""
_ASYNC_GEOTIFF = """
import asyncio, json, sys, urllib.request
import numpy as np, zarr
from async_geotiff import GeoTIFF, Window
from obstore.store import HTTPStore
url, out, left, bottom, right, top, *_ = sys.argv[1:]
asked = json.dumps({"collections": ["sentinel-2-l2a"], "limit": 100}).encode()
question = urllib.request.Request(url.rstrip("/") + "/search", asked, {"Content-Type": "application/json"})
with urllib.request.urlopen(question) as answer:
    items = json.load(answer)["features"]
server = url.partition("//")[0] + "//" + url.partition("//")[2].partition("/")[0]
store = HTTPStore.from_url(server, client_options={"allow_http": True})
async def read(href):
    tiff = await GeoTIFF.open(href.partition(server + "/")[2], store=store)
    col, row = (float(left) - tiff.transform.c) / 10, (tiff.transform.f - float(top)) / 10
    return (await tiff.read(window=Window(round(col), round(row), 256, 256))).data[0]
async def main():
    hrefs = [item["assets"][band]["href"] for item in items for band in ("blue", "green", "red", "nir")]
    return np.stack(await asyncio.gather(*map(read, hrefs)))
pixels = asyncio.run(main())
assert pixels.shape[0] == len(items) * 4 and (pixels > 0).all()
zarr.save_array(out, pixels)
"""

_RASTERET = """
import sys
import numpy as np, rasteret, zarr
from obstore.store import HTTPStore
from rasteret.cloud import ObstoreBackend
url, out, left, bottom, right, top, *lonlat = sys.argv[1:]
box, bands = tuple(map(float, lonlat)), ["blue", "green", "red", "nir"]
server = url.partition("//")[0] + "//" + url.partition("//")[2].partition("/")[0] + "/"
backend = ObstoreBackend(HTTPStore.from_url(server, client_options={"allow_http": True}), server)
found = rasteret.build_from_stac(
    name="region", stac_api=url, collection="sentinel-2-l2a", data_source="local", bbox=box, backend=backend,
    date_range=("2022-01-01", "2023-12-31"), band_map={band: band for band in bands}, workspace_dir=out + ".index",
    force=True)
data = found.get_xarray(geometries=box, bands=bands, all_touched=True, progress=False, backend=backend)
pixels = np.stack([data[band].values for band in bands], axis=1)
assert pixels.shape[-1] >= 256 and (pixels > 0).mean() > 0.9, "pixels are missing"
zarr.save_array(out, pixels)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="60 dates; else 12")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side, in turns; the median counts")
    asked = parser.parse_args()
    from ingest.simulate.server import serve

    OUT.mkdir(exist_ok=True)
    dates = 60 if asked.full else 12
    root = make_world(dates)
    left, bottom, right, top = region()
    inner = _lonlat((left + 15, bottom + 15, right - 15, top - 15))
    named = {
        "lazycogs": ("LAZYCOGS_PYTHON", _LAZYCOGS),
        "async-geotiff": ("ASYNC_GEOTIFF_PYTHON", _ASYNC_GEOTIFF),
        "rasteret": ("RASTERET_PYTHON", _RASTERET),
    }
    options = ["--collection", "sentinel-2-l2a", "--bands", ",".join(BANDS), "--mask", "none"]
    terrashard = str(Path(sys.executable).parent / "terrashard")
    took: dict[str, list[tuple[float, float]]] = {}
    sent: dict[str, tuple[int, int]] = {}
    with serve(root, latency_s=_LATENCY_S) as server:
        ours = [terrashard, "ingest", server.stac_url, str(OUT / "other.zarr"), *options]
        commands = {"terrashard": [*ours, f"--bbox={','.join(map(str, inner))}"]}
        for name, (variable, script) in named.items():
            if variable not in os.environ:
                print(f"{name} is left out: {variable} names no interpreter")
                continue
            places = [*map(str, (left, bottom, right, top)), *map(str, inner)]
            commands[name] = [os.environ[variable], "-c", script, server.stac_url, str(OUT / "other.zarr"), *places]
        for _ in range(asked.repeats):
            for name, command in commands.items():
                shutil.rmtree(OUT / "other.zarr", ignore_errors=True)
                server.reset_counters()
                took.setdefault(name, []).append(timed(command))
                files = [n for path, n in server.requests.items() if path.startswith("/files/")]
                sent[name] = (server.bytes_sent, sum(files))
                print(f"  {name:14} {took[name][-1][0]:6.2f} s, {sent[name][0] / 1e6:.0f} MB", flush=True)
    needed = needed_bytes(root, dates)
    walls = {name: statistics.median(w for w, _ in runs) for name, runs in took.items()}
    cpus = {name: statistics.median(c for _, c in runs) for name, runs in took.items()}
    rows = []
    for name in took:
        note = f"{sent[name][1]} requests, {cpus[name]:.1f} s of processors"
        rows += [
            Row(f"{name}: seconds in all", walls[name], note=note),
            Row(f"{name}: bytes sent ÷ bytes of the blocks needed", sent[name][0] / needed),
        ]
        if name != "terrashard":
            rows.append(Row(f"times as fast as {name}", walls[name] / walls["terrashard"], 1.0))
    return 0 if publish("other-readers", rows, full=asked.full) else 1


if __name__ == "__main__":
    sys.exit(main())
