"""The lazy view: every scene of a plan on the cube's grid as one stackstac array, for looking and exploring.

stackstac is kept on a leash: each asset's projection comes from its file header, the grid is pinned, scaling is off,
and pixels go through `SceneReader`, so they are those that an ingest stores. Nothing is mosaicked or masked here: the
time axis has one entry per scene.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import stackstac
import xarray as xr
from rasterio.enums import Resampling

from ingest.plan.plan import Plan
from ingest.plan.target import transform_box
from ingest.plan.task import PlannedScene, SourceAsset
from ingest.raster.read import NODATA, Access, SceneReader
from zarr_store.errors import InvalidInput, UnknownName
from zarr_store.grid import Grid

__all__ = ["stack"]


def stack(
    plan: Plan, collection: str | None = None, *, chunk: int = 1024, access: Access | None = None
) -> xr.DataArray:
    """Scenes of one collection as a lazy array.

    Args:
        plan: Scenes, headers and grid.
        collection: One of the plan; None for its only one.
        chunk: Side of a Dask chunk, pixels.
        access: Limits and retries.

    Returns:
        (time, band, y, x) in the cube's dtype, harmonised, nodata 0 (NaN for backscatter); one time per scene in the
        order of the item table, with the item id as coordinate `id`. Class layers follow the data bands.

    Raises:
        InvalidInput: The grid's CRS has no EPSG code, which stackstac needs.
    """
    names = [recipe.spec.collection for recipe in plan.recipes]
    if collection is None and len(names) > 1:
        raise InvalidInput(f"the plan has several collections, say which to stack: {', '.join(names)}")
    name = collection or names[0]
    if name not in names:
        raise UnknownName.of("collection", name, names, "the plan")
    recipe, grid = plan.recipe(name), plan.grid
    if grid.epsg is None:
        raise InvalidInput("stackstac needs a grid whose CRS has an EPSG code; plan with --crs EPSG:…")
    scenes = {scene.item: scene for task in plan.tasks if task.collection == name for scene in task.sources}
    bands = (*recipe.spec.band_names, *recipe.classes)
    rows = plan.items[name]
    items = [_item(scenes[row], rows[row]["datetime"], grid) for row in sorted(scenes)]
    table = {asset.href: asset for scene in scenes.values() for asset in scene.assets}
    array: xr.DataArray = stackstac.stack(
        items,
        assets=list(bands),
        epsg=grid.epsg,
        resolution=grid.resolution,
        bounds=grid.bounds,
        snap_bounds=False,
        resampling=Resampling.nearest,  # SceneReader picks the kernel of each asset
        chunksize=chunk,
        dtype=np.dtype(recipe.dtype),
        # its default lets every 404 become fill
        errors_as_nodata=(),
        fill_value=np.dtype(recipe.dtype).type(NODATA[recipe.dtype]),
        rescale=False,
        sortby_date=False,
        xy_coords="center",
        properties=False,
        band_coords=False,
        reader=partial(SceneReader, table=table, access=access),
    )
    if (array.sizes["y"], array.sizes["x"]) != grid.shape:
        raise InvalidInput(f"stackstac made a grid of {dict(array.sizes)} from {grid}; report this as a defect")
    return array.assign_coords(y=grid.y(), x=grid.x())


def _item(scene: PlannedScene, moment: str, grid: Grid) -> dict[str, Any]:
    """A STAC item as stackstac reads it, with the projection of every asset by its file header."""
    return {
        "type": "Feature",
        "id": scene.item_id,
        "properties": {"datetime": moment},
        "assets": {asset.band: _asset(scene, asset, grid) for asset in scene.assets},
    }


def _asset(scene: PlannedScene, asset: SourceAsset, grid: Grid) -> dict[str, Any]:
    header = asset.header or scene.extent
    if header.crs == grid.crs:
        a, b, c, d, e, f = header.transform
        shape, transform = list(header.shape), [a, b, c, d, e, f]
    else:
        # stackstac moves only the corners of a raster to the target and reads no window beyond them, although edges
        # are curved there; so it is given the box that holds the densified edges, one pixel wider
        left, bottom, right, top = transform_box(header, grid.crs)
        rx, ry = grid.resolution
        shape, transform = [1, 1], [right - left + 2 * rx, 0.0, left - rx, 0.0, bottom - top - 2 * ry, top + ry]
    return {"href": asset.href, "proj:epsg": grid.epsg, "proj:shape": shape, "proj:transform": transform}
