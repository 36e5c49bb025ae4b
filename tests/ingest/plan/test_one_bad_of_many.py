"""One damaged file or odd item among good ones is left out and named; it ends no plan and no import."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cli.main import main
from ingest.plan.making import make_plan, plan_scenes
from ingest.plan.probe import probe_scenes
from ingest.raster import access as access_module
from ingest.raster.access import with_asset
from ingest.raster.faults import is_file_fault
from ingest.raster.read import read_on_grid
from ingest.request.config import IngestConfig
from ingest.scenes.search import find_scenes
from ingest.testing import make_scene, write_raster
from zarr_store.errors import AssetUnreadable, InvalidInput
from zarr_store.grid import Grid

from ..tiffs import (
    GDAL_METADATA,
    GEO_KEYS,
    HEIGHT,
    NODATA,
    PIXEL_SCALE,
    TIEPOINT,
    TILE_OFFSETS,
    TILE_WIDTH,
    WIDTH,
    Tag,
    doubles,
    longs,
    shorts,
    text,
    with_tags,
)

GRID = Grid("EPSG:32633", (10.0, 0.0, 499_980.0, 0.0, -10.0, 5_200_020.0), (64, 64))
CONFIG = IngestConfig(bands=("red",), mask="none", retries=0, timeout_s=2)
Make = Callable[..., dict[str, Any]]

WILD: dict[str, Mapping[int, Tag | None]] = {
    "scale nan": {PIXEL_SCALE: doubles(float("nan"), float("nan"), 0)},
    "scale inf": {PIXEL_SCALE: doubles(float("inf"), float("inf"), 0)},
    "scale 1e300": {PIXEL_SCALE: doubles(1e300, 1e300, 0)},
    "scale 1e-300": {PIXEL_SCALE: doubles(1e-300, 1e-300, 0)},
    "scale 0": {PIXEL_SCALE: doubles(0, 0, 0)},
    "scale of a micrometre": {PIXEL_SCALE: doubles(1e-6, 1e-6, 0)},
    "scale of a hand": {PIXEL_SCALE: doubles(0.1, 0.1, 0)},
    "scale of a country": {PIXEL_SCALE: doubles(5e5, 5e5, 0)},
    "scale negative": {PIXEL_SCALE: doubles(-10, -10, 0)},
    "origin nan": {TIEPOINT: doubles(0, 0, 0, float("nan"), float("nan"), 0)},
    "origin 1e300": {TIEPOINT: doubles(0, 0, 0, 1e300, -1e300, 0)},
    "origin 1e7 km": {TIEPOINT: doubles(0, 0, 0, 1e10, 5e6, 0)},
    "origin off the zone": {TIEPOINT: doubles(0, 0, 0, 9e7, 5_200_020, 0)},
    "tiepoint inf": {TIEPOINT: doubles(float("inf"), float("-inf"), 0, 499_980, 5_200_020, 0)},
    "no place": {PIXEL_SCALE: None, TIEPOINT: None},
    "crs of no number": {GEO_KEYS: shorts(1, 1, 0, 2, 1024, 0, 1, 1, 3072, 0, 1, 65000)},
    "crs of the user without parts": {GEO_KEYS: shorts(1, 1, 0, 2, 1024, 0, 1, 1, 3072, 0, 1, 32767)},
    "crs geocentric": {GEO_KEYS: shorts(1, 1, 0, 2, 1024, 0, 1, 3, 2048, 0, 1, 4978)},
    "keys beyond the end": {GEO_KEYS: shorts(1, 1, 0, 9999, 1024, 34737, 60000, 60000)},
    "width 0": {WIDTH: longs(0)},
    "height 0": {HEIGHT: longs(0)},
    "width of all bits": {WIDTH: longs(0xFFFFFFFF)},
    "width negative as signed": {WIDTH: longs(0x80000000), HEIGHT: longs(0x80000000)},
    "width 2^31-1": {WIDTH: longs(0x7FFFFFFF), HEIGHT: longs(0x7FFFFFFF)},
    "tiles of 0": {TILE_WIDTH: longs(0)},
    "tiles of 2^31": {TILE_WIDTH: longs(0x80000000)},
    "offsets beyond the end": {TILE_OFFSETS: longs(0xFFFFFFF0)},
    "no offsets": {TILE_OFFSETS: None},
    "more tags than libtiff reads": {50_000 + n: longs(n) for n in range(5000)},
    "rotated": {PIXEL_SCALE: None, TIEPOINT: None, 34264: doubles(7, 7, 0, 5e5, 7, -7, 0, 5.2e6, *[0.0] * 7, 1)},
    "matrix 1e300": {PIXEL_SCALE: None, TIEPOINT: None, 34264: doubles(*[1e300] * 16)},
    "matrix nan": {PIXEL_SCALE: None, TIEPOINT: None, 34264: doubles(*[float("nan")] * 16)},
}  # fmt: skip
HARMLESS: dict[str, Mapping[int, Tag | None]] = {
    "nodata nan": {NODATA: text("nan")},
    "nodata inf": {NODATA: text("-inf")},
    "nodata 1e400": {NODATA: text("1e400")},
    "nodata 1e300": {NODATA: text("1e300")},
    "nodata of no number": {NODATA: text("\x1b[31mabc" * 100)},
    "nodata 10^400": {NODATA: text("9" * 400)},
    "metadata no xml": {GDAL_METADATA: text("<GDALMetadata><Item name=" * 500)},
    "thousands of tags": {50_000 + n: longs(n) for n in range(3000)},
}


@pytest.fixture
def scenes(tmp_path: Path) -> list[Any]:
    """Three scenes of one place; the test damages a file of the second."""
    rng = np.random.default_rng(3)
    return [
        make_scene(
            tmp_path, f"s{day}", GRID, {"red": rng.integers(1, 4000, GRID.shape, np.uint16)},
            datetime=f"2023-08-{day}T10:00:00Z", baseline="05.09", offset_evidence="test",
        )
        for day in (10, 15, 20)
    ]  # fmt: skip


def damage(scene: Any, tags: Mapping[int, Tag | None]) -> Path:
    path = Path(scene.assets["red"].href)
    return with_tags(path, path, tags)


@pytest.mark.parametrize("tags", WILD.values(), ids=WILD.keys())
def test_a_wild_header_is_the_error_of_its_asset(
    scenes: list[Any], tags: Mapping[int, Tag | None], caplog: pytest.LogCaptureFixture
) -> None:
    path = damage(scenes[1], tags)
    probes = probe_scenes(scenes, CONFIG)
    bad = probes[scenes[1].key].assets["red"]
    if bad.grid is not None:  # the pixels are what is damaged: found when they are read, by us and by GDAL
        with pytest.raises(AssetUnreadable, match="s15"):
            read_on_grid(scenes[1].assets["red"], bad.grid, GRID, "nearest", scene="s15")
    else:
        assert bad.error is not None
        assert "s15" in bad.error
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR and r.name.startswith("ingest")]
    plan = plan_scenes(scenes, probes, CONFIG)
    assert plan.grid == GRID
    assert {str(row["id"]) for row in plan.items["sentinel-2-l2a"]} == {"s10", "s15", "s20"}
    type(plan).from_json(plan.to_json())
    with pytest.raises(AssetUnreadable) as caught:
        read_on_grid(replace(scenes[1].assets["red"], href=str(path)), GRID, GRID, "nearest", scene="s15")
    assert caught.value.exit_code == 8


@pytest.mark.parametrize("tags", HARMLESS.values(), ids=HARMLESS.keys())
def test_odd_tags_beside_good_pixels_are_borne(scenes: list[Any], tags: Mapping[int, Tag | None]) -> None:
    asset = scenes[1].assets["red"]
    expected = read_on_grid(asset, GRID, GRID, "nearest", scene="s15")
    damage(scenes[1], tags)
    plan = plan_scenes(scenes, probe_scenes(scenes, CONFIG), CONFIG)
    assert plan.grid == GRID
    np.testing.assert_array_equal(read_on_grid(asset, GRID, GRID, "nearest", scene="s15"), expected)


@pytest.mark.parametrize("error", ["CPLE_AppDefinedError", "CPLE_NoWriteAccessError", "CPLE_OutOfMemoryError"])
def test_errors_of_gdal_that_are_no_rasterio_errors_are_of_the_file(
    scenes: list[Any], error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import rasterio._err

    fired = []
    bad = scenes[1].assets["red"].href
    real = access_module._gdal_dataset

    @contextmanager
    def broken(found: Any, href: str, *args: Any) -> Iterator[Any]:
        if href == bad:
            fired.append(href)
            raise getattr(rasterio._err, error)(3, 1, "TIFFReadDirectory: damaged")
        with real(found, href, *args) as dataset:
            yield dataset

    monkeypatch.setattr(access_module, "_gdal_dataset", broken)
    probes = probe_scenes(scenes, CONFIG)
    assert fired
    assert "TIFFReadDirectory: damaged" in (probes[scenes[1].key].assets["red"].error or "")
    assert plan_scenes(scenes, probes, CONFIG).grid == GRID


def test_a_defect_of_ours_is_not_taken_for_a_fault_of_the_file(scenes: list[Any]) -> None:
    asset = scenes[0].assets["red"]

    def wrong(_: Any) -> None:
        raise ValueError("ours")

    with pytest.raises(ValueError, match="ours"):
        with_asset(asset.href, wrong, scene="s", asset="red")
    with pytest.raises(ValueError, match="invalid literal") as caught:
        int("x")
    assert not is_file_fault(caught.value)


def test_what_nobody_foresaw_of_one_file_is_told_and_the_plan_goes_on(
    scenes: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from ingest.plan import probe

    def broken(scene: Any, *args: Any) -> Any:
        if scene.id == "s15":
            raise KeyError("surprise")
        return real(scene, *args)

    real = probe._conclude
    monkeypatch.setattr(probe, "_conclude", broken)
    probes = probe_scenes(scenes, CONFIG)
    assert "surprise" in probes[scenes[1].key].discrepancies[0]
    assert "please report" in caplog.text
    assert "s15" in "\n".join(plan_scenes(scenes, probes, CONFIG).warnings)
    with pytest.raises(KeyError, match="surprise"):
        probe_scenes(scenes, CONFIG.model_copy(update={"strict": True}))


def test_a_scene_without_a_place_in_the_crs_of_the_cube_is_left_out(tmp_path: Path, scenes: list[Any]) -> None:
    far = Grid("EPSG:3031", (10.0, 0.0, 0.0, 0.0, -10.0, 640.0), (64, 64))  # at the pole, of which UTM knows nothing
    odd = make_scene(tmp_path, "pole", far, {"red": np.ones((64, 64), np.uint16)}, baseline="05.09")
    probes = probe_scenes([*scenes, odd], CONFIG)
    plan = plan_scenes([*scenes, odd], probes, CONFIG.model_copy(update={"bbox": GRID.lonlat_bounds()}))
    assert [drop.item_id for drop in plan.drops] == ["pole"]


ODD_ITEMS: dict[str, dict[str, Any]] = {
    "no time": {"properties": {"datetime": None}},
    "time of Rome": {"properties": {"datetime": "0001-01-01T00:00:00+23:59"}},
    "time 9999": {"properties": {"datetime": "9999-12-31T23:59:59-23:59"}},
    "no properties": {"properties": 3},
    "assets a list": {"assets": [1]},
    "geometry 1e300": {"geometry": {"type": "Point", "coordinates": [1e300, 1e300]}, "bbox": [1e300] * 4},
    "geometry nan": {"geometry": {"type": "Polygon", "coordinates": [[[0, 0], [1, "nan"], [1, 1]]]}},
    "geometry of lists": {"geometry": {"type": "Polygon", "coordinates": [[[[[[[]]]]]]]}},
    "geometry of geometries": {"geometry": {"type": "GeometryCollection", "geometries": [{}]}},
    "collection an object": {"collection": {"id": 1}},
}


@pytest.mark.parametrize("region", [False, True])
@pytest.mark.parametrize("changes", ODD_ITEMS.values(), ids=ODD_ITEMS.keys())
def test_an_odd_item_is_left_out_and_named(
    make_item: Make, tmp_path: Path, changes: dict[str, Any], region: bool, caplog: pytest.LogCaptureFixture
) -> None:
    source = save(tmp_path, [make_item("good"), make_item("odd") | changes])
    asked = CONFIG.model_copy(update={"bbox": (10.0, 40.0, 20.0, 50.0)} if region else {})
    found = find_scenes(source, asked)
    assert [scene.id for scene in found.scenes] == ["good"]
    assert [one.item_id for one in found.unusable] == ["odd"]
    assert "'odd' is left out" in caplog.text
    assert "Traceback" not in caplog.text
    with pytest.raises(InvalidInput):
        find_scenes(source, CONFIG.model_copy(update={"strict": True}))
    alone = save(tmp_path, [make_item("odd") | changes])
    with pytest.raises(InvalidInput):
        find_scenes(alone, CONFIG)


@pytest.mark.parametrize(
    "properties",
    [
        {"eo:cloud_cover": "nan"},
        {"eo:cloud_cover": "inf"},
        {"eo:cloud_cover": 10**400},
        {"sat:relative_orbit": 10**300},
        {"proj:transform": [1e300, 0, 1e300, 0, -1e300, 1e300]},
        {"proj:transform": [10**400, 0, 0, 0, -10, 0]},
        {"proj:shape": [10**400, 1]},
        {"created": {"a": [1]}},
        {"platform": [1, 2]},
        {"s2:datatake_id": {"a": 1}},
        {"grid:code": "x" * 100_000},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "form", [{}, {"file:size": "inf"}, {"file:size": 10**400}, {"raster:bands": [{"scale": "nan", "offset": "inf"}]}]
)
def test_odd_numbers_of_an_item_do_not_end_its_plan(
    make_item: Make, tmp_path: Path, properties: dict[str, Any], form: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    write_raster(tmp_path / "red.tif", GRID, np.full(GRID.shape, 900, np.uint16))
    items = [make_item("good"), make_item("odd")]
    for item in items:
        west, south, east, north = GRID.lonlat_bounds()
        ring = [[west, south], [east, south], [east, north], [west, north], [west, south]]
        item |= {"bbox": [west, south, east, north], "geometry": {"type": "Polygon", "coordinates": [ring]}}
        item["assets"] = {"red": {"href": "red.tif", "raster:bands": [{"nodata": 0, "data_type": "uint16"}]}}
    items[1]["properties"] |= {"datetime": "2023-08-20T10:00:00Z", "s2:datatake_id": "other"} | properties
    items[1]["assets"]["red"] |= form
    source = save(tmp_path, items)
    plan = make_plan(source, CONFIG)
    assert len(plan.items["sentinel-2-l2a"]) == 2
    type(plan).from_json(plan.to_json())
    capfd.readouterr()
    assert main(["search", source, "--bands", "red", "--set", "mask=none", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["count"] == 2


def save(folder: Path, items: list[dict[str, Any]]) -> str:
    path = folder / "items.json"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": items}))
    return str(path)


@pytest.mark.parametrize(
    "name",
    ["scale nan", "scale 1e300", "origin 1e300", "crs of no number", "matrix nan", "width 0", "keys beyond the end"],
)
def test_one_damaged_patch_is_named(tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "patches"
    for number in range(3):
        write_raster(folder / "a" / f"{number}.tif", GRID, np.full(GRID.shape, number + 1, np.uint8))
    write_raster(folder / "b" / "3.tif", GRID, np.full(GRID.shape, 4, np.uint8))
    bad = folder / "a" / "1.tif"
    with_tags(bad, bad, WILD[name])
    code = main(["samples", str(folder), str(tmp_path / "s.zarr"), "--skip-bad", "--json"])
    printed = capfd.readouterr()
    assert code == 0, printed.err
    told = json.loads(printed.out)
    assert told["samples"] in (3, 4)
    if told["samples"] == 3:
        assert "1.tif" in told["left_out"][0]
    # all are samples only where the picture is whole and its place is what is not known
    assert told["samples"] == 3 or told["without_place"] == 1
