"""The other ways from the same COGs to a Zarr store: plain decode and encode, odc-stac and stackstac."""

from __future__ import annotations

import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from harness import BANDS, OUT

LAYERS = (*BANDS, "scl")
Files = list[tuple[str, str]]


def copy_part(task: tuple[str, Files, tuple[int, int], int]) -> None:
    """Decode one window of the bands of one scene, and encode it once in chunks as the cube's; nothing else."""
    import rasterio
    import tensorstore as ts
    from rasterio.windows import Window

    target, files, (row, col), side = task
    main = np.empty((1, len(files), side, side), np.uint16)
    for number, (_, path) in enumerate(files):
        with rasterio.open(path) as source:
            source.read(1, window=Window(col, row, side, side), out=main[0, number])
    blosc = {"cname": "zstd", "clevel": 1, "shuffle": "bitshuffle", "typesize": 2, "blocksize": 0}
    inner = [
        {"name": "bytes", "configuration": {"endian": "little"}},
        {"name": "blosc", "configuration": blosc},
        {"name": "crc32c"},
    ]
    shape = {"chunk_shape": [1, len(files), 256, 256], "codecs": inner}
    metadata = {
        "shape": list(main.shape),
        "data_type": "uint16",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(main.shape)}},
        "codecs": [{"name": "sharding_indexed", "configuration": shape}],
    }
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": target}, "metadata": metadata}
    ts.open(spec, create=True, delete_existing=True).result().write(main).result()


def run_limit(pool: ProcessPoolExecutor, plan: Any) -> None:
    """Every window of every scene on all processes of `pool`, which are running already."""
    folder = OUT / "limit"
    shutil.rmtree(folder, ignore_errors=True)
    side = min(2048, plan.grid.height)
    scenes = {scene.item_id: scene for task in plan.tasks for scene in task.sources}
    files = {name: [(a.band, a.href) for a in scene.assets if a.band in BANDS] for name, scene in scenes.items()}
    tasks = [
        (str(folder / f"{name}-{row}-{col}"), files[name], (row, col), side)
        for name in scenes
        for row in range(0, plan.grid.height, side)
        for col in range(0, plan.grid.width, side)
    ]  # fmt: skip
    list(pool.map(copy_part, tasks))


def stac_items(plan: Any) -> list[dict[str, Any]]:
    """The plan's scenes as items that both peers understand: projection fields of v1 and of v2 on every asset."""
    rows = plan.items[plan.specs[0].collection]
    items: dict[str, dict[str, Any]] = {}
    for task in plan.tasks:
        for scene in task.sources:
            west, south, east, north = scene.extent.lonlat_bounds()
            ring = [[west, south], [east, south], [east, north], [west, north], [west, south]]
            assets = {
                a.band: {
                    "href": a.href,
                    "type": "image/tiff; application=geotiff; profile=cloud-optimized",
                    "roles": ["data"],
                    "proj:shape": list(a.header.shape),
                    "proj:transform": list(a.header.transform),
                    "proj:epsg": plan.grid.epsg,
                }
                for a in scene.assets
            }
            items[scene.item_id] = {
                "type": "Feature",
                "stac_version": "1.0.0",
                "stac_extensions": ["https://stac-extensions.github.io/projection/v1.1.0/schema.json"],
                "id": scene.item_id,
                "collection": "sentinel-2-l2a",
                "bbox": [west, south, east, north],
                "geometry": {"type": "Polygon", "coordinates": [ring]},
                "properties": {"datetime": rows[scene.item]["datetime"], "proj:epsg": plan.grid.epsg},
                "assets": assets,
                "links": [],
            }
    return list(items.values())


def run_odc(plan: Any, layers: tuple[str, ...]) -> None:
    """`odc.stac.load` in chunks of 2048² and `to_zarr`, on the cluster whose client is the current one."""
    import odc.stac
    import pystac

    target = OUT / "odc.zarr"
    shutil.rmtree(target, ignore_errors=True)
    loaded = odc.stac.load(
        [pystac.Item.from_dict(item) for item in stac_items(plan)],
        bands=list(layers),
        crs=f"EPSG:{plan.grid.epsg}",
        resolution=plan.grid.resolution[0],
        chunks={"x": 2048, "y": 2048},
        groupby="solar_day",
        stac_cfg={"sentinel-2-l2a": {"assets": {"*": {"data_type": "uint16", "nodata": 0}}}},
    )
    loaded.to_zarr(target, mode="w")


def run_stackstac(plan: Any, layers: tuple[str, ...]) -> None:
    """`stackstac.stack` on the cube's grid in chunks of 2048² and `to_zarr`, on the current client's cluster."""
    import stackstac

    target: Path = OUT / "stackstac.zarr"
    shutil.rmtree(target, ignore_errors=True)
    stack = stackstac.stack(
        stac_items(plan),
        assets=list(layers),
        epsg=plan.grid.epsg,
        resolution=plan.grid.resolution[0],
        bounds=plan.grid.bounds,
        snap_bounds=False,
        chunksize=2048,
        dtype=np.dtype("uint16"),
        fill_value=np.uint16(0),
        rescale=False,
        properties=False,
        band_coords=False,
    )
    stack.data.to_zarr(str(target))
