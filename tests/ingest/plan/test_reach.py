"""Sources of shards on large regions: as if every scene was tried on every shard, at a cost that grows linearly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ingest.pixels.clip import clip_text, is_outside
from ingest.plan import reach
from ingest.plan.reach import Reach, make_tasks
from ingest.plan.target import box_of_pixels, pixel_box
from ingest.plan.task import PlannedScene, Recipe
from zarr_store.errors import InvalidInput
from zarr_store.grid import Grid
from zarr_store.spec import BandSpec, CubeSpec, Layout, item_type_for

LAYOUT = Layout("t", (1, 16, 16), (1, 64, 64))


def recipe_on(grid: Grid, *, steps: int = 1, clip: str | None = None, layout: Layout = LAYOUT) -> Recipe:
    times = tuple(f"2023-01-{1 + step:02}T10:00:00" for step in range(steps))
    return Recipe(CubeSpec("s2", "reflectance", (BandSpec("red"),), grid, times, (), layout), clip=clip)


def scenes_on(grids: list[Grid], *, steps: int = 1) -> list[PlannedScene]:
    pairs = [(step, grid) for step in range(steps) for grid in grids]
    return [PlannedScene(n, f"s{n}", step, grid, ()) for n, (step, grid) in enumerate(pairs)]


def by_trying_all(recipe: Recipe, planned: list[PlannedScene]) -> list[list[int]]:
    found = []
    for region in recipe.spec.shards().values():
        window = recipe.spec.grid.window(region.y0, region.x0, region.shape[1], region.shape[2])
        outside = is_outside(recipe.clip, window)
        found.append(
            [
                scene.item
                for scene in planned
                if not outside and region.t0 <= scene.step < region.t1 and pixel_box(scene.extent, window) is not None
            ]
        )
    return found


def places(crs: str) -> tuple[Grid, list[Grid]]:
    """A grid, and rasters on, across, beside and far from it."""
    rng = np.random.default_rng(3)
    if crs == "EPSG:4326":  # across the antimeridian
        target = Grid(crs, (0.01, 0.0, 178.0, 0.0, -0.01, 10.0), (300, 500))
        boxes = [(float(left), float(top)) for left, top in rng.uniform((176, 6), (184, 11), (40, 2))]
        boxes = [(left - 360 * (n % 2), top) for n, (left, top) in enumerate(boxes)]  # both names of a meridian
        return target, [Grid(crs, (0.01, 0.0, left, 0.0, -0.01, top), (80, 120)) for left, top in boxes]
    target = Grid(crs, (20.0, 0.0, 500_000.0, 0.0, -20.0, 5_000_000.0), (300, 500))
    corners = rng.integers((-40, -30), (560, 340), (30, 2)) * 20.0
    same = [Grid(crs, (10.0, 0.0, 500_000.0 + x, 0.0, -10.0, 5_000_000.0 - y), (150, 130)) for x, y in corners]
    # a side that coincides with that of a shard touches it and reaches no pixel of it
    edge = Grid(crs, (20.0, 0.0, 500_000.0 + 64 * 20.0, 0.0, -20.0, 5_000_000.0 - 128 * 20.0), (64, 64))
    return target, [*same, edge]


@pytest.mark.parametrize("crs", ["EPSG:32633", "EPSG:4326"])
def test_sources_are_those_of_trying_every_scene_on_every_shard(crs: str) -> None:
    target, grids = places(crs)
    recipe, planned = recipe_on(target, steps=3), scenes_on(grids, steps=3)
    found = [[scene.item for scene in task.sources] for task in make_tasks(recipe, planned)]
    assert found == by_trying_all(recipe, planned)
    assert sum(map(len, found)) > 30
    assert any(not sources for sources in found)


def test_rasters_of_another_crs_and_steps_that_share_a_shard() -> None:
    target, grids = places("EPSG:32633")
    west, south, east, north = target.lonlat_bounds()
    rng = np.random.default_rng(5)
    corners = rng.uniform((west - 0.05, south), (east, north + 0.05), (25, 2)).tolist()
    other = [Grid("EPSG:4326", (0.0002, 0.0, left, 0.0, -0.0002, top), (90, 140)) for left, top in corners]
    recipe = recipe_on(target, steps=5, layout=Layout("t", (2, 16, 16), (2, 64, 64)))
    planned = scenes_on([*other, grids[0]], steps=5)
    found = [[scene.item for scene in task.sources] for task in make_tasks(recipe, planned)]
    assert found == by_trying_all(recipe, planned)
    assert sum(map(len, found)) > 30


def test_a_clip_leaves_shards_outside_it_without_sources() -> None:
    target, grids = places("EPSG:32633")
    west, south, east, north = target.lonlat_bounds()
    middle = ((west + east) / 2, (south + north) / 2)
    ring = [[west, south], [middle[0], south], [west, middle[1]], [west, south]]
    recipe = recipe_on(target, clip=clip_text({"type": "Polygon", "coordinates": [ring]}))
    planned = scenes_on(grids)
    found = [[scene.item for scene in task.sources] for task in make_tasks(recipe, planned)]
    assert found == by_trying_all(recipe, planned)
    assert found != by_trying_all(recipe_on(target), planned)


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many times a raster and a shard are compared."""
    counted = [0]
    real = box_of_pixels

    def count(*arguments: Any) -> Any:
        counted[0] += 1
        return real(*arguments)

    monkeypatch.setattr(reach, "box_of_pixels", count)
    return counted


def test_comparisons_grow_with_the_tiles_and_not_with_dates_or_tiles_times_shards(looks: list[int]) -> None:
    def compared(tiles: int, dates: int) -> int:
        looks[0] = 0
        side = 64 * 10.0
        grids = [Grid("EPSG:32633", (10.0, 0.0, n * side, 0.0, -10.0, 0.0), (64, 64)) for n in range(tiles)]
        target = Grid("EPSG:32633", (10.0, 0.0, 0.0, 0.0, -10.0, 0.0), (64, 64 * tiles))
        tasks = make_tasks(recipe_on(target, steps=dates), scenes_on(grids, steps=dates))
        assert [len(task.sources) for task in tasks] == [1] * tiles * dates
        return looks[0]

    once = compared(20, 1)
    assert 20 <= once <= 60
    assert compared(20, 5) == once
    assert compared(80, 1) <= 4.2 * once


def test_a_raster_without_a_place_in_the_crs_reaches_nothing() -> None:
    target, _ = places("EPSG:32633")
    pole = Grid("EPSG:3031", (1e4, 0.0, -1e6, 0.0, -1e4, 1e6), (10, 10))
    assert list(Reach.of(recipe_on(target)).places(pole)) == []


def test_more_scenes_than_16_bits_can_name_get_a_wider_item_number(tmp_path: Path) -> None:
    from zarr_store.create import create_cube
    from zarr_store.read import open_cube

    grid = Grid("EPSG:32633", (10.0, 0.0, 0.0, 0.0, -10.0, 0.0), (64, 64))
    narrow = recipe_on(grid).spec
    narrow.check_items(32_767)
    with pytest.raises(InvalidInput, match="32768 scenes are more than the 32767 that this cube can name"):
        narrow.check_items(32_768)
    assert item_type_for(32_767) == "int16"
    wide = CubeSpec("s2", "reflectance", narrow.bands, grid, narrow.times, (), LAYOUT, item_type=item_type_for(32_768))
    wide.check_items(32_768)
    assert "item_type" not in narrow.to_dict()
    assert wide.to_dict() == narrow.to_dict() | {"item_type": "int32"}
    items = [{"id": f"i{n}", "datetime": "2023-01-01T10:00:00Z"} for n in range(40_000)]
    create_cube(tmp_path / "c.zarr", [wide], items={"s2": items}, provenance={})
    cube = open_cube(tmp_path / "c.zarr")
    assert cube.spec("s2") == wide
    assert cube.dataset("s2").source_item.dtype == np.int32
    assert cube.items("s2")[-1] == items[-1]
