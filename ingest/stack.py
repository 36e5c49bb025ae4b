"""`open_stack` gives every scene of a plan on the cube's grid as one lazy stackstac array, for exploring.

stackstac decides little: the projection of each asset comes from its file header, the grid is fixed, scaling is off,
and `SceneReader` reads the pixels, so they are those that an ingest stores. Nothing is mosaicked or masked here: the
time axis has one entry per scene.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Unpack

import numpy as np
import stackstac
import xarray as xr
from rasterio.enums import Resampling

from ingest.journey import make_plan
from ingest.plan.overviews import overview_of
from ingest.plan.plan import Plan
from ingest.plan.stored import check_hrefs
from ingest.plan.target import transform_box
from ingest.plan.task import PlannedScene, Recipe, SourceAsset
from ingest.raster.access import forbid_gdal_threads
from ingest.raster.coarse import read_coarse
from ingest.raster.limits import Access
from ingest.raster.read import NODATA, Pixels, SceneReader, read_on_grid
from ingest.request.config import IngestConfig
from ingest.request.settings import PlanSettings, make_config, spell_out, trust_of
from ingest.scenes.scene import Scene
from ingest.scenes.scene_list import Scenes
from zarr_store.errors import InvalidInput, UnknownName
from zarr_store.grid import Grid

__all__ = ["open_stack", "stack"]


@spell_out(PlanSettings)
def open_stack(
    source: str | os.PathLike[str] | Scenes | Sequence[Scene] | Plan,
    config: IngestConfig | None = None,
    *,
    collection: str | None = None,
    chunk: int = 1024,
    overviews: bool = False,
    found_in: str | os.PathLike[str] | None = None,
    **settings: Unpack[PlanSettings],
) -> xr.DataArray:
    """Open scenes as one lazy array, on the grid that an ingest would choose and with its checked reading.

    Nothing is stored, mosaicked or masked: the time axis has one entry for each scene. A file that cannot be read
    raises an error and never becomes zeros.

    Args:
        source: As for `make_plan`, or a plan.
        config: The settings; None for the defaults.
        collection: The collection to open, where the plan has several.
        chunk: Side of a Dask block in pixels; each block is read as one.
        overviews: Read a file's overviews where the grid is coarser than the file. This is quick, but differs from what
            a cube of that resolution would hold.
        found_in: The source of scenes that are given as a plain list.
        **settings: Fields of `IngestConfig`; for a plan, only those for trust.

    Returns:
        Array (time, band, y, x) of harmonised stored values; 0, or NaN for backscatter, where there is no data. The
        coordinates `id` and `cloud` (share of clouds over the region) lie along time. Each band is read alone, so a
        number that a provider clipped is 0 here too, where the cube has 1.

    Raises:
        NothingFound: No scene matches, or none lies in the region.
        InvalidInput: A setting cannot be used, or the grid's CRS has no EPSG code.
        AssetUnreadable: A pixel that is computed cannot be read.

    Example:
        >>> import ingest
        >>> lazy = ingest.open_stack("world/catalog.json", collections=["sentinel-2-l2a"], bands=["red", "nir"])
        >>> lazy.dims, lazy.shape, lazy.band.values.tolist()
        (('time', 'band', 'y', 'x'), (2, 3, 64, 64), ['red', 'nir', 'scl'])
        >>> darkest = lazy.sel(band="red").min("time").compute()
    """
    forbid_gdal_threads()
    plan = source if isinstance(source, Plan) else make_plan(source, config, found_in=found_in, **settings)
    if plan.origin is None:  # read from a file or a cube, so the source that it names is not trusted
        asked = make_config(config, settings)
        check_hrefs(plan, asked)
        access = Access.of(asked)
    else:
        asked = make_config(make_config(None, trust_of(plan.origin.config)), settings)
        access = Access.of(asked, plan.origin.typed)
    return stack(plan, collection, chunk=chunk, access=access, overviews=overviews)


def stack(
    plan: Plan,
    collection: str | None = None,
    *,
    chunk: int = 1024,
    access: Access | None = None,
    overviews: bool = False,
) -> xr.DataArray:
    """Stack the scenes of one collection as a lazy array.

    Args:
        plan: The plan, which has scenes, headers and the grid.
        collection: A collection of the plan; None for its only one.
        chunk: Side of a Dask chunk in pixels.
        access: Limits and retries.
        overviews: Read a file's overviews where the grid is coarser; quick, but not what a cube would hold.

    Returns:
        Array (time, band, y, x) of harmonised values in the cube's dtype, nodata 0 (NaN for backscatter). It has one
        time per scene in the order of the item table, the item id as coordinate `id` and the share of clouds as
        `cloud`. Class layers follow the data bands.

    Raises:
        InvalidInput: The grid's CRS has no EPSG code, which stackstac needs.
    """
    names = [recipe.spec.collection for recipe in plan.recipes]
    if collection is None and len(names) > 1:
        raise InvalidInput(f"the plan has the collections {', '.join(names)}; choose one with collection=NAME")
    name = collection or names[0]
    if name not in names:
        raise UnknownName.of("collection", name, names, "the plan")
    recipe = plan.recipe(name)
    grid = recipe.spec.grid
    if grid.epsg is None:
        raise InvalidInput(
            f"stackstac needs a CRS with an EPSG code, and the grid has {grid.crs[:80]!r}; plan with crs='EPSG:…'"
        )
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
        # by default stackstac turns a 404 into fill values
        errors_as_nodata=(),
        fill_value=np.dtype(recipe.dtype).type(NODATA[recipe.dtype]),
        rescale=False,
        sortby_date=False,
        xy_coords="center",
        properties=False,
        band_coords=False,
        reader=partial(
            SceneReader,
            table=table,
            access=access,
            read_asset=read_coarse if overviews else partial(_read_as_ingest, recipe=recipe),
        ),
    )
    if (array.sizes["y"], array.sizes["x"]) != grid.shape:
        raise InvalidInput(f"stackstac made a grid of {dict(array.sizes)} from {grid}; please report this as a defect")
    clouds = [_cloud_share(rows[row]) for row in sorted(scenes)]
    return array.assign_coords(y=grid.y(), x=grid.x(), cloud=("time", clouds))


def _read_as_ingest(
    asset: Any, header: Grid | None, target: Grid, resampling: str, *, recipe: Recipe, **how: Any
) -> Pixels:
    """Read one band of one scene by the rules of a plan, which may be those of an earlier release."""
    planned = isinstance(asset, SourceAsset)
    return read_on_grid(
        asset, header, target, resampling, exact_edges=recipe.exact_edges, exact_means=recipe.exact_means,
        overview=overview_of(asset, recipe) if planned else None, **how,
    )  # fmt: skip


def _cloud_share(row: Mapping[str, Any]) -> float:
    """Get the share of clouds over the region where it was counted, else that of the whole tile; NaN for neither."""
    if row.get("cloud_share") is not None:
        return float(row["cloud_share"])
    return float("nan") if row.get("cloud_cover") is None else float(row["cloud_cover"]) / 100.0


def _item(scene: PlannedScene, moment: str, grid: Grid) -> dict[str, Any]:
    """Make a STAC item for stackstac, with the projection of each asset from its file header."""
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
        # stackstac reprojects only the corners of a raster and reads no window beyond them, although edges are curved
        # there; so it gets the box around the densified edges, one pixel wider
        left, bottom, right, top = transform_box(header, grid.crs)
        rx, ry = grid.resolution
        shape, transform = [1, 1], [right - left + 2 * rx, 0.0, left - rx, 0.0, bottom - top - 2 * ry, top + ry]
    return {"href": asset.href, "proj:epsg": grid.epsg, "proj:shape": shape, "proj:transform": transform}
