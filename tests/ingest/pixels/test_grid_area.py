"""An area of very many vertices is kept in pixels: every pixel as by the whole area, and a fraction of its size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
from shapely.geometry import Polygon, mapping, shape
from shapely.geometry.base import BaseGeometry

from ingest.pixels.clip import clip_on, clip_text, inside_of, is_outside, reduced
from ingest.pixels.grid_area import GridArea, is_grid_area, sha_of
from ingest.plan.plan import Plan
from ingest.request.config import IngestConfig
from ingest.upkeep.extend import plan_extension
from zarr_store.errors import CubeMismatch, InvalidInput
from zarr_store.grid import Grid

from ..small_scenes import cube_of, land, make_scene, plan_of, write_items, write_tif

GRID = Grid("EPSG:32633", (10, 0, 500_000, 0, -10, 5_100_000), (256, 256))


def _border(vertices: int, *, centre: tuple[float, float] = (15.0165, 46.042), waves: int = 400) -> Polygon:
    """A wavy ring of about 1.5 km radius."""
    angle = np.linspace(0, 2 * np.pi, vertices, endpoint=False)
    radius = 0.015 * (1 + 0.05 * np.sin(waves * angle))
    return Polygon(np.c_[centre[0] + radius * np.cos(angle), centre[1] + 0.65 * radius * np.sin(angle)].round(9))


def _islands(seed: int) -> BaseGeometry:
    """Thousands of islands, most smaller than a pixel, and a ring with a lake."""
    rng = np.random.default_rng(seed)
    points = np.c_[rng.uniform(15.0, 15.033, 1500), rng.uniform(46.031, 46.053, 1500)]
    small = shapely.buffer(shapely.points(points), rng.uniform(1e-6, 2e-4, 1500), quad_segs=2)
    lake = _border(3000, waves=60).difference(_border(3000, waves=33).buffer(-0.005))
    return shapely.union_all([*small, lake])


AREAS: dict[str, Any] = {
    "wavy": lambda: _border(8_000),
    "islands": lambda: _islands(1),
    "more islands": lambda: _islands(2),
    "beyond the grid": lambda: _border(8_000, centre=(15.0, 46.053)),
    "all of the grid": lambda: _border(1_000).buffer(0.1, quad_segs=3_000),
}


@pytest.mark.parametrize("name", AREAS)
@pytest.mark.parametrize("crs", ["EPSG:32633", "EPSG:4326"])
def test_every_pixel_of_every_window_is_as_by_the_whole_area(name: str, crs: str) -> None:
    grid = GRID if crs == GRID.crs else Grid(crs, (1.3e-4, 0, 15.0, 0, -9e-5, 46.0536), (256, 256))
    text = clip_text(mapping(AREAS[name]()))
    assert text is not None
    short = clip_on(text, grid)
    assert short is not None
    assert is_grid_area(short)
    rng = np.random.default_rng(3)
    for row, col, height, width in [(0, 0, 256, 256), *rng.integers(1, 120, (6, 4)).tolist()]:
        window = grid.window(row, col, height, width)
        want, got = inside_of(text, window), inside_of(short, window)
        whole = np.ones(window.shape, bool)
        assert np.array_equal(whole if got is None else got, whole if want is None else want)
        if is_outside(short, window):
            assert want is not None
            assert not want.any()


def test_it_is_short_and_names_what_it_stands_for() -> None:
    text = clip_text(mapping(_border(200_000)))
    assert text is not None
    short = clip_on(text, GRID)
    assert short is not None
    assert len(text) > 4_000_000
    assert len(short) < 100_000
    assert sha_of(short) == sha_of(text)
    assert GridArea.from_text(short).to_text() == short
    assert clip_on(short, GRID) == short
    few = clip_text(mapping(_border(100)))
    assert clip_on(few, GRID) == few, "cubes of few vertices keep their keys"


def test_the_geometry_that_a_plan_keeps_covers_the_whole() -> None:
    for area in (_border(60_000), _islands(4)):
        kept = reduced(mapping(area))
        assert len(json.dumps(kept)) < 100_000
        assert shape(kept).covers(area)
        assert shape(kept).area < 2 * area.envelope.area
        config = IngestConfig(geometry=kept)
        assert config.selection.geometry == kept
        assert config.plan_settings()["geometry"] == kept


@pytest.fixture(scope="module")
def bordered(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], Plan]:
    folder = tmp_path_factory.mktemp("bordered")
    path = write_tif(folder / "B02.tif", land(256, 256))
    items = [make_scene(f"A{day}", {"B02": path}, datetime=f"2023-08-{day}T10:06:49Z") for day in (10, 12)]
    geometry = mapping(_border(12_000))
    source = write_items(folder, *items)
    return source, json.loads(json.dumps(geometry)), plan_of(source, geometry=geometry, datetime="2023-08-10")


def test_it_does_not_travel_in_plans_and_metadata(bordered: tuple[Path, dict[str, Any], Plan]) -> None:
    _, geometry, plan = bordered
    assert len(json.dumps(geometry)) > 300_000
    assert len(plan.to_json()) < 100_000
    assert len(json.dumps(plan.provenance())) < 60_000
    again = Plan.from_json(plan.to_json())
    assert (again.digest, again.to_json()) == (plan.digest, plan.to_json())
    inside = inside_of(clip_text(geometry), plan.grid)
    assert inside is not None
    seen = cube_of(again)["status"][0] == 1
    reach = np.zeros_like(seen)
    offset = plan.grid.offset_of(GRID)
    assert offset is not None
    rows, cols = (slice(max(0, at), max(0, at + 256)) for at in offset)
    reach[rows, cols] = True
    assert np.array_equal(seen, inside & reach)


def test_a_cube_with_such_a_border_goes_on(bordered: tuple[Path, dict[str, Any], Plan]) -> None:
    """With the settings that it keeps, and with the file of the border given again; not with another border."""
    source, geometry, plan = bordered
    kept = IngestConfig.from_flat({**plan.config, "datetime": "2023-08"})
    typed = kept.model_copy(update={"geometry": geometry})
    for config in (kept, typed):
        more = plan_extension(plan, str(source), config, append=True, refresh=False)
        assert len(more.recipes[0].spec.times) == 2
        assert more.recipes[0].clip == plan.recipes[0].clip
        assert len(more.to_json()) < 120_000
        assert more.tasks[0].key == plan.tasks[0].key
    other = kept.model_copy(update={"geometry": mapping(_border(12_000, waves=399))})
    with pytest.raises(CubeMismatch):
        plan_extension(plan, str(source), other, append=True, refresh=False)
    with pytest.raises(InvalidInput, match="reduced form"):
        plan_of(source, geometry=plan.config["geometry"])
