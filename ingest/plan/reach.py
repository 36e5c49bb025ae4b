"""`Reach` finds the scenes that reach into each shard; a raster is placed once, whatever the number of dates.

The same tiles and shards meet on every date. So the work grows with the number of scenes plus the number of shards, and
not with their product.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from pyproj.exceptions import ProjError

from ingest.pixels.clip import is_outside
from ingest.plan.target import box_of_pixels, transform_box
from ingest.plan.task import PlannedScene, Recipe, ShardTask
from zarr_store.errors import InvalidInput
from zarr_store.grid import Bounds, Grid
from zarr_store.ground import turn_of

__all__ = ["Place", "Reach", "make_tasks"]

Place = tuple[int, int]
"""Place of a shard on the ground: its index along y and x, on any date."""
_MARGIN_PX = 4
"""Pixels around a raster within which a shard is looked at exactly; more than any slack of `box_of_pixels`."""


@dataclass(frozen=True)
class Reach:
    """The shards of one grid, and which of them rasters reach.

    Attributes:
        grid: The whole grid.
        shard: (height, width) of a shard in pixels.
        clip: Area outside which a shard has no sources, as `Recipe.clip`.
    """

    grid: Grid
    shard: tuple[int, int]
    clip: str | None = None
    _places: dict[Grid, tuple[Place, ...]] = field(default_factory=dict, compare=False, repr=False)
    _windows: dict[Place, Grid | None] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, recipe: Recipe) -> Reach:
        """Return the reach on the grid of a collection."""
        spec = recipe.spec
        return cls(spec.grid, (spec.layout.shard[1], spec.layout.shard[2]), recipe.clip)

    def places(self, raster: Grid) -> tuple[Place, ...]:
        """Return the places of the shards that have pixels of a raster, in order."""
        found = self._places.get(raster)
        if found is None:
            found = self._places[raster] = tuple(self._find(raster))
        return found

    def share_out(self, scenes: Iterable[PlannedScene]) -> Mapping[Place, list[PlannedScene]]:
        """Return the scenes that reach each place, in the order of `scenes`."""
        shared: dict[Place, list[PlannedScene]] = defaultdict(list)
        for scene in scenes:
            for place in self.places(scene.extent):
                shared[place].append(scene)
        return shared

    def _find(self, raster: Grid) -> Iterable[Place]:
        try:
            box = transform_box(raster, self.grid.crs)
        except (InvalidInput, ProjError):  # the raster has no place in the CRS of the grid
            return
        for place in sorted(self._near(box)):
            window = self._window(place)
            if window is not None and box_of_pixels(box, raster.crs, window) is not None:
                yield place

    def _near(self, box: Bounds) -> set[Place]:
        """Return the places that a box may touch; one across the antimeridian may touch them after a whole turn."""
        left, bottom, right, top = box
        (rx, ry), (x0, _, _, y1) = self.grid.resolution, self.grid.bounds
        rows = self._range((y1 - top) / ry, (y1 - bottom) / ry, 0)
        turn = turn_of(self.grid.crs)
        turns: tuple[float, ...] = (0.0,)
        if turn:
            # a shard takes the copy that is nearest to its own middle, which is at most one turn from that of the grid
            middle = round((x0 + self.grid.bounds[2] - left - right) / 2.0 / turn) * turn
            turns = (middle - turn, middle, middle + turn)
        return {
            (row, column)
            for by in turns
            for column in self._range((left + by - x0) / rx, (right + by - x0) / rx, 1)
            for row in rows
        }

    def _range(self, first: float, end: float, axis: int) -> range:
        """Return the shards along one axis between two positions in pixels."""
        size, side = self.grid.shape[axis], self.shard[axis]
        low, high = max(0, math.floor(first) - _MARGIN_PX), min(size, math.ceil(end) + _MARGIN_PX)
        return range(low // side, -(-high // side)) if high > low else range(0)

    def _window(self, place: Place) -> Grid | None:
        """Return the pixels of a shard; None where the clip leaves nothing of it."""
        if place not in self._windows:
            (row, column), (tall, wide) = place, self.shard
            y0, x0 = row * tall, column * wide
            height, width = min(tall, self.grid.height - y0), min(wide, self.grid.width - x0)
            window = self.grid.window(y0, x0, height, width)
            self._windows[place] = None if is_outside(self.clip, window) else window
        return self._windows[place]


def make_tasks(recipe: Recipe, planned: Iterable[PlannedScene]) -> list[ShardTask]:
    """Make the tasks of all shards of a collection, in order.

    Args:
        recipe: Recipe of the collection.
        planned: Its scenes, step by step in the order in which they win.
    """
    reach, steps = Reach.of(recipe), recipe.spec.layout.shard[0]
    by_time: dict[int, list[PlannedScene]] = defaultdict(list)
    for scene in planned:
        by_time[scene.step // steps].append(scene)
    tasks, shared, time = [], reach.share_out(()), -1
    for index, region in recipe.spec.iterate_shards():
        if index[0] != time:
            time = index[0]
            shared = reach.share_out(by_time.pop(time, ()))
        tasks.append(ShardTask.of(recipe, index, region, tuple(shared.get(index[1:], ()))))
    return tasks
