"""Small GeoTIFF scenes with their items, and the pixels that a plan of them gives, without a cluster or a cube."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
from pyproj import Transformer
from rasterio.transform import Affine

from ingest.plan.making import make_plan
from ingest.plan.plan import Plan
from ingest.request.config import IngestConfig
from ingest.run.shard import fill_shard

__all__ = ["cube_of", "land", "make_scene", "plan_of", "write_items", "write_tif"]


def land(height: int = 64, width: int = 64, seed: int = 0) -> npt.NDArray[np.uint16]:
    """Land of baseline 04.00 or later: no DN below 1000."""
    return np.random.default_rng(seed).integers(1200, 4000, (height, width)).astype(np.uint16)


def write_tif(
    path: Path,
    pixels: npt.NDArray[Any],
    *,
    crs: str = "EPSG:32633",
    corner: tuple[float, float] = (500_000.0, 5_100_000.0),
    size: tuple[float, float] = (10.0, 10.0),
) -> Path:
    """Write one band as GeoTIFF whose upper left corner is `corner`, with pixels of `size` (x, y)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    transform = Affine(size[0], 0, corner[0], 0, -size[1], corner[1])
    with rasterio.open(
        path, "w", driver="GTiff", height=pixels.shape[0], width=pixels.shape[1], count=1, dtype=pixels.dtype,
        crs=crs, transform=transform, nodata=0, tiled=True, blockxsize=64, blockysize=64,
    ) as file:  # fmt: skip
        file.write(pixels, 1)
    return path


def make_scene(
    item_id: str,
    assets: dict[str, Path],
    *,
    datetime: str = "2023-08-10T10:06:49Z",
    proj: bool = True,
    **properties: Any,
) -> dict[str, Any]:
    """Make the item of files by asset key; keyword arguments set properties ("__" stands for ":")."""
    first = next(iter(assets.values()))
    with rasterio.open(first) as file:
        box, crs = file.bounds, file.crs
    to_lonlat = Transformer.from_crs(crs, "EPSG:4326", always_xy=True)
    corners = ((box.left, box.top), (box.right, box.top), (box.right, box.bottom), (box.left, box.bottom))
    ring = [list(to_lonlat.transform(*corner)) for corner in corners]
    xs, ys = [point[0] for point in ring], [point[1] for point in ring]
    made: dict[str, Any] = {}
    for key, path in assets.items():
        made[key] = {"href": str(path), "type": "image/tiff; application=geotiff; profile=cloud-optimized"}
        with rasterio.open(path) as file:
            if proj and file.crs.to_epsg():
                made[key] |= {
                    "proj:epsg": file.crs.to_epsg(),
                    "proj:shape": list(file.shape),
                    "proj:transform": list(file.transform)[:6],
                }
    return {
        "type": "Feature",
        "stac_version": "1.0.0",
        "id": item_id,
        "collection": "sentinel-2-l2a",
        "properties": {
            "datetime": datetime,
            "platform": "sentinel-2a",
            "s2:processing_baseline": "05.09",
            "sat:relative_orbit": 122,
            "s2:mgrs_tile": "33TWM",
            "s2:datatake_id": "GS2A_20230810T100649_042547_N05.09",
            **{name.replace("__", ":"): value for name, value in properties.items()},
        },
        "geometry": {"type": "Polygon", "coordinates": [[*ring, ring[0]]]},
        "bbox": [min(xs), min(ys), max(xs), max(ys)],
        "links": [],
        "assets": made,
    }


def write_items(folder: Path, *items: dict[str, Any], name: str = "items.json") -> Path:
    """Write items as an ItemCollection."""
    path = folder / name
    path.write_text(json.dumps({"type": "FeatureCollection", "features": list(items)}))
    return path


def plan_of(source: Path, **settings: Any) -> Plan:
    """Plan an ingest of blue without a mask, unless settings say otherwise."""
    return make_plan(str(source), IngestConfig(**{"bands": "blue", "mask": "none", **settings}))


def cube_of(plan: Plan) -> dict[str, npt.NDArray[Any]]:
    """All arrays of the one collection of a plan, as an ingest would store them."""
    recipe = plan.recipes[0]
    spec = recipe.spec
    whole = {array.name: np.full(spec.array_shape(array.name), array.fill, array.dtype) for array in spec.arrays()}
    for task in plan.tasks:
        for name, pixels in fill_shard(task, recipe).arrays.items():
            t, y, x = task.region.slices
            whole[name][(t, slice(None), y, x) if whole[name].ndim == 4 else (t, y, x)] = pixels
    return whole
