"""Planning up to 100,000 items over 1,000 tiles and five years, and the ledger of a million shards. No pixel is read.

Items are made up: 40 × 25 tiles of 100 km in ten UTM zones, 100 dates each, four bands, put into monthly composites of
20 m in EPSG:3035. Headers are in memory, so what is measured is terrashard: items to scenes, copies, grid, sources of
each shard, keys, digest; then the plan file, written and read. Each size runs in a process of its own, whose largest
memory is that of the size. `--part ledger` writes a row for each of a million shards (100,000 without `--full`), asks
for their states, as `terrashard status` does, before and after a run has left them, and opens a cube of all items.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from harness import BANDS, OUT, Row, arguments, publish

HERE = Path(__file__).resolve()
TILES = {1_000: (5, 2), 3_000: (6, 5), 10_000: (10, 10), 100_000: (40, 25)}
"""Number of items → tiles from west to east and from south to north."""
DATES = 100
_COLUMNS = 4
"""Tiles of 100 km from west to east in one UTM zone."""


def settings() -> Any:
    from ingest.request.config import IngestConfig

    return IngestConfig(
        collections=("sentinel-2-l2a",), bands=BANDS, mask="none", group="month", crs="EPSG:3035", resolution=20.0
    )


def items(wide: int, tall: int) -> Iterator[tuple[dict[str, Any], Any]]:
    """Each item as a catalogue would list it, and what the headers of its files say."""
    from ingest.plan.probe import AssetProbe, SceneProbe
    from zarr_store.grid import Grid

    first = dt.datetime(2019, 1, 2, 10, 0, 31, tzinfo=dt.UTC)
    for number in range(wide * tall):
        row, column = divmod(number, wide)
        zone = 28 + column // _COLUMNS
        left, top = 300_000.0 + column % _COLUMNS * 100_000.0, 4_600_020.0 + row * 100_000.0
        grid = Grid(f"EPSG:{32600 + zone}", (10.0, 0.0, left, 0.0, -10.0, top), (10_980, 10_980))
        west, south, east, north = grid.lonlat_bounds()
        corners = [[west, south], [east, south], [east, north], [west, north], [west, south]]
        tile = f"{zone}T{chr(65 + column % _COLUMNS)}{chr(65 + row)}"
        header = AssetProbe(grid=grid, dtype="uint16", nodata=0.0, overviews=(2, 4), block=(512, 512))
        for day in range(DATES):
            # five years; neighbouring columns are seen on other days
            moment = first + dt.timedelta(days=day * 18.25 + column % 9, seconds=row)
            name = f"S2A_{tile}_{moment:%Y%m%d}_0_L2A"
            yield {
                "type": "Feature", "stac_version": "1.0.0", "id": name, "collection": "sentinel-2-l2a",
                "stac_extensions": ["https://stac-extensions.github.io/projection/v2.0.0/schema.json"],
                "geometry": {"type": "Polygon", "coordinates": [corners]}, "bbox": [west, south, east, north],
                "properties": {
                    "datetime": moment.strftime("%Y-%m-%dT%H:%M:%SZ"), "proj:code": grid.crs, "platform": "sentinel-2a",
                    "s2:processing_baseline": "05.09", "earthsearch:boa_offset_applied": True, "s2:mgrs_tile": tile,
                    "eo:cloud_cover": float(number * 7919 % 100), "proj:shape": [10_980, 10_980],
                    "proj:transform": list(grid.transform),
                },
                "links": [],
                "assets": {
                    band: {
                        "href": f"https://files.invalid/{name}/{band}.tif", "roles": ["data"],
                        "type": "image/tiff; application=geotiff; profile=cloud-optimized",
                        "eo:bands": [{"common_name": band}],
                    }
                    for band in BANDS
                },
            }, SceneProbe(dict.fromkeys(BANDS, header), 0, "confirmed")  # fmt: skip


def plan(count: int, file: Path) -> dict[str, Any]:
    """Plan so many items and keep the plan in a file: seconds of each stage of this process, and its largest memory."""
    from ingest.plan.making import plan_scenes
    from ingest.plan.plan import Plan
    from ingest.scenes.dedupe import dedupe
    from ingest.scenes.harmonise import harmonise

    config, clock, seconds = settings(), time.process_time(), {}

    def lap(stage: str) -> None:
        nonlocal clock
        seconds[stage], clock = time.process_time() - clock, time.process_time()

    scenes, probes = [], {}
    for item, probe in items(*TILES[count]):
        scene = harmonise(item, base="https://files.invalid/items.json", config=config)
        scenes.append(scene)
        probes[scene.key] = probe
    lap("scenes")
    scenes, copies = dedupe(scenes)
    assert (len(scenes), copies) == (count, []), "the items are no copies of one another"
    lap("copies")
    made = plan_scenes(scenes, probes, config)
    lap("plan")
    made.save(file)
    lap("write")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    shards, digest, summary = len(made.tasks), made.digest, made.summary().splitlines()
    del made, scenes, probes
    clock = time.process_time()
    assert Plan.load(file).digest == digest
    lap("read")
    return {
        "items": count, "shards": shards, "seconds": seconds, "peak_bytes": peak, "file_bytes": file.stat().st_size,
        "read_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "summary": summary,
    }  # fmt: skip


def make_cube(url: Path, shards: int, count: int) -> None:
    """A cube of so many shards without pixels, and a row of the ledger for each: four chunks of four bands."""
    from zarr_store.chunk_stats import ChunkStats
    from zarr_store.create import create_cube
    from zarr_store.grid import Grid
    from zarr_store.ledger import LedgerRow, SourceOutcome
    from zarr_store.spec import BandSpec, CubeSpec, Layout, item_type_for

    times = 100
    side = round((shards / times) ** 0.5)
    layout = Layout("train", (1, 256, 256), (1, 512, 512))
    grid = Grid("EPSG:32633", (10.0, 0.0, 0.0, 0.0, -10.0, 5_000_000.0), (side * 512, side * 512))
    stamps = tuple(f"{2019 + t // 12}-{t % 12 + 1:02}-01T10:00:00" for t in range(times))
    spec = CubeSpec(
        "s2", "reflectance", tuple(BandSpec(b) for b in BANDS), grid, stamps, ("scl",), layout,
        item_type=item_type_for(count),
    )  # fmt: skip
    table = [
        {"id": f"S2A_{n}", "datetime": f"{stamps[n % times]}Z", "provider": "earth-search", "platform": "sentinel-2a",
         "step": n % times, "bbox": [10.0, 45.0, 11.0, 46.0], "dn_offset": 0, "tile": "33TWM", "cloud_cover": 10.0}
        for n in range(count)
    ]  # fmt: skip
    verdicts = {
        row["id"]: {"verdict": "confirmed", "dn_offset": 0, "evidence": "the item", "witnesses": []} for row in table
    }
    create_cube(url, [spec], items={"s2": table}, provenance={"collections": {"s2": {"offset_verdicts": verdicts}}})
    folder = url / "_terrashard" / "ledger" / "s2"
    folder.mkdir(parents=True, exist_ok=True)
    stats = ChunkStats(65_536, 0, 0, (1000.0,) * 4, (1e9,) * 4, {"scl": {4: 65_536}})
    row = LedgerRow((0, 0, 0), spec.shard_at((0, 0, 0)), "0" * 32, "done",  # type: ignore[arg-type]
                    (SourceOutcome(0, "S2A_0", "read"),), {"reflectance": "0" * 64}, (stats,) * 4)  # fmt: skip
    text = row.to_json().decode()
    for index, region in spec.iterate_shards():  # as they are on disk, without waiting for the disk each time
        mine = text.replace('"index": [0, 0, 0]', f'"index": {list(index)}')
        mine = mine.replace(json.dumps(row.region.to_list()), json.dumps(region.to_list()))
        with open(folder / f"{index[0]}-{index[1]}-{index[2]}.json", "w") as file:
            file.write(mine)
    (url / "made").touch()


def _children_s() -> float:
    """Processor time of all processes that this one has started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def ledger(full: bool) -> list[Row]:
    from zarr_store.backends import open_store
    from zarr_store.read import open_cube
    from zarr_store.states import forget_states, keep_states, read_states

    shards, count = (1_000_000, 100_000) if full else (100_000, 10_000)
    url = OUT / f"scale-{shards}.zarr"
    if not (url / "made").exists():  # a million files are made once
        shutil.rmtree(url, ignore_errors=True)
        make_cube(url, shards, count)
    spec, store = open_cube(url).spec("s2"), open_store(url)
    forget_states(store, "s2")
    began = time.process_time()
    states = read_states(store, spec)
    by_rows = time.process_time() - began
    assert states.count()["done"] == spec.shard_count
    keep_states(store, states)
    kept = url / "_terrashard" / "states" / "s2.bin"
    opened, asked, typed, spent = [], [], [], []
    for _ in range(5):
        began = time.perf_counter()
        cube = open_cube(url)
        opened.append(time.perf_counter() - began)
        cube.spec("s2")
        began = time.perf_counter()
        assert cube.states("s2").count()["done"] == spec.shard_count
        asked.append(time.perf_counter() - began)
        began = time.perf_counter()
        command, before = [str(Path(sys.executable).with_name("terrashard")), "status", str(url)], _children_s()
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        typed.append(time.perf_counter() - began)
        spent.append(_children_s() - before)
        assert f"{spec.shard_count} done" in said, said
    rows = [
        Row(f"terrashard status of {shards:,} shards, s", sorted(typed)[2], 2.0, at_most=True, note="whole command"),
        Row("the same, s of processor", sorted(spent)[2]),
        Row("their states, s", sorted(asked)[2], note=f"from {kept.stat().st_size / 1e6:.1f} MB that a run leaves"),
        Row("their states from every row, s of processor", by_rows, note="while a run works, or was killed"),
        Row(f"open_cube of {count:,} items, s", sorted(opened)[2], 1.0, at_most=True),
    ]  # fmt: skip
    return rows


def planning(full: bool) -> list[Row]:
    OUT.mkdir(exist_ok=True)
    found = []
    for count in (1_000, 10_000, 100_000) if full else (1_000, 3_000, 10_000):
        file = OUT / f"scale-{count}.json"
        command = [sys.executable, str(HERE), "--one", str(count), "--file", str(file)]
        said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ).stdout
        found.append(json.loads(said))
        file.unlink()
        print("  " + json.dumps({k: v for k, v in found[-1].items() if k != "summary"}), flush=True)
    rows = []
    for one in found:
        seconds, name = one["seconds"], f"{one['items']:,} items"
        rows += [
            Row(f"{name}: planning, s of processor", seconds["plan"], note=f"{one['shards']:,} shards"),
            Row(f"{name}: items to scenes and copies, s", seconds["scenes"] + seconds["copies"]),
            Row(f"{name}: plan file written and read, s", seconds["write"] + seconds["read"]),
            Row(f"{name}: plan file, MB", one["file_bytes"] / 1e6),
            Row(f"{name}: plan file, bytes per shard", one["file_bytes"] / one["shards"]),
            Row(f"{name}: largest memory of planning, MB", one["peak_bytes"] / 1e6),
        ]  # fmt: skip
    small, large = found[-2], found[-1]
    base = found[0]
    sizes = {one["items"]: one["items"] + one["shards"] for one in found}
    # what the smallest size takes is mostly the imports
    stages: tuple[tuple[str, Callable[[dict[str, Any]], float]], ...] = (
        ("time of planning", lambda one: float(one["seconds"]["plan"])),
        ("memory", lambda one: float(one["peak_bytes"])),
    )
    for what, of in stages:
        grown = (of(large) - of(base)) / (of(small) - of(base))
        more = (sizes[large["items"]] - sizes[base["items"]]) / (sizes[small["items"]] - sizes[base["items"]])
        rows.append(
            Row(f"growth of {what} over that of items and shards", grown / more, 1.3, at_most=True,
                note=f"{small['items']:,} → {large['items']:,} items")
        )  # fmt: skip
    return rows


def main() -> int:
    if "--one" in sys.argv:
        parser = argparse.ArgumentParser()
        parser.add_argument("--one", type=int, choices=TILES)
        parser.add_argument("--file", type=Path)
        asked = parser.parse_args()
        print(json.dumps(plan(asked.one, asked.file)))
        return 0
    args = arguments(__doc__ or "", parts=("plan", "ledger"))
    good = True
    if args.part in (None, "plan"):
        good &= publish("scale-plan", planning(args.full), full=args.full)
    if args.part in (None, "ledger"):
        good &= publish("scale-ledger", ledger(args.full), full=args.full)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
