"""Read one asset on a much coarser grid from the overviews of its file: fast, for pictures and never for a cube.

A cube's pixels come from all pixels of a file (`ingest.raster.read`). Here the provider's overviews are trusted, so
that a picture of a whole tile costs a few hundred kilobytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rasterio.windows import Window

from ingest.raster.access import with_asset
from ingest.raster.gdal_read import read_window
from ingest.raster.header import grid_of
from ingest.raster.limits import Access
from ingest.raster.ranges import find_range_file
from ingest.raster.read import NODATA, Pixels, ReadableAsset, Stored, check_type, read_on_grid, values_of
from ingest.raster.resample import pick_resampling, place, scale_ratio
from ingest.raster.values import Stated
from ingest.trust.redact import redact_url
from zarr_store.errors import AssetUnreadable
from zarr_store.grid import Grid

if TYPE_CHECKING:
    from rasterio.io import DatasetReader

__all__ = ["read_coarse"]


def read_coarse(
    asset: ReadableAsset,
    header: Grid | None,
    target: Grid,
    resampling: str,
    *,
    stored: Stored = "uint16",
    scene: str = "",
    access: Access | None = None,
) -> Pixels:
    """Read one band of one scene onto `target` from the coarsest overview that is at least as fine.

    Arguments, result and errors are those of `read_on_grid`, which reads a file that has no such overview.
    """

    def use(dataset: DatasetReader) -> Pixels | None:
        grid = grid_of(dataset)
        if header is not None and grid != header:
            reason = f"the file is not the one that was planned: its grid was {header}, now it is {grid}"
            raise AssetUnreadable.of(scene, asset.key, reason, redact_url(asset.href))
        check_type(str(dataset.dtypes[0]), stored, scene, asset)
        ratio = scale_ratio(grid, target)
        factors = [factor for factor in dataset.overviews(1) if factor <= ratio * 1.001]
        # overviews of JPEG 2000 are averages, and classes have no average
        if not factors or (asset.kind == "class" and dataset.driver != "GTiff"):
            return None
        factor = int(max(factors))
        coarse = grid.coarsen(factor)
        empty = {float(value) for value in (asset.nodata, dataset.nodata) if value is not None}
        values = values_of(Stated.of(dataset), stored, asset)
        file = find_range_file(dataset)

        def window(row: int, col: int, height: int, width: int, into: Pixels | None = None) -> Pixels:
            top, left = row * factor, col * factor
            cut = Window(
                left, top, min(width * factor, grid.width - left), min(height * factor, grid.height - top)
            )  # fmt: skip
            raw = read_window(dataset, window=cut, out_shape=(height, width))
            if file is not None:
                file.forget()
            return values.store(raw, stored, empty)

        kernel = pick_resampling(asset.kind, coarse, target, resampling)
        return place(window, coarse, target, kernel, dtype=stored, nodata=NODATA[stored])

    pixels = with_asset(asset.href, use, scene=scene, asset=asset.key, access=access)
    if pixels is None:
        return read_on_grid(asset, header, target, resampling, stored=stored, scene=scene, access=access)
    return pixels
