"""`make_scene` writes a small scene for tests: GeoTIFF files with given pixels, and the `Scene` that names them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio

from ingest.plan.probe import AssetProbe, SceneProbe
from ingest.raster.access import open_asset
from ingest.raster.header import grid_of
from ingest.scenes.scene import AssetRef, Scene
from zarr_store.errors import AssetUnreadable
from zarr_store.grid import Grid

__all__ = ["make_scene", "probe_headers", "write_raster"]

_CLASS_LAYERS = ("scl",)


def write_raster(
    path: Path, grid: Grid, pixels: npt.NDArray[np.generic], *, nodata: float | None = 0, **profile: Any
) -> Path:
    """Write one band as a tiled, deflated GeoTIFF; `profile` overrides these settings."""
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = {
        "driver": "GTiff",
        "height": grid.height,
        "width": grid.width,
        "count": 1,
        "dtype": pixels.dtype,
        "crs": grid.crs,
        "transform": grid.affine,
        "nodata": nodata,
        "tiled": True,
        "blockxsize": 64,
        "blockysize": 64,
        "compress": "deflate",
        **profile,
    }
    with rasterio.open(path, "w", **settings) as dataset:
        dataset.write(pixels, 1)
    return path


def make_scene(
    folder: Path,
    item_id: str,
    grid: Grid,
    pixels: Mapping[str, npt.NDArray[np.generic]],
    *,
    grids: Mapping[str, Grid] | None = None,
    datetime: str = "2023-08-10T10:00:00Z",
    collection: str = "sentinel-2-l2a",
    product: str = "sentinel-2-l2a",
    lacking: Sequence[str] = (),
    **fields: Any,
) -> Scene:
    """Write the files of a scene and describe it.

    Args:
        folder: Folder of the files, which are called `folder/item_id/BAND.tif`.
        item_id: Item id.
        grid: Grid of the bands.
        pixels: Array (height, width) of each band.
        grids: Grids of bands that have one of their own.
        datetime: Acquisition time.
        collection: Collection id.
        product: Product rule.
        lacking: Bands that the item does not have.
        **fields: Further fields of `Scene`, e.g. dn_offset, baseline, cloud_cover.
    """
    west, south, east, north = grid.lonlat_bounds()
    radar = product == "sentinel-1-rtc"
    assets = {}
    for band, values in pixels.items():
        on = (grids or {}).get(band, grid)
        nodata = -32768.0 if radar else 0.0
        path = write_raster(folder / item_id / f"{band}.tif", on, values, nodata=nodata)
        assets[band] = AssetRef(
            band=band,
            key=band,
            href=str(path),
            grid=on,
            dtype=str(values.dtype),
            nodata=nodata,
            kind="class" if band in _CLASS_LAYERS else "data",
        )
    ring = [[west, south], [east, south], [east, north], [west, north], [west, south]]
    return Scene(
        id=item_id,
        collection=collection,
        provider="terrashard",
        datetime=datetime,
        assets=assets,
        lacking=tuple(lacking),
        footprint={"type": "Polygon", "coordinates": [ring]},
        bbox=(west, south, east, north),
        product=product,
        **fields,
    )


def probe_headers(scenes: Sequence[Scene]) -> dict[str, SceneProbe]:
    """Probe the file headers only, without measuring the offset in the pixels: the offset of the metadata is used."""
    return {
        scene.id: SceneProbe(
            assets={band: _header(scene.id, asset) for band, asset in scene.assets.items()},
            dn_offset=scene.dn_offset,
            verdict="unchecked",
        )
        for scene in scenes
    }


def _header(item_id: str, asset: AssetRef) -> AssetProbe:
    try:
        with open_asset(asset.href, scene=item_id, asset=asset.key) as dataset:
            return AssetProbe(grid=grid_of(dataset), dtype=str(dataset.dtypes[0]), nodata=dataset.nodata)
    except AssetUnreadable as error:
        return AssetProbe(error=error.reason)
