"""Filling one shard: sources in, arrays out. A pure function of its task, but for the reading itself.

Sources are read one after the other, so memory does not grow with their number, and a later source is read only where
no earlier one is clear. All bands and classes of a pixel come from one source, and `source_item` says which.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from pyproj import Transformer

from ingest.mask import halo_pixels, mask_classes, observed
from ingest.read import NODATA, Access, Pixels, harmonise_dn, read_on_grid
from ingest.sources import pixel_box
from ingest.task import PlannedScene, Recipe, ShardTask, SourceAsset
from zarr_store.errors import AssetUnreadable
from zarr_store.grid import Grid
from zarr_store.ledger import SourceOutcome
from zarr_store.spec import STATUS_MASKED, STATUS_MISSING, STATUS_NODATA, STATUS_OBSERVED

__all__ = ["AssetReader", "FilledShard", "fill_shard"]

AssetReader = Callable[[SourceAsset, Grid], Pixels]
"""An asset on a window of the cube's grid: raw numbers, as `read_on_grid` gives them."""


@dataclass(frozen=True)
class FilledShard:
    """Arrays of one shard and what became of its sources.

    Attributes:
        arrays: By name, in the form that `ShardWriter.write` takes.
        outcomes: One per source that was needed; a source that lies under clear ones everywhere is not read.
        pixels_read: Source pixels that were asked for, over all bands.
    """

    arrays: dict[str, Pixels]
    outcomes: tuple[SourceOutcome, ...]
    pixels_read: int


def fill_shard(
    task: ShardTask, recipe: Recipe, *, access: Access | None = None, reader: AssetReader | None = None
) -> FilledShard:
    """Read, mask and mosaic all sources of one shard.

    Per pixel the first source wins that sees it clear, else the first that sees it at all. Where none does and a
    source that could not be read would have covered it, the pixel is missing, which is not the same as no data.

    Args:
        task: What to fill, and from what.
        recipe: Bands, grid and mask of the collection.
        access: Limits and retries.
        reader: Reads one asset; None for the real one.
    """

    def real(asset: SourceAsset, window: Grid) -> Pixels:
        return read_on_grid(
            asset, asset.header, window, asset.resampling, stored=asset.stored, scene=asset.scene, access=access
        )

    times, height, width = task.region.shape
    shard = _Shard(recipe, task, reader or real)
    arrays: dict[str, Pixels] = {
        recipe.spec.kind: np.full((times, len(recipe.spec.bands), height, width), NODATA[recipe.dtype], recipe.dtype),
        **{name: np.zeros((times, height, width), np.uint8) for name in recipe.spec.class_layers},
        "status": np.full((times, height, width), STATUS_NODATA, np.uint8),
        "source_item": np.full((times, height, width), -1, np.int16),
    }
    outcomes: list[SourceOutcome] = []
    for step in range(times):
        views = {name: array[step] for name, array in arrays.items()}
        sources = [scene for scene in task.sources if scene.step == task.region.t0 + step]
        outcomes += shard.fill_step(sources, views)
    return FilledShard(arrays, tuple(outcomes), shard.pixels_read)


class _Shard:
    """The work on one shard, step by step."""

    def __init__(self, recipe: Recipe, task: ShardTask, read: AssetReader) -> None:
        region = task.region
        self.recipe = recipe
        self.read = read
        self.grid = recipe.spec.grid.window(region.y0, region.x0, region.shape[1], region.shape[2])
        dilate = recipe.mask_dilate_m if recipe.mask_layer else 0.0
        self.halo = halo_pixels(self.grid, dilate)
        self.pixels_read = 0

    def fill_step(self, sources: list[PlannedScene], views: dict[str, Pixels]) -> list[SourceOutcome]:
        """Mosaic the sources of one time step into the views of the shard's arrays."""
        status = views["status"]
        outcomes, unread = [], []
        for scene in sources:
            window = self._needed(scene, status)
            if window is None:
                continue
            try:
                self._add(scene, window, views)
            except AssetUnreadable as error:
                unread.append(scene)
                outcomes.append(SourceOutcome(scene.item, scene.item_id, "missing", error.asset, error.reason))
            else:
                outcomes.append(SourceOutcome(scene.item, scene.item_id, "read"))
        for scene in unread:
            status[(status == STATUS_NODATA) & _covered(scene.extent, self.grid)] = STATUS_MISSING
        return outcomes

    def _needed(self, scene: PlannedScene, status: Pixels) -> tuple[int, int, int, int] | None:
        """(row0, row1, col0, col1) around the pixels that this source could still improve."""
        reach = pixel_box(scene.extent, self.grid)
        if reach is None:
            return None
        row0, row1, col0, col1 = reach
        wanting = status[row0:row1, col0:col1] != STATUS_OBSERVED
        rows, cols = np.flatnonzero(wanting.any(axis=1)), np.flatnonzero(wanting.any(axis=0))
        if not len(rows):
            return None
        return (row0 + int(rows[0]), row0 + int(rows[-1]) + 1, col0 + int(cols[0]), col0 + int(cols[-1]) + 1)

    def _add(self, scene: PlannedScene, window: tuple[int, int, int, int], views: dict[str, Pixels]) -> None:
        """Read one source on one window and paste it where it wins.

        Raises:
            AssetUnreadable: One of its bands is lacking or unreadable: then nothing of it is used.
        """
        row0, row1, col0, col1 = window
        place = (slice(row0, row1), slice(col0, col1))
        target = self.grid.window(row0, col0, row1 - row0, col1 - col0)
        spec, recipe = self.recipe.spec, self.recipe
        classes, masked = self._classes(scene, target)
        main = np.stack([self._read_band(scene, band, target) for band in spec.band_names])
        seen = observed(main, classes.get(recipe.mask_layer or "scl"))
        clear = seen & ~masked
        status, main_view = views["status"][place], views[spec.kind][(slice(None), *place)]
        wins = (clear & (status != STATUS_OBSERVED)) | (seen & (status == STATUS_NODATA))
        np.copyto(main_view, main, where=wins)
        for name in spec.class_layers:
            np.copyto(views[name][place], classes[name], where=wins)
        views["source_item"][place][wins] = scene.item
        status[wins] = np.where(clear, STATUS_OBSERVED, STATUS_MASKED)[wins]

    def _classes(
        self, scene: PlannedScene, target: Grid
    ) -> tuple[dict[str, npt.NDArray[np.uint8]], npt.NDArray[np.bool_]]:
        """Class layers on `target`, and what the mask layer masks there."""
        recipe = self.recipe
        masked = np.zeros(target.shape, bool)
        layers = {}
        for name in recipe.classes:
            rows, cols = self.halo if name == recipe.mask_layer else (0, 0)
            outer = target.window(-rows, -cols, target.height + 2 * rows, target.width + 2 * cols)
            whole = self._read_band(scene, name, outer).astype(np.uint8, copy=False)
            layers[name] = whole[rows : rows + target.height, cols : cols + target.width]
            if name == recipe.mask_layer:
                masked = mask_classes(whole, recipe.mask_classes, grid=target, dilate_m=recipe.mask_dilate_m)
        return layers, masked

    def _read_band(self, scene: PlannedScene, band: str, target: Grid) -> Pixels:
        asset = scene.asset(band)
        if asset is None:
            raise AssetUnreadable.of(scene.item_id, band, f"the item has no usable asset for {band}", "no href")
        self.pixels_read += target.height * target.width
        raw = self.read(asset, target)
        return harmonise_dn(raw.astype(np.uint16, copy=False), asset.dn_offset) if asset.stored == "uint16" else raw


def _covered(extent: Grid, target: Grid) -> npt.NDArray[np.bool_]:
    """Target pixels whose centre lies in the rectangle of `extent`."""
    left, bottom, right, top = extent.bounds
    if extent.crs == target.crs:
        x, y = target.x(), target.y()
        inside = ((y > bottom) & (y <= top))[:, None] & ((x >= left) & (x < right))[None, :]
        return np.asarray(inside, bool)
    transformer = Transformer.from_crs(target.crs, extent.crs, always_xy=True)
    covered = np.zeros(target.shape, bool)
    x = target.x()
    for row, y in enumerate(target.y()):  # row by row: four float arrays of a whole shard would be its largest memory
        sx, sy = transformer.transform(x, np.full_like(x, y))
        covered[row] = (sx >= left) & (sx < right) & (sy > bottom) & (sy <= top)
    return covered
