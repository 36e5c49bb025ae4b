"""Planning: grids, groups, order, drops, JSON. No pixel is read here but headers of tiny files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ingest.plan.grouping import group_scenes, overlap_order, parse_time, solar_day
from ingest.plan.making import plan_scenes
from ingest.plan.plan import Plan
from ingest.plan.probe import AssetProbe, SceneProbe
from ingest.plan.target import project_bounds
from ingest.plan.task import PlannedScene, ShardTask
from ingest.request.config import IngestConfig
from ingest.scenes.scene import AssetRef, Scene
from zarr_store.errors import AssetUnreadable, InvalidInput, NothingFound
from zarr_store.grid import Grid

TILE = Grid("EPSG:32633", (10.0, 0.0, 499_980.0, 0.0, -10.0, 5_200_020.0), (600, 600))


def coarse(grid: Grid, factor: int) -> Grid:
    return grid.coarsen(factor)


def scene(item_id: str, grid: Grid = TILE, *, bands: tuple[str, ...] = ("red", "nir"), **fields: Any) -> Scene:
    assets = {
        band: AssetRef(
            band, band, f"/nowhere/{item_id}/{band}.tif", grid=grid, nodata=0, kind="class" if band == "scl" else "data"
        )
        for band in bands
    }
    west, south, east, north = grid.lonlat_bounds()
    ring = [[west, south], [east, south], [east, north], [west, north], [west, south]]
    settings: dict[str, Any] = {
        "datetime": "2023-08-10T10:00:00Z", "collection": "sentinel-2-l2a", "product": "sentinel-2-l2a", "lacking": (),
        "provider": "terrashard", "bbox": (west, south, east, north),
        "footprint": {"type": "Polygon", "coordinates": [ring]},
    }  # fmt: skip
    return Scene(id=item_id, assets=assets, **{**settings, **fields})


def probes(scenes: list[Scene], headers: dict[str, Grid] | None = None) -> dict[str, SceneProbe]:
    """Headers as the metadata say, or by band as given."""
    return {
        one.id: SceneProbe(
            assets={
                band: AssetProbe(grid=(headers or {}).get(band, asset.grid), dtype="uint16", nodata=0)
                for band, asset in one.assets.items()
            },
            dn_offset=one.dn_offset,
            verdict="confirmed",
        )
        for one in scenes
    }


def plan(scenes: list[Scene], config: IngestConfig | None = None, headers: dict[str, Grid] | None = None) -> Plan:
    return plan_scenes(scenes, probes(scenes, headers), config or IngestConfig(bands=("red", "nir"), mask="none"))


def test_twenty_metre_bands_nest_on_a_ten_metre_grid() -> None:
    scenes = [scene("A", bands=("red", "swir16", "scl"))]
    headers = {"swir16": coarse(TILE, 2), "scl": coarse(TILE, 2)}
    made = plan(scenes, IngestConfig(bands=("red", "swir16", "scl")), headers)
    assert made.grid == TILE
    # red is copied, swir16 is interpolated, and classes do not count
    assert made.statistics["sentinel-2-l2a"]["resampled_share"] == 0.5
    west, south, east, north = TILE.window(101, 77, 200, 150).lonlat_bounds()
    cut = plan(scenes, IngestConfig(bands=("red", "swir16", "scl"), bbox=(west, south, east, north)), headers)
    left, bottom, right, top = cut.grid.bounds
    assert cut.grid.resolution == (10.0, 10.0)
    assert all(
        edge % 20 == corner % 20 for edge, corner in [(left, 499_980), (right, 499_980), (top, 20), (bottom, 20)]
    )
    asked = project_bounds((west, south, east, north), TILE.crs)
    assert left <= asked[0]
    assert top >= asked[3]
    assert asked[0] - left < 20
    assert top - asked[3] < 20


def test_file_headers_win_over_metadata() -> None:
    small = Grid(TILE.crs, (120.0, 0.0, 499_980.0, 0.0, -120.0, 5_200_020.0), (50, 50))
    made = plan([scene("A")], headers={"red": small, "nir": small})
    assert (made.grid.resolution, made.grid.shape) == ((120.0, 120.0), (50, 50))


def test_the_zone_and_lattice_with_most_pixels_are_taken() -> None:
    half = Grid(TILE.crs, (10.0, 0.0, 499_985.0, 0.0, -10.0, 5_200_020.0), (600, 500))
    other = Grid("EPSG:32634", (10.0, 0.0, 300_000.0, 0.0, -10.0, 5_200_020.0), (600, 610))
    made = plan([scene("A"), scene("B", half), scene("C", other)])
    assert made.grid.crs == "EPSG:32633"
    assert made.grid.offset_of(TILE) is not None
    assert made.grid.offset_of(half) is None
    assert "lattice: corner (499980, 5200020), shared by" in made.summary(), "metres are written plainly"
    share = made.statistics["sentinel-2-l2a"]["resampled_share"]
    assert 0.5 < share < 0.75
    asked = plan(
        [scene("A"), scene("B", half), scene("C", other)], IngestConfig(bands=("red",), crs="EPSG:32634", mask="none")
    )
    assert asked.grid.crs == "EPSG:32634"
    assert asked.grid.offset_of(other) is not None


def test_a_solar_day_is_counted_at_one_longitude() -> None:
    assert solar_day(parse_time("2023-08-10T23:30:00Z"), 20).isoformat() == "2023-08-11"
    assert solar_day(parse_time("2023-08-11T00:30:00Z"), 20).isoformat() == "2023-08-11"
    assert solar_day(parse_time("2023-08-10T00:30:00Z"), 190).isoformat() == "2023-08-09"
    late = [scene("A", datetime="2023-08-10T23:50:00Z"), scene("B", datetime="2023-08-11T00:10:00Z")]
    order = overlap_order(lambda _: 0)
    steps, remarks = group_scenes(late, group="solar-day", longitude=170, order=order)
    assert [step.label for step in steps] == ["2023-08-11"]
    assert remarks == []
    steps, _ = group_scenes(late, group="solar-day", longitude=0, order=order)
    assert [step.label for step in steps] == ["2023-08-10", "2023-08-11"]


def test_steps_of_single_items_get_times_of_their_own() -> None:
    twins = [scene("B"), scene("A"), scene("C", datetime="2023-09-01T10:00:00Z")]
    steps, remarks = group_scenes(twins, group="item", longitude=15, order=overlap_order(lambda _: 0))
    assert [(s.label, s.time) for s in steps] == [
        ("A", "2023-08-10T10:00:00"), ("B", "2023-08-10T10:00:01"), ("C", "2023-09-01T10:00:00")
    ]  # fmt: skip
    assert len(remarks) == 1
    assert "B" in remarks[0]
    months, _ = group_scenes(twins, group="month", longitude=15, order=overlap_order(lambda _: 0))
    assert [(s.label, len(s.scenes)) for s in months] == [("2023-08", 2), ("2023-09", 1)]


def test_overlaps_are_ordered_by_lattice_cloud_and_baseline() -> None:
    half = Grid(TILE.crs, (10.0, 0.0, 499_985.0, 0.0, -10.0, 5_200_020.0), (500, 500))
    scenes = [
        scene("cloudy", cloud_cover=80.0),
        scene("shifted", half, cloud_cover=0.0),
        scene("old", cloud_cover=5.0, baseline="02.14"),
        scene("new", cloud_cover=5.0, baseline="05.00"),
        scene("unknown", cloud_cover=None),
    ]
    made = plan(scenes)
    assert [s.item_id for s in made.tasks[0].sources] == ["new", "old", "cloudy", "unknown", "shifted"]
    ids = [row["id"] for row in made.items["sentinel-2-l2a"]]
    assert all(ids[s.item] == s.item_id for s in made.tasks[0].sources)


def test_radar_is_its_own_collection_on_the_same_grid() -> None:
    radar = scene(
        "S1", coarse(TILE, 2), bands=("vv", "vh"), collection="sentinel-1-rtc", product="sentinel-1-rtc",
        datetime="2023-08-11T16:50:00Z", platform="sentinel-1a", relative_orbit=44, orbit_direction="ascending",
    )  # fmt: skip
    other = replace(radar, id="S1d", relative_orbit=51, orbit_direction="descending", datetime="2023-08-11T05:10:00Z")
    made = plan([scene("A"), radar, other], IngestConfig(bands=("red", "vv", "vh"), mask="scl"))
    s2, s1 = made.specs
    assert (s2.kind, s2.band_names, s1.kind, s1.band_names) == ("reflectance", ("red",), "backscatter", ("vv", "vh"))
    assert s1.grid == s2.grid == TILE
    assert s1.times == ("2023-08-11T05:10:00", "2023-08-11T16:50:00")
    assert made.recipe("sentinel-1-rtc").mask_layer is None
    assert {t.collection for t in made.tasks} == {"sentinel-2-l2a", "sentinel-1-rtc"}


def test_a_region_outside_the_scenes_names_both_boxes() -> None:
    with pytest.raises(NothingFound, match=r"\(2\.0000, 41\.0000, 3\.0000, 42\.0000\).*\(14\.9997") as caught:
        plan([scene("A")], IngestConfig(bands=("red", "nir"), mask="none", bbox=(2, 41, 3, 42)))
    assert caught.value.exit_code == 4
    with pytest.raises(NothingFound):
        plan_scenes([], {}, IngestConfig())


def test_scenes_beside_the_region_are_left_out_with_a_reason() -> None:
    far = Grid(TILE.crs, (10.0, 0.0, 600_000.0, 0.0, -10.0, 5_200_020.0), (600, 600))
    made = plan(
        [scene("A"), scene("far", far)], IngestConfig(bands=("red", "nir"), mask="none", bbox=TILE.lonlat_bounds())
    )
    assert [(d.item_id, "does not reach" in d.reason) for d in made.drops] == [("far", True)]
    assert "far" in made.summary()
    west, south, _, north = TILE.lonlat_bounds()
    edge = {"type": "Polygon", "coordinates": [[[west, south], [west + 1e-6, south], [west, north], [west, south]]]}
    made = plan([scene("A"), scene("sliver", footprint=edge)])
    assert [(d.item_id, "sliver" in d.reason) for d in made.drops] == [("sliver", True)]


def test_every_shard_has_a_task_even_where_no_scene_reaches() -> None:
    far = Grid(TILE.crs, (10.0, 0.0, 545_000.0, 0.0, -10.0, 5_200_020.0), (600, 600))
    made = plan([scene("A"), scene("B", far)])
    assert {task.index for task in made.tasks} == set(made.specs[0].shards())
    assert [[s.item_id for s in t.sources] for t in made.tasks] == [["A"], [], ["B"]]


def test_json_both_ways_and_a_stable_digest(tmp_path: Path) -> None:
    made = plan([scene("A", updated="2024-01-01T00:00:00Z"), scene("B", datetime="2023-08-12T10:00:00Z")])
    again = Plan.from_json(made.to_json())
    assert again == made
    assert again.digest == made.digest
    assert (
        plan([scene("B", datetime="2023-08-12T10:00:00Z"), scene("A", updated="2024-01-01T00:00:00Z")]).digest
        == made.digest
    )
    assert plan([scene("A"), scene("B", datetime="2023-08-12T10:00:00Z")]).digest != made.digest
    for changed in ({"mask": "scl"}, {"resampling": "cubic"}, {"resolution": 20}):
        other = IngestConfig.from_flat({"bands": ("red", "nir"), "mask": "none", **changed})
        assert plan([scene("A", updated="2024-01-01T00:00:00Z")], other).digest != made.digest
    made.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == made
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plan.json"]
    edited = json.loads(made.to_json())
    edited["tasks"][0]["sources"] = []
    with pytest.raises(InvalidInput, match="was changed after it was made"):
        Plan.from_json(json.dumps(edited))
    for broken in ("{", "[]", '{"type": "terrashard-plan"}', '{"type": "terrashard-plan", "format": 99}'):
        with pytest.raises(InvalidInput, match=r"plan again|not a terrashard plan"):
            Plan.from_json(broken)
    with pytest.raises(InvalidInput, match="cannot read plan"):
        Plan.load(tmp_path / "absent.json")


def test_running_options_do_not_change_the_digest() -> None:
    fast = IngestConfig(bands=("red", "nir"), mask="none", workers=7, memory="1GB", on_error="skip")
    assert plan([scene("A")], fast).digest == plan([scene("A")]).digest
    assert "workers" not in plan([scene("A")], fast).config


def test_the_key_of_a_shard_depends_on_all_that_determines_its_pixels() -> None:
    """A shard whose ledger row has the same key is never made again: what changes pixels must change the key."""
    made = plan([scene("A"), scene("B")])
    recipe, task = made.recipes[0], made.tasks[0]
    first, second = task.sources
    assert ShardTask.of(recipe, task.index, task.region, task.sources).key == task.key

    def key_of(sources: tuple[PlannedScene, ...]) -> str:
        return ShardTask.of(recipe, task.index, task.region, sources).key

    def with_assets(**changes: Any) -> PlannedScene:
        return replace(first, assets=tuple(replace(asset, **changes) for asset in first.assets))

    keys = {
        "as planned": task.key,
        "another order, in which the other scene wins": key_of((second, first)),
        "one scene fewer": key_of((first,)),
        "another offset": key_of((with_assets(dn_offset=-1000), second)),
        "another kernel": key_of((with_assets(resampling="cubic"), second)),
        "another nodata value": key_of((with_assets(nodata=7.0), second)),
        "another file": key_of((with_assets(href="/elsewhere/red.tif"), second)),
        "another row of the item table": key_of((replace(first, item=9), second)),
        "another step": key_of((replace(first, step=1), second)),
        "a band that the scene lacks": key_of((replace(first, lacking=("blue",)), second)),
        "another mask": ShardTask.of(
            replace(recipe, mask_layer="scl", mask_classes=(3, 8)), task.index, task.region, task.sources
        ).key,
        "masks that grow": ShardTask.of(
            replace(recipe, mask_layer="scl", mask_classes=(3, 8), mask_dilate_m=20.0), task.index, task.region,
            task.sources,
        ).key,
        "an area that is cut out": ShardTask.of(replace(recipe, clip="{}"), task.index, task.region, task.sources).key,
        "another region": ShardTask.of(recipe, task.index, replace(task.region, y1=7), task.sources).key,
    }  # fmt: skip
    assert len(set(keys.values())) == len(keys), sorted(keys, key=lambda name: keys[name])
    # what files said when they were looked at is not part of it: a file that heals must not make another shard
    assert key_of((with_assets(header=None), second)) == task.key


def test_tasks_are_ordered_hashable_values() -> None:
    tasks = plan([scene("A"), scene("B", datetime="2023-08-12T10:00:00Z")]).tasks
    assert list(tasks) == sorted(tasks, reverse=True)[::-1]
    assert len({task.key for task in tasks}) == len(tasks) == len(set(tasks))


def test_a_file_that_could_not_be_opened_stays_in_the_plan() -> None:
    one = scene("A", lacking=("blue",))
    found = probes([one])
    broken = replace(
        found["A"], assets={**found["A"].assets, "nir": AssetProbe(error="HTTP 404")}, discrepancies=("nir: HTTP 404",)
    )
    made = plan_scenes([one], {"A": broken}, IngestConfig(bands=("blue", "red", "nir"), mask="none"))
    source = made.tasks[0].sources[0]
    assert source.lacking == ("blue",)
    assert source.asset("nir") is not None
    assert source.asset("nir").header is None
    assert any("HTTP 404" in text for text in made.warnings)
    assert any("no asset for blue" in text for text in made.warnings)
    nothing = replace(found["A"], assets={b: AssetProbe(error="refused") for b in one.assets})
    with pytest.raises(AssetUnreadable, match=r"scene A, asset red.*refused"):
        plan_scenes([one], {"A": nothing}, IngestConfig(bands=("red", "nir"), mask="none"))


def test_a_scene_of_which_no_file_opens_keeps_its_place_in_the_grid() -> None:
    east = Grid(TILE.crs, (10.0, 0.0, 499_980.0 + 6000, 0.0, -10.0, 5_200_020.0), (600, 600))
    scenes = [scene("A"), scene("B", east)]
    lost = replace(probes(scenes)["B"], assets={band: AssetProbe(error="HTTP 503") for band in ("red", "nir")})
    for assets in (scenes[1].assets, {b: replace(a, grid=None) for b, a in scenes[1].assets.items()}):
        known = replace(scenes[1], assets=assets)
        made = plan_scenes([scenes[0], known], probes(scenes) | {"B": lost}, IngestConfig(bands=("red",), mask="none"))
        assert made.grid.width >= 1200
        assert made.grid.bounds[0] <= TILE.bounds[0]
        assert {s.item_id for task in made.tasks for s in task.sources} == {"A", "B"}
        assert any("1 scenes without a readable file" in reason for reason in made.reasons)
    assert plan([scene("A")]).grid.width == 600


def test_one_id_in_two_collections_keeps_two_probes() -> None:
    one, other = scene("A"), scene("A", collection="another")
    half = TILE.coarsen(2)
    by_key = {one.key: probes([one])["A"], other.key: probes([other], {"red": half, "nir": half})["A"]}
    made = plan_scenes([one, other], by_key, IngestConfig(bands=("red", "nir"), mask="none"))
    headers = {t.collection: t.sources[0].asset("red").header for t in made.tasks}
    assert headers == {"sentinel-2-l2a": TILE, "another": half}


def test_an_endless_grid_is_refused() -> None:
    with pytest.raises(InvalidInput, match="give a smaller region"):
        plan([scene("A")], IngestConfig(bands=("red", "nir"), mask="none", resolution=0.001))


def test_the_antimeridian_does_not_tear_a_region_apart() -> None:
    fiji = Grid("EPSG:32701", (100.0, 0.0, 99_960.0, 0.0, -100.0, 8_200_000.0), (1098, 1098))
    west, south, east, north = project_to_lonlat(fiji)
    assert west > east, "the tile must cross"
    made = plan([scene("F", fiji, bbox=(west, south, east, north), footprint={
        "type": "MultiPolygon",
        "coordinates": [
            [[[west, south], [180, south], [180, north], [west, north], [west, south]]],
            [[[-180, south], [east, south], [east, north], [-180, north], [-180, south]]],
        ],
    })], IngestConfig(bands=("red", "nir"), mask="none", bbox=(west, south, east, north)))  # fmt: skip
    assert made.grid.crs == "EPSG:32701"
    assert made.grid.width < 2000
    assert len(made.tasks[0].sources) == 1


def project_to_lonlat(grid: Grid) -> tuple[float, float, float, float]:
    west, south, east, north = grid.lonlat_bounds()
    return west, south, east, north


def test_estimates_are_positive() -> None:
    facts = plan([scene("A")]).statistics["sentinel-2-l2a"]
    assert facts["bytes_to_read"] == 2 * 600 * 600 * 2
    assert facts["bytes_to_write"] > 0
    assert facts["requests"] > 0
    assert np.isfinite(facts["resampled_share"])


def test_the_effort_counts_the_blocks_that_are_fetched() -> None:
    from ingest.plan.statistics import fetched_pixels

    file = Grid("EPSG:32633", (10, 0, 500_000, 0, -10, 5_200_000), (1000, 1000))
    window = file.window(100, 300, 20, 30)
    assert fetched_pixels(file, None, window) == (20 * 30, 1)
    assert fetched_pixels(file, (256, 256), window) == (256 * 256, 1)  # columns 300…330 lie in one block
    assert fetched_pixels(file, (256, 256), file.window(250, 250, 20, 20)) == (512 * 512, 2)
    assert fetched_pixels(file, (16, 1000), window) == (32 * 1000, 2)  # strips are as wide as the file
    assert fetched_pixels(file, (256, 256), file.window(990, 990, 10, 10)) == ((1000 - 768) ** 2, 1)  # cut at its edge
    assert fetched_pixels(file, (256, 256), file.window(2000, 2000, 10, 10)) == (0, 0)
    shifted = Grid("EPSG:32633", (10, 0, 500_005, 0, -10, 5_200_000), (20, 20))
    assert fetched_pixels(file, None, shifted)[0] > 20 * 20  # interpolation reads a margin


def test_the_plan_states_what_the_read_fetches(tmp_path: Path) -> None:
    """A small region of a file in strips: the bytes that are read are those of whole strips."""
    from ingest.plan.probe import probe_scenes
    from ingest.testing import make_scene, write_raster

    grid = Grid("EPSG:32633", (10, 0, 500_000, 0, -10, 5_200_000), (512, 512))
    pixels = np.random.default_rng(1).integers(1, 999, grid.shape).astype(np.uint16)
    scene = make_scene(tmp_path, "A", grid, {"blue": pixels})
    strips = {"tiled": False, "blockxsize": None, "blockysize": 16, "compress": None}
    path = write_raster(tmp_path / "A" / "blue.tif", grid, pixels, **strips)
    west, south, east, north = grid.window(200, 200, 32, 32).lonlat_bounds()
    config = IngestConfig(bands=("blue",), mask="none", bbox=(west, south, east, north))
    plan = plan_scenes([scene], probe_scenes([scene], config), config)
    told = plan.statistics["sentinel-2-l2a"]["bytes_to_read"]
    rows = {row // 16 for row in range(200, 200 + plan.grid.height)}
    assert path.stat().st_size * 32 / 512 < told < path.stat().st_size * (len(rows) + 2) * 16 / 512
