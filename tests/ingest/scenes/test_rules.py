"""The rules of a right Sentinel ingest, each by number: a table of what shows them, and what no other file shows.

`RULES` names for each rule the tests that would fail if it were broken. Those of this file go the whole way, from
items through plan and shards to the cube, on simulated worlds and on real items.
"""

from __future__ import annotations

import ast
import datetime as dt
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from pyproj import Transformer
from shapely.geometry import shape

from cli.main import main
from ingest.plan.making import make_plan, plan_scenes
from ingest.plan.plan import Plan
from ingest.plan.probe import AssetProbe, SceneProbe
from ingest.request.config import IngestConfig
from ingest.run.shard import fill_shard
from ingest.scenes.search import find_scenes
from ingest.simulate import SimulateConfig, SimulatedWorld, simulate
from ingest.testing import make_scene, probe_headers
from zarr_store.create import create_cube
from zarr_store.errors import InvalidInput
from zarr_store.grid import Grid
from zarr_store.read import open_cube
from zarr_store.spec import Layout
from zarr_store.steps import pair_collections
from zarr_store.write import ShardWriter

RULES: dict[int, tuple[str, ...]] = {
    1: (
        "test_harmonise::test_offset_rules_in_their_order",
        "test_probe::test_before_baseline_04_bright_ground_is_not_an_offset",
    ),
    2: (
        "test_harmonise::test_zagreb_is_not_subtracted_twice",
        "test_harmonise::test_planetary_computer_goes_by_the_baseline_alone",
    ),
    3: ("test_rules::test_mislabelled_scenes_follow_the_policy", "test_probe::test_zagreb_headers_and_pixels"),
    4: ("test_read::test_offset_keeps_nodata_and_saturation",),
    5: (
        "test_harmonise::test_stac_1_1_bands_come_before_raster_bands",
        "test_harmonise::test_every_real_sentinel_2_item_is_understood",
    ),
    6: (
        "test_rules::test_radar_from_items_to_cube",
        "test_rules::test_grd_is_refused_on_the_command_line",
        "test_composite::test_radar_is_averaged_in_linear_power_and_orbits_stay_apart",
    ),
    7: (
        "test_harmonise::test_every_form_of_a_crs",
        "test_harmonise::test_projjson_is_read",
        "test_harmonise::test_grids_are_never_made_up",
    ),
    8: ("test_plan::test_file_headers_win_over_metadata", "test_probe::test_files_that_lie_elsewhere_are_said"),
    9: (
        "test_plan::test_twenty_metre_bands_nest_on_a_ten_metre_grid",
        "test_read::test_kernels_follow_kind_and_scale",
        "test_rules::test_overviews_of_files_are_never_read",
    ),
    10: ("test_rules::test_two_zones_in_one_cube", "test_rules::test_real_cells_of_two_zones"),
    11: (
        "test_rules::test_real_items_at_the_antimeridian_and_the_poles",
        "test_plan::test_the_antimeridian_does_not_tear_a_region_apart",
    ),
    12: (
        "test_search::test_newest_baseline_then_newest_creation_wins_in_any_order",
        "test_search::test_real_halves_at_the_antimeridian_stay",
        "test_rules::test_both_halves_of_a_split_datatake_give_pixels",
    ),
    13: ("test_plan::test_a_solar_day_is_counted_at_one_longitude", "test_oracle::test_every_voxel_equals_the_oracle"),
    14: (
        "test_plan::test_overlaps_are_ordered_by_lattice_cloud_and_baseline",
        "test_coverage::test_overlaps_are_ordered_by_the_clouds_over_the_region",
        "test_coverage::test_a_swath_that_ends_before_the_region_is_a_sliver_whatever_its_footprint_says",
        "test_plan::test_scenes_beside_the_region_are_left_out_with_a_reason",
    ),
    15: ("test_mask::test_mask_is_seamless_when_cut_anywhere", "test_shard::test_pixels_do_not_depend_on_the_shards"),
    16: (
        "test_shard::test_a_broken_source_is_missing_where_nothing_else_sees",
        "test_read::test_broken_files_are_errors_and_never_zeros",
    ),
    17: (
        "test_rules::test_a_band_lacking_in_the_first_item_is_no_reason_to_lose_it",
        "test_harmonise::test_lacking_and_refused_bands_are_named",
    ),
    18: ("test_harmonise::test_signed_hrefs_are_stored_unsigned", "test_sign::test_a_refused_token_is_renewed_once"),
    19: ("test_stac_api::test_an_overloaded_api_is_asked_again", "test_hrefs::test_nothing_secret_is_shown_or_stored"),
    20: ("test_read::test_gdal_threads_are_refused", "test_read::test_redirects_to_another_host_are_not_followed"),
}
LAYOUT = Layout("test", (1, 32, 32), (1, 96, 96))


def test_every_rule_has_tests_that_exist() -> None:
    assert sorted(RULES) == list(range(1, 21))
    there = {
        f"{path.stem}::{node.name}"
        for path in Path(__file__).parents[1].rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    }
    assert {name for names in RULES.values() for name in names} <= there


def fill(plan: Plan, collection: str, path: Path | None = None) -> dict[str, np.ndarray]:
    """All shards of a collection put together; also written as a cube where a path is given."""
    recipe = plan.recipe(collection)
    whole = {a.name: np.full(recipe.spec.array_shape(a.name), a.fill, a.dtype) for a in recipe.spec.arrays()}
    for task in plan.tasks:
        if task.collection != collection:
            continue
        filled = fill_shard(task, recipe)
        t, y, x = task.region.slices
        for name, part in filled.arrays.items():
            whole[name][(t, slice(None), y, x) if part.ndim == 4 else (t, y, x)] = part
        if path is not None:
            ShardWriter(path, collection).write(task.region, filled.arrays, key=task.key, sources=filled.outcomes)
    return whole


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> SimulatedWorld:
    """The same ground with and without the offset, as stated and as not, and radar from two sides."""
    return simulate(
        tmp_path_factory.mktemp("rules") / "world",
        SimulateConfig(
            seed=3, tiles=1, tile_px=160, overlap_px=0, clouds=0.0, block_px=128,
            dates=(dt.date(2022, 6, 16), dt.date(2022, 6, 21)), radiometry=("subtracted", "mislabelled"),
            radar_dates=(dt.date(2022, 6, 15), dt.date(2022, 6, 22), dt.date(2022, 6, 27)),
        ),
    )  # fmt: skip


# Rule 3


def test_mislabelled_scenes_follow_the_policy(world: SimulatedWorld) -> None:
    def ingest(policy: Any) -> tuple[Plan, np.ndarray]:
        config = IngestConfig(collections=("sentinel-2-l2a",), bands=("blue", "red"), offset_policy=policy, mask="none")
        plan = make_plan(str(world.catalog), config)
        return plan, np.median(fill(plan, "sentinel-2-l2a")["reflectance"], axis=(2, 3))

    repaired, dn = ingest("repair")
    assert [row["dn_offset"] for row in repaired.items["sentinel-2-l2a"]] == [0, -1000]
    # five days apart the same ground is nearly as bright; 1000 too many would be several times as bright
    np.testing.assert_allclose(dn[1], dn[0], rtol=0.35)
    assert any("the pixels are followed (-1000)" in text for text in repaired.warnings)
    warned, raw = ingest("warn")
    verdicts = warned.statistics["sentinel-2-l2a"]["offset_verdicts"]
    assert sorted(v["verdict"] for v in verdicts.values()) == ["confirmed", "contradicted"]
    np.testing.assert_allclose(raw[1], dn[1] + 1000)
    assert any("the metadata are followed" in text for text in warned.warnings)
    with pytest.raises(InvalidInput, match=r"1000 is still in them.*--offset-policy repair follows the pixels"):
        ingest("fail")


# Rule 6


def test_radar_from_items_to_cube(world: SimulatedWorld, tmp_path: Path) -> None:
    config = IngestConfig(bands=("blue", "vv", "vh"), mask="none")
    plan = make_plan(str(world.catalog), config)
    path = tmp_path / "cube.zarr"
    create_cube(path, plan.specs, items=plan.item_tables(), provenance=plan.provenance())
    whole = {name: fill(plan, name, path) for name in ("sentinel-1-rtc", "sentinel-2-l2a")}
    cube = open_cube(path)
    radar = cube.dataset("sentinel-1-rtc")
    assert radar.backscatter.dtype == np.float32
    assert [str(t)[:10] for t in radar.time.values] == ["2022-06-15", "2022-06-22", "2022-06-27"]
    assert cube.spec("sentinel-2-l2a").shape[0] == 2, "each sensor has its own time axis"
    assert radar.orbit_direction.values.tolist() == ["ascending", "descending", "ascending"]
    assert set(radar.platform.values.tolist()) == {"sentinel-1a"}
    assert (radar.relative_orbit.values > 0).all()
    np.testing.assert_array_equal(radar.backscatter.values, whole["sentinel-1-rtc"]["backscatter"])
    item = cube.items("sentinel-1-rtc")[0]["id"]
    file = next(Path(world.path).glob(f"sentinel-1-rtc/{item}/vv.tif"))
    with rasterio.open(file) as dataset:  # linear power, as it is in the file: no decibels, no scale
        # by hand, as rasterio reads beyond a file through a VRT, which no process opens that has read with terrashard
        window = rasterio.windows.from_bounds(*plan.grid.bounds, dataset.transform).round()
        inside = window.intersection(rasterio.windows.Window(0, 0, dataset.width, dataset.height))
        power = np.full((int(window.height), int(window.width)), -32768, np.float32)
        top, left = int(inside.row_off - window.row_off), int(inside.col_off - window.col_off)
        power[top : top + int(inside.height), left : left + int(inside.width)] = dataset.read(1, window=inside)
    power = np.where(power == -32768, np.nan, power)
    np.testing.assert_array_equal(radar.backscatter.values[0, 0], power)
    assert np.nanmin(power) > 0
    assert pair_collections(cube, "sentinel-2-l2a", "sentinel-1-rtc").index.tolist() == [0, 1]


def test_zero_borders_of_old_radar_scenes_are_no_measurement(tmp_path: Path) -> None:
    grid = Grid("EPSG:32633", (20.0, 0.0, 500_000.0, 0.0, -20.0, 5_000_000.0), (24, 24))
    power = np.full(grid.shape, 0.1, np.float32)
    power[:, :4] = 0.0
    scene = make_scene(
        tmp_path, "old", grid, {"vv": power}, collection="sentinel-1-rtc", product="sentinel-1-rtc",
        datetime="2016-08-01T05:00:00Z", platform="sentinel-1a",
    )  # fmt: skip
    got = fill(
        plan_scenes([scene], probe_headers([scene]), IngestConfig(bands=("vv",)), layout=LAYOUT), "sentinel-1-rtc"
    )
    assert np.isnan(got["backscatter"][0, 0, :, :4]).all()
    assert (got["status"][0, :, :4] == 0).all()
    assert (got["status"][0, :, 4:] == 1).all()


@pytest.mark.real_data
def test_grd_is_refused_on_the_command_line(shared_data: Path, capfd: pytest.CaptureFixture[str]) -> None:
    item = next((shared_data / "stac" / "stactools-sentinel1" / "examples" / "grd").glob("S1A_IW*/*.json"))
    assert main(["plan", str(item)]) == 2
    line = capfd.readouterr().err
    assert "GRD" in line
    assert "sentinel-1-rtc" in line
    assert "Traceback" not in line


# Rule 9


def test_overviews_of_files_are_never_read(tmp_path: Path) -> None:
    """A target coarser than an overview is still made of the full pixels: averages of averages, and modes, differ."""
    fine = Grid("EPSG:32633", (10.0, 0.0, 500_000.0, 0.0, -10.0, 5_000_000.0), (192, 192))
    rng = np.random.default_rng(2)
    dn = rng.integers(1, 9000, fine.shape).astype(np.uint16)
    dn[rng.random(fine.shape) < 0.2] = 0
    scl = rng.choice(np.array([4, 5, 8], np.uint8), size=fine.shape)
    scene = make_scene(tmp_path, "S", fine, {"red": dn, "scl": scl})
    for band, wrong in (("red", 7), ("scl", 11)):
        with rasterio.open(scene.assets[band].href, "r+") as dataset:
            dataset.build_overviews([2, 4, 8])
        with rasterio.open(scene.assets[band].href, "r+", OVERVIEW_LEVEL=0) as overview:
            overview.write(np.full((1, 96, 96), wrong, overview.dtypes[0]))
    for metres in (10, 15, 20, 40, 80):
        config = IngestConfig(
            bands=("red", "scl"), resolution=metres, mask="none", resampling="nearest" if metres == 15 else "bilinear"
        )
        plan = plan_scenes([scene], probe_headers([scene]), config, layout=LAYOUT)
        got = fill(plan, "sentinel-2-l2a")
        assert 11 not in got["scl"], metres
        if metres in (20, 40, 80):
            factor = metres // 10
            blocks = (
                dn.reshape(192 // factor, factor, 192 // factor, factor).swapaxes(1, 2).reshape(-1, factor * factor)
            )
            many = (blocks > 0).sum(axis=1)
            mean = blocks.sum(axis=1) / np.maximum(many, 1)
            seen = many > 0
            stored = got["reflectance"][0, 0].ravel()
            assert np.abs(stored[seen] - mean[seen]).max() <= 0.5 + 1e-3


# Rule 10


def test_two_zones_in_one_cube(tmp_path: Path) -> None:
    here = Grid("EPSG:32633", (20.0, 0.0, 700_000.0, 0.0, -20.0, 5_000_040.0), (90, 90))
    x, y = Transformer.from_crs("EPSG:32633", "EPSG:32634", always_xy=True).transform(701_000.0, 5_000_040.0)
    there = Grid("EPSG:32634", (20.0, 0.0, round(x / 20) * 20, 0.0, -20.0, round(y / 20) * 20), (60, 60))
    rng = np.random.default_rng(8)
    first = make_scene(
        tmp_path, "zone33", here, {"red": rng.integers(1, 9000, here.shape).astype(np.uint16)}, cloud_cover=90.0
    )
    second = make_scene(
        tmp_path, "zone34", there, {"red": rng.integers(1, 9000, there.shape).astype(np.uint16)}, cloud_cover=0.0
    )
    config = IngestConfig(bands=("red",), mask="none", resampling="nearest")
    plan = plan_scenes([first, second], probe_headers([first, second]), config, layout=LAYOUT)
    assert plan.grid.crs == "EPSG:32633"
    assert "CRS EPSG:32633: 69% of the source pixels; also EPSG:32634" in plan.summary()
    share = plan.statistics["sentinel-2-l2a"]["resampled_share"]
    assert 0.2 < share < 0.5
    assert f"resampled pixels {share:.1%}" in plan.summary()
    got = fill(plan, "sentinel-2-l2a")
    native = got["source_item"][0] == 0
    assert native.sum() == 90 * 90, "the native zone wins its overlap, cloudier or not"
    row, col = here.offset_of(plan.grid) or (0, 0)
    with rasterio.open(first.assets["red"].href) as dataset:
        np.testing.assert_array_equal(got["reflectance"][0, 0, -row : 90 - row, -col : 90 - col], dataset.read(1))
    with rasterio.open(second.assets["red"].href) as dataset:
        source = dataset.read(1)
    ys, xs = np.nonzero(got["source_item"][0] == 1)
    assert len(ys) > 500
    sx, sy = Transformer.from_crs(plan.grid.crs, there.crs, always_xy=True).transform(
        plan.grid.x()[xs], plan.grid.y()[ys]
    )
    expected = source[((there.bounds[3] - sy) // 20).astype(int), ((sx - there.bounds[0]) // 20).astype(int)]
    assert (got["reflectance"][0, 0, ys, xs] == expected).mean() > 0.999
    other = plan_scenes(
        [first, second], probe_headers([first, second]), IngestConfig(bands=("red",), mask="none", crs="EPSG:32634")
    )
    assert "CRS EPSG:32634: as asked; 31% of the source pixels are in it" in other.summary()


@pytest.mark.real_data
def test_real_cells_of_two_zones(shared_data: Path, tmp_path: Path) -> None:
    """A cell of Africa and one of Asia have no grid in common: the choice and the distance are said, never hidden."""
    scenes = []
    for cell in sorted((shared_data / "scenes" / "major_tom" / "S2L2A").glob("*/*/S2*")):
        with rasterio.open(cell / "B04.tif") as dataset:
            grid = Grid(str(dataset.crs), tuple(dataset.transform)[:6], dataset.shape)
            scenes.append(make_scene(tmp_path, cell.name, grid, {"red": dataset.read(1)}))
    assert sorted(s.assets["red"].grid.crs for s in scenes if s.assets["red"].grid) == ["EPSG:32633", "EPSG:32648"]
    with pytest.raises(InvalidInput, match="more than 2000000 on a side"):
        plan_scenes(scenes, probe_headers(scenes), IngestConfig(bands=("red",), mask="none", resolution=1))
    for scene in scenes:
        west, south, east, north = scene.bbox
        asked = IngestConfig(bands=("red",), mask="none", bbox=(west, south, east, north))
        plan = plan_scenes(scenes, probe_headers(scenes), asked, layout=LAYOUT)
        assert "50% of the source pixels; also EPSG" in plan.summary()
        assert [row["id"] for row in plan.items["sentinel-2-l2a"]] == [scene.id]
        assert [drop.item_id for drop in plan.drops] == [s.id for s in scenes if s is not scene]


# Rule 11


@pytest.mark.real_data
def test_real_items_at_the_antimeridian_and_the_poles(shared_data: Path, tmp_path: Path) -> None:
    stac = shared_data / "stac"
    paths = [
        *(stac / "earth_search_33TWN_2016_2022" / "antimeridian_items").glob("*.json"),
        *(stac / "stactools-sentinel2" / "tests").rglob("*T01CCV*/expected_output.json"),
        *(stac / "stactools-sentinel2" / "tests").rglob("*T33XWJ*/expected_output.json"),
        *(stac / "stactools-sentinel2" / "tests").rglob("*T01WC[PS]*/expected_output.json"),
    ]
    seen = set()
    for path in paths:
        item = json.loads(path.read_text())
        for asset in item["assets"].values():  # where the pixels are does not matter here, only where the ground is
            asset["href"] = "B04.tif"
        (tmp_path / path.name).write_text(json.dumps(item))
        (scene,) = find_scenes(str(tmp_path / path.name), IngestConfig(bands=("red",))).scenes
        grid = scene.assets["red"].grid
        assert grid is not None, path
        west, south, east, north = scene.bbox
        assert (east - west) % 360 < 20, (path, scene.bbox)
        probes = {scene.id: SceneProbe({"red": AssetProbe(grid, "uint16", 0)}, scene.dn_offset, "unchecked")}
        plan = plan_scenes([scene], probes, IngestConfig(bands=("red",), mask="none"))
        assert plan.grid == grid, "a scene by itself is its own grid, wherever it lies"
        point = shape(dict(scene.footprint)).representative_point()
        box = (point.x - 0.01, point.y - 0.002, point.x + 0.01, point.y + 0.002)
        asked = plan_scenes([scene], probes, IngestConfig(bands=("red",), mask="none", bbox=box))
        assert max(asked.grid.shape) < 300, (path, asked.grid)
        assert all(task.sources for task in asked.tasks)
        seen.add("antimeridian" if west > east else "pole" if max(abs(south), abs(north)) > 75 else "near")
    assert seen >= {"antimeridian", "pole"}


# Rules 12 and 17


def test_both_halves_of_a_split_datatake_give_pixels(tmp_path: Path) -> None:
    grid = Grid("EPSG:32633", (20.0, 0.0, 500_000.0, 0.0, -20.0, 5_000_000.0), (40, 40))
    halves = []
    for name, rows in (("north", slice(0, 22)), ("south", slice(18, 40))):
        dn = np.zeros(grid.shape, np.uint16)
        dn[rows] = 500 if name == "north" else 900
        halves.append(make_scene(tmp_path, name, grid, {"red": dn}, datatake="GS2A_20230810T100031_042475_N05.09"))
    plan = plan_scenes(halves, probe_headers(halves), IngestConfig(bands=("red",), mask="none"), layout=LAYOUT)
    got = fill(plan, "sentinel-2-l2a")
    assert (got["status"] == 1).all()
    assert [np.unique(got["source_item"][0, rows]).tolist() for rows in (slice(0, 22), slice(22, 40))] == [[0], [1]]


def test_a_band_lacking_in_the_first_item_is_no_reason_to_lose_it(tmp_path: Path) -> None:
    grid = Grid("EPSG:32633", (20.0, 0.0, 500_000.0, 0.0, -20.0, 5_000_000.0), (32, 32))
    dn = np.full(grid.shape, 700, np.uint16)
    poor = make_scene(tmp_path, "a", grid, {"red": dn}, lacking=("nir",), datetime="2023-08-01T10:00:00Z")
    rich = make_scene(tmp_path, "b", grid, {"red": dn, "nir": dn}, datetime="2023-08-02T10:00:00Z")
    plan = plan_scenes(
        [poor, rich], probe_headers([poor, rich]), IngestConfig(bands=("red", "nir"), mask="none"), layout=LAYOUT
    )
    assert plan.specs[0].band_names == ("red", "nir")
    assert any("no asset for nir" in text for text in plan.warnings)
    got = fill(plan, "sentinel-2-l2a")
    assert [np.unique(step).tolist() for step in got["status"]] == [[3], [1]]
    outcome = next(o for t in plan.tasks for o in fill_shard(t, plan.recipes[0]).outcomes if o.state == "missing")
    assert (outcome.item_id, outcome.asset) == ("a", "nir")
    assert json.loads(plan.to_json())["facts"]["sentinel-2-l2a"]["lacking"] == 1
