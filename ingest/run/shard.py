"""`fill_shard` reads the sources of one shard and returns its arrays, purely from its task except for the reading.

Sources are read one after the other, so memory does not grow with their number, and a later source is read only where
no earlier one is clear. All bands and classes of a pixel come from one source, whose row is in `source_item`. Or the
bands are a mean or median of all clear sources (`ingest.pixels.composite`), whose number is in `observations`.
"""

from __future__ import annotations

import functools
import math
import os
import threading
from collections.abc import Callable, Container, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextvars import copy_context
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ingest.pixels.clip import inside_of
from ingest.pixels.composite import Tally, make_tally, strips
from ingest.pixels.indices import add_indices
from ingest.pixels.mask import halo_pixels, mask_classes
from ingest.pixels.mosaic import lay_source
from ingest.plan.overviews import overview_of
from ingest.plan.target import pixel_box
from ingest.plan.task import PlannedScene, Recipe, ShardTask, SourceAsset
from ingest.raster.limits import Access
from ingest.raster.read import NODATA, Pixels, read_on_grid
from ingest.trust.hrefs import is_url
from ingest.trust.redact import redact_url
from ingest.worker.slots import computing
from zarr_store.crs import transformer_between
from zarr_store.errors import AssetUnreadable
from zarr_store.grid import Grid
from zarr_store.ground import ground_scale, turn_of, turn_towards, turned_near
from zarr_store.ledger import SourceOutcome
from zarr_store.regions import Region
from zarr_store.spec import STATUS_MISSING, STATUS_NODATA, STATUS_OBSERVED

__all__ = ["AssetReader", "FilledShard", "fill_shard"]

AssetReader = Callable[[SourceAsset, Grid], Pixels]
"""A function that reads an asset on a window of the cube's grid: raw numbers, as `read_on_grid` gives them."""

_READERS = 32
"""Largest number of bands that one process reads at once; two shards of 13 bands and a class layer need 28."""

_PlacedReader = Callable[[SourceAsset, Grid, Pixels | None], Pixels]
"""An `AssetReader` that writes into the given array, where there is one."""


@dataclass(frozen=True)
class FilledShard:
    """The arrays of one shard and the outcome of each of its sources.

    Attributes:
        arrays: Arrays by name, in the form that `ShardWriter.write` takes.
        outcomes: One outcome per source that was needed; a source below clear ones everywhere is not read.
        pixels_read: Number of pixels that were read from files, over all bands and classes.
    """

    arrays: dict[str, Pixels]
    outcomes: tuple[SourceOutcome, ...]
    pixels_read: int


def fill_shard(
    task: ShardTask, recipe: Recipe, *, access: Access | None = None, reader: AssetReader | None = None
) -> FilledShard:
    """Read, mask and mosaic all sources of one shard.

    Each pixel comes from the first source that sees it clear, else from the first that sees it at all. Where none does,
    and a source that could not be read would have covered it, the pixel is "missing", which differs from "no data".

    Args:
        task: The shard and its sources.
        recipe: Bands, grid and mask of the collection.
        access: Limits and retries.
        reader: Function that reads one asset; None for `read_on_grid`.
    """

    def read(asset: SourceAsset, window: Grid, out: Pixels | None) -> Pixels:
        if asset.refusal is not None:
            raise AssetUnreadable.of(asset.scene, asset.key, asset.refusal, redact_url(asset.href), final=True)
        if reader is not None:
            pixels = reader(asset, window)
            notes.pixels += pixels.size
            if out is None:
                return pixels
            out[...] = pixels
            return out
        return read_on_grid(
            asset, asset.header, window, asset.resampling,
            stored=asset.stored, scene=asset.scene, access=access, out=out, exact_edges=recipe.exact_edges,
            exact_means=recipe.exact_means, overview=overview_of(asset, recipe),
            on_version=lambda version: versions.__setitem__((asset.scene, asset.key), version),
            on_read=lambda pixels, told: notes.add(asset, pixels, told),
        )  # fmt: skip

    times, height, width = task.region.shape
    spec = recipe.spec
    by_step = [[s for s in task.sources if s.step == t] for t in range(task.region.t0, task.region.t1)]
    arrays: dict[str, Pixels] = {
        spec.kind: _undefined((times, len(spec.bands), height, width), recipe.dtype),
        **{name: np.zeros((times, height, width), np.uint8) for name in spec.class_layers},
        "status": np.full((times, height, width), STATUS_NODATA, np.uint8),
    }
    if spec.reduce == "first":
        arrays["source_item"] = np.full((times, height, width), -1, spec.item_type)
    else:
        arrays["observations"] = np.zeros((times, height, width), np.uint16)
    outcomes: dict[int, SourceOutcome] = {}
    versions: dict[tuple[str, str], str] = {}
    notes = _Notes()
    for part in strips(task.region, spec, max(map(len, by_step), default=0)):
        shard = _Shard(recipe, part, read, notes)
        _, rows, cols = part.within(task.region)
        for step, sources in enumerate(by_step):
            views = {name: array[step][..., rows, cols] for name, array in arrays.items()}
            # a source that failed in one part of a shard is not read again in the next
            failed = {item for item, outcome in outcomes.items() if outcome.state == "missing"}
            for outcome in shard.fill_step(sources, views, failed):
                if outcome.item not in failed:
                    outcomes[outcome.item] = outcome
    add_indices(arrays, spec)
    return FilledShard(arrays, tuple(_with_versions(one, versions) for one in outcomes.values()), notes.pixels)


def _with_versions(outcome: SourceOutcome, versions: Mapping[tuple[str, str], str]) -> SourceOutcome:
    if outcome.state != "read":
        return outcome
    of_scene = sorted((key, version) for (scene, key), version in versions.items() if scene == outcome.item_id)
    return replace(outcome, versions=tuple(of_scene))


class _Notes:
    """Facts about the files of a shard that reading has shown; several threads read its bands.

    Attributes:
        pixels: Number of pixels that were read from files.
        told: (scene, asset key) of files that say by a mask or another value than 0 where they have no data.
    """

    def __init__(self) -> None:
        self.pixels = 0
        self.told: set[tuple[str, str]] = set()
        self._lock = threading.Lock()

    def add(self, asset: SourceAsset, pixels: int, told: bool) -> None:
        with self._lock:
            self.pixels += pixels
            if told:
                self.told.add((asset.scene, asset.key))


class _Shard:
    """The work on one part of a shard, time step by time step."""

    def __init__(self, recipe: Recipe, region: Region, read: _PlacedReader, notes: _Notes) -> None:
        self.recipe = recipe
        self.read = read
        self.grid = recipe.spec.grid.window(region.y0, region.x0, region.shape[1], region.shape[2])
        dilate = recipe.mask_dilate_m if recipe.mask_layer else 0.0
        # that of the whole cube, so that the same pixel has the same reach in every shard
        self.scale = ground_scale(recipe.spec.grid)
        self.halo = halo_pixels(self.grid, dilate, self.scale)
        self.notes = notes
        self.inside = inside_of(recipe.clip, self.grid)
        self.tally: Tally | None = None

    def fill_step(
        self, sources: list[PlannedScene], views: dict[str, Pixels], failed: Container[int] = ()
    ) -> list[SourceOutcome]:
        """Mosaic the sources of one time step into views of the shard's arrays."""
        status, main = views["status"], views[self.recipe.spec.kind]
        self.tally = make_tally(self.recipe.spec.reduce, (main.shape[0], *self.grid.shape), main.dtype)
        outcomes, unread = [], []
        blank, nodata = True, NODATA[self.recipe.dtype]  # `main` holds anything until then
        for scene in sources:
            window = self._needed(scene, status)
            if window is None:
                continue
            if scene.item in failed:
                unread.append(scene)
                continue
            if blank:
                _clear_beside(main, window if self._overwrites(scene) else (0, 0, 0, 0), nodata)
                blank = False
            try:
                self._add(scene, window, views)
            except AssetUnreadable as error:
                unread.append(scene)
                outcomes.append(
                    SourceOutcome(scene.item, scene.item_id, "missing", error.asset, error.reason, final=error.final)
                )
            else:
                outcomes.append(SourceOutcome(scene.item, scene.item_id, "read"))
        if blank:
            main[...] = nodata
        for scene in unread:
            lost = (status == STATUS_NODATA) & _covered(scene.extent, self.grid)
            status[lost if self.inside is None else lost & self.inside] = STATUS_MISSING
        if self.tally is not None:
            self.tally.finish(main, views["observations"])
        return outcomes

    def _overwrites(self, scene: PlannedScene) -> bool:
        """Return whether reading this source first writes every pixel of its window, or clears them all if it fails."""
        assets = (scene.asset(band) for band in self.recipe.spec.band_names)
        return self.tally is None and all(asset is None or asset.stored == self.recipe.dtype for asset in assets)

    def _needed(self, scene: PlannedScene, status: Pixels) -> tuple[int, int, int, int] | None:
        """Find the window (row0, row1, col0, col1) of the pixels that this source can still improve; None for none."""
        reach = pixel_box(scene.extent, self.grid)
        if reach is None:
            return None
        row0, row1, col0, col1 = reach
        if self.inside is None and not status[row0:row1, col0:col1].any():
            return reach
        # one clear source is enough for a mosaic; a mean or a median needs them all
        wanting = (status[row0:row1, col0:col1] != STATUS_OBSERVED) | (self.tally is not None)
        if self.inside is not None:
            wanting &= self.inside[row0:row1, col0:col1]
        rows, cols = np.flatnonzero(wanting.any(axis=1)), np.flatnonzero(wanting.any(axis=0))
        if not len(rows):
            return None
        return (row0 + int(rows[0]), row0 + int(rows[-1]) + 1, col0 + int(cols[0]), col0 + int(cols[-1]) + 1)

    def _add(self, scene: PlannedScene, window: tuple[int, int, int, int], views: dict[str, Pixels]) -> None:
        """Read one source on one window and paste it where it wins.

        Raises:
            AssetUnreadable: One of its bands is absent or unreadable; then nothing of the source is used.
        """
        row0, row1, col0, col1 = window
        place = (slice(row0, row1), slice(col0, col1))
        target = self.grid.window(row0, col0, row1 - row0, col1 - col0)
        spec, recipe = self.recipe.spec, self.recipe
        here = {name: view[(..., *place)] for name, view in views.items()}
        bands = dict(zip(spec.band_names, here[spec.kind], strict=False))
        # the first source is decoded straight into the shard, as nothing is there yet
        into = bands | {name: here[name] for name in spec.class_layers}
        fresh = self.tally is None and not here["status"].any()
        try:
            read = self._read_all(scene, target, into if fresh else {})
        except AssetUnreadable:
            if fresh:
                for name, view in into.items():
                    view[...] = NODATA[recipe.dtype] if name in bands else 0
            raise
        classes, masked = self._classes(read, target)
        harmonised = np.empty((len(bands), *target.shape), recipe.dtype) if self.tally is not None else None
        assets = [_asset(scene, band) for band in spec.band_names]
        sizes = [_pixel_m(asset) for asset in assets]
        with computing():
            clear = lay_source(
                here,
                spec.kind,
                [read[band] for band in spec.band_names],
                classes,
                item=scene.item,
                dn_offsets=[asset.dn_offset for asset in assets],
                mask_layer=recipe.mask_layer or "scl",
                masked=masked,
                inside=None if self.inside is None else self.inside[place],
                nodata=NODATA[recipe.dtype],
                harmonised=harmonised,
                told=[(asset.scene, asset.key) in self.notes.told for asset in assets],
                finest=[size <= min(sizes) * 1.01 for size in sizes],
            )
        if self.tally is not None and harmonised is not None:
            self.tally.add(harmonised, clear, place)

    def _read_all(self, scene: PlannedScene, target: Grid, into: Mapping[str, Pixels]) -> dict[str, Pixels]:
        """Read all classes and bands of one source into their places; over a network all are requested at once."""
        recipe = self.recipe
        windows = {}
        for name in recipe.classes:
            rows, cols = self.halo if name == recipe.mask_layer else (0, 0)
            windows[name] = target.window(-rows, -cols, target.height + 2 * rows, target.width + 2 * cols)
        windows |= dict.fromkeys(recipe.spec.band_names, target)
        lacking = next((name for name in windows if scene.asset(name) is None), None)
        if lacking is not None:
            text = f"the item has no usable asset for {lacking}"
            raise AssetUnreadable.of(scene.item_id, lacking, text, "no href", final=True)

        def read(name: str) -> Pixels:
            asset, window, out = _asset(scene, name), windows[name], into.get(name)
            fits = out is not None and out.shape == window.shape and out.dtype == asset.stored
            pixels = self.read(asset, window, out if fits else None)
            return pixels.astype(np.uint16, copy=False) if asset.stored == "uint16" else pixels

        if not any(is_url(asset.href) for asset in scene.assets):
            return {name: read(name) for name in windows}
        begun = {name: _readers(os.getpid()).submit(copy_context().run, read, name) for name in windows}
        wait(begun.values())  # also those after a failure, as they write into arrays of the caller
        return {name: future.result() for name, future in begun.items()}

    def _classes(
        self, read: dict[str, Pixels], target: Grid
    ) -> tuple[dict[str, npt.NDArray[np.uint8]], npt.NDArray[np.bool_]]:
        """Cut the class layers to `target`, and mask the pixels of the classes that the mask layer masks there."""
        recipe = self.recipe
        masked = np.zeros(target.shape, bool)
        layers = {}
        for name in recipe.classes:
            rows, cols = self.halo if name == recipe.mask_layer else (0, 0)
            whole = read[name].astype(np.uint8, copy=False)
            layers[name] = whole[rows : rows + target.height, cols : cols + target.width]
            if name == recipe.mask_layer:
                masked = mask_classes(
                    whole, recipe.mask_classes, grid=target, dilate_m=recipe.mask_dilate_m, scale=self.scale
                )
        return layers, masked


@functools.lru_cache(maxsize=2)
def _readers(pid: int) -> ThreadPoolExecutor:
    """Start the threads that read bands of remote scenes; they stay, as PROJ opens its database in each new thread."""
    return ThreadPoolExecutor(_READERS, thread_name_prefix="terrashard-read")


def _asset(scene: PlannedScene, name: str) -> SourceAsset:
    asset = scene.asset(name)
    if asset is None:
        raise KeyError(name)
    return asset


def _pixel_m(asset: SourceAsset) -> float:
    """Return the side of a pixel of the file in metres; infinite if planning could not open the file."""
    return math.inf if asset.header is None else max(asset.header.resolution) / asset.header.units_per_metre


def _undefined(shape: tuple[int, ...], dtype: str) -> Pixels:
    """Make pixels that hold anything: memory that served an earlier shard, which to clear takes as long as to copy."""
    return np.empty(shape, dtype)


def _clear_beside(main: Pixels, window: tuple[int, int, int, int], nodata: float) -> None:
    """Put no data into the pixels of (band, y, x) that lie outside the window (row0, row1, col0, col1)."""
    row0, row1, col0, col1 = window
    for beside in (main[:, :row0], main[:, row1:], main[:, row0:row1, :col0], main[:, row0:row1, col1:]):
        beside[...] = nodata


def _covered(extent: Grid, target: Grid) -> npt.NDArray[np.bool_]:
    """Find the target pixels whose centre lies in the rectangle of `extent`."""
    extent = turn_towards(extent, target)
    left, bottom, right, top = extent.bounds
    if extent.crs == target.crs:
        x, y = target.x(), target.y()
        inside = ((y > bottom) & (y <= top))[:, None] & ((x >= left) & (x < right))[None, :]
        return np.asarray(inside, bool)
    transformer = transformer_between(target.crs, extent.crs)
    turn = turn_of(extent.crs)
    covered = np.zeros(target.shape, bool)
    x = target.x()
    for row, y in enumerate(target.y()):  # row by row: four float arrays of a whole shard would be its largest memory
        sx, sy = transformer.transform(x, np.full_like(x, y))
        sx = turned_near(sx, (left + right) / 2.0, turn)
        covered[row] = (sx >= left) & (sx < right) & (sy > bottom) & (sy <= top)
    return covered
