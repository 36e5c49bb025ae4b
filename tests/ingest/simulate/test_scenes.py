from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pystac
import pytest
import rasterio
import shapely
from pyproj import Transformer
from shapely.geometry import shape
from stac_pydantic import Catalog, Collection, Item

from ingest.simulate import CLASSES, SimulateConfig, SimulatedWorld, simulate
from ingest.simulate.clouds import SCL_CLOUD, scene_classes, sky
from ingest.simulate.ground import Landscape
from ingest.simulate.items import scene_id
from ingest.simulate.spectra import BANDS, surface
from ingest.simulate.strips import _blur, _halve, _majority, dn
from ingest.simulate.swath import scene_swath
from zarr_store.errors import InvalidInput

TINY = SimulateConfig(tile_px=64, overlap_px=16, dates=("2022-06-16",), radar_dates=("2022-06-17",), block_px=128)


def load_items(world: SimulatedWorld, collection: str = "sentinel-2-l2a") -> list[tuple[Path, dict[str, Any]]]:
    paths = sorted((world.path / collection).glob("*/*.json"))
    return [(path.parent, json.loads(path.read_text())) for path in paths]


def read(path: Path) -> np.ndarray:
    with rasterio.open(path) as file:
        return file.read(1)


def tree(root: Path) -> dict[str, str]:
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def test_same_seed_same_bytes_in_another_process(tmp_path: Path) -> None:
    simulate(tmp_path / "here", TINY)
    code = (
        "from ingest.simulate import SimulateConfig, simulate;"
        f"simulate({str(tmp_path / 'there')!r}, SimulateConfig.model_validate_json({TINY.model_dump_json()!r}))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    here = tree(tmp_path / "here")
    assert here == tree(tmp_path / "there")
    assert (
        len(here) == 2 * 13 + 3 + 2 + 1 + 4
    )  # scenes, radar, collections, catalogue, truth (+ names, legend), manifest
    simulate(tmp_path / "other", TINY.model_copy(update={"seed": 8}))
    other = tree(tmp_path / "other")
    assert other["truth.tif"] != here["truth.tif"]


def test_a_second_run_changes_nothing_and_another_config_is_refused(tmp_path: Path) -> None:
    first = simulate(tmp_path / "w", TINY)
    before = {path: path.stat().st_mtime_ns for path in first.path.rglob("*")}
    second = simulate(tmp_path / "w", TINY)
    assert (first.created, second.created) == (True, False)
    assert {path: path.stat().st_mtime_ns for path in first.path.rglob("*")} == before
    with pytest.raises(InvalidInput, match="another simulated world"):
        simulate(tmp_path / "w", TINY.model_copy(update={"seed": 99}))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(InvalidInput, match="is not a simulated world"):
        simulate(tmp_path / "mine", TINY)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def test_a_failed_run_leaves_nothing(tmp_path: Path) -> None:
    def stop(share: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(tmp_path / "w", TINY, on_progress=stop)
    assert not list(tmp_path.iterdir())


def test_progress_rises_to_one(tmp_path: Path) -> None:
    shares: list[float] = []
    simulate(tmp_path / "w", TINY, on_progress=shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_documents_are_valid_stac(small_world: SimulatedWorld) -> None:
    Catalog.model_validate_json((small_world.path / "catalog.json").read_text())
    for name in small_world.collections:
        Collection.model_validate_json((small_world.path / name / "collection.json").read_text())
        for _, item in load_items(small_world, name):
            Item.model_validate(item)
    catalog = pystac.Catalog.from_file(str(small_world.catalog))
    items = list(catalog.get_items(recursive=True))
    assert len(items) == small_world.items == 4 * 2 + 2
    assert {item.collection_id for item in items} == {"sentinel-2-l2a", "sentinel-1-rtc"}
    for entry in items:
        assert Path(str(entry.get_parent().get_self_href())).is_file()
        for asset in entry.assets.values():
            assert Path(str(asset.get_absolute_href())).is_file()


def test_metadata_matches_the_file_headers(small_world: SimulatedWorld) -> None:
    versions = set()
    for folder, item in load_items(small_world):
        modern = item["stac_version"] == "1.1.0"
        versions.add(item["stac_version"])
        assert set(item["assets"]) == {band.key for band in BANDS} | {"scl", "landcover"}
        for asset in item["assets"].values():
            with rasterio.open(folder / asset["href"]) as file:
                assert list(file.shape) == asset["proj:shape"]
                assert list(file.transform)[:6] == asset["proj:transform"]
                about = asset["bands"][0] if modern else asset["raster:bands"][0]
                assert (file.dtypes[0], file.nodata) == (about["data_type"], about["nodata"])
                code = asset["proj:code"] if modern else f"EPSG:{item['properties']['proj:epsg']}"
                assert file.crs.to_string() == code
                assert file.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert ("proj:epsg" in item["properties"]) is not modern
    assert versions == {"1.0.0", "1.1.0"}


@pytest.mark.parametrize("index", range(4))
def test_stored_numbers_invert_to_the_reflectance(
    small_world: SimulatedWorld, small_config: SimulateConfig, index: int
) -> None:
    """The independent way: whole tile at once, no strips, and the offset that the item's words imply."""
    land = Landscape(small_config)
    acquisition = small_config.acquisitions()[index]
    tile = small_config.tile_list()[1]
    item_path = small_world.path / "sentinel-2-l2a" / scene_id(acquisition, tile.name)
    properties = json.loads((item_path / f"{item_path.name}.json").read_text())["properties"]
    wide = tile.grid.window(-1, -1, tile.grid.height + 2, tile.grid.width + 2)
    ground = land.ground(wide)
    face = surface(ground, acquisition)
    above = sky(small_config, acquisition, wide, land.scale)
    truth_says = {"none": 0, "offset": 1000, "subtracted": 0, "mislabelled": 1000}[acquisition.radiometry]
    flag = {"none": None, "offset": False, "subtracted": True, "mislabelled": True}[acquisition.radiometry]
    assert properties.get("earthsearch:boa_offset_applied") is flag
    assert (properties["s2:processing_baseline"] >= "04.00") is (acquisition.radiometry != "none")
    for number, band in enumerate(BANDS):
        expected = _blur(above.over(face.reflectance(number), number))
        grid = tile.grid
        if band.gsd_m == 20:
            expected, grid = _halve(expected), grid.coarsen(2)
        stored = read(item_path / f"{band.name}.tif")
        seen = scene_swath(acquisition, land.world).sees(grid)
        assert np.array_equal(stored != 0, seen)
        error = (stored[seen] - float(truth_says)) / 10_000 - expected[seen]
        assert abs(error.mean()) < 2e-4
        assert 5e-4 < error.std() < 6e-3
    red = read(item_path / "B04.tif")
    below = (red[red > 0] < 1000).mean()
    assert below < 0.001 if truth_says else below > 0.3  # what a check on pixels has to go by


def test_offsets_in_metadata(small_world: SimulatedWorld) -> None:
    for _, item in load_items(small_world):
        asset = item["assets"]["red"]
        offset = asset["bands"][0]["raster:offset"] if "bands" in asset else asset["raster:bands"][0]["offset"]
        assert offset == (0.0 if item["properties"]["s2:processing_baseline"] == "03.01" else -0.1)


def test_dn_never_collides_with_nodata() -> None:
    assert dn(np.array([-0.2, 0.0, 0.1, 9.0], np.float32), 0).tolist() == [1, 1, 1000, 65535]
    assert dn(np.array([-0.2, 0.0, 0.1, 9.0], np.float32), 1000).tolist() == [1, 1000, 2000, 65535]


def test_scl_matches_clouds_and_item_properties(small_world: SimulatedWorld, small_config: SimulateConfig) -> None:
    land = Landscape(small_config)
    acquisition = small_config.acquisitions()[1]
    tile = small_config.tile_list()[0]
    folder = small_world.path / "sentinel-2-l2a" / scene_id(acquisition, tile.name)
    scl = read(folder / "SCL.tif")
    ground = land.ground(tile.grid)
    expected = _majority(
        scene_classes(ground, surface(ground, acquisition), sky(small_config, acquisition, tile.grid, land.scale))
    )
    seen = scl != 0
    assert np.array_equal(scl[seen], expected[seen])
    cover = json.loads((folder / f"{folder.name}.json").read_text())["properties"]["eo:cloud_cover"]
    assert cover == pytest.approx(100 * np.isin(scl[seen], SCL_CLOUD).mean(), abs=1e-5)
    blue = read(folder / "B02.tif")[::2, ::2]
    assert blue[scl == 9].mean() > 2 * blue[scl == 4].mean()


def test_overlap_of_one_datatake_is_the_same_measurement(
    small_world: SimulatedWorld, small_config: SimulateConfig
) -> None:
    px = small_config.overlap_px
    for acquisition in small_config.acquisitions():
        west, east = (
            read(small_world.path / "sentinel-2-l2a" / scene_id(acquisition, tile) / "B08.tif")
            for tile in ("33TWL", "33TXL")
        )
        assert np.array_equal(west[:, -px:], east[:, :px])


def test_footprint_bounds_the_valid_pixels(small_world: SimulatedWorld) -> None:
    to_utm = Transformer.from_crs("EPSG:4326", "EPSG:32633", always_xy=True)
    cut = 0
    for folder, item in load_items(small_world):
        pixels = read(folder / "B04.tif") != 0
        polygon = shapely.transform(shape(item["geometry"]), lambda xy: np.column_stack(to_utm.transform(*xy.T)))
        assert polygon.area == pytest.approx(pixels.sum() * 100, rel=0.01)
        cut += int(not pixels.all())
        assert list(shape(item["geometry"]).bounds) == pytest.approx(item["bbox"], abs=1e-6)
    assert 3 <= cut < 8  # some scenes end at a swath edge, some are whole


def test_swath_edges_are_diagonal_and_belong_to_the_orbit(small_world: SimulatedWorld) -> None:
    west = read(small_world.path / "sentinel-2-l2a" / "S2B_33TWL_20220616_0_L2A" / "B04.tif") != 0  # R079
    east = read(small_world.path / "sentinel-2-l2a" / "S2A_33TXL_20220724_0_L2A" / "B04.tif") != 0  # R122
    assert not west[0, 0]
    assert west[-1, -1]
    assert east[0, 0]
    assert not east[-1, -1]
    # the edge leans: further east in the north, by tan 13.5 degrees
    first = west.argmax(axis=1)
    rows = np.flatnonzero(first > 0)
    assert np.polyfit(rows, first[rows], 1)[0] == pytest.approx(-0.24, abs=0.03)


def test_truth_is_what_the_scenes_carry(small_world: SimulatedWorld, small_config: SimulateConfig) -> None:
    truth = read(small_world.truth)
    world = small_config.world_grid()
    assert truth.shape == world.shape
    assert truth.min() >= 1
    for folder, item in load_items(small_world):
        tile = next(t for t in small_config.tile_list() if t.name in item["id"])
        offset = world.offset_of(tile.grid)
        assert offset is not None
        row, col = offset
        part = truth[row : row + tile.grid.height, col : col + tile.grid.width]
        land = read(folder / "landcover.tif")
        seen = read(folder / "B04.tif") != 0
        assert np.array_equal(land, np.where(seen, part, 0))
        values = [c["value"] for c in item["assets"]["landcover"]["classification:classes"]]
        assert values == list(range(8))
        assert "class" in item["assets"]["landcover"]["roles"]
    legend = json.loads(small_world.legend.read_text())
    assert [c["name"] for c in legend["classes"]] == [c.name for c in CLASSES]
    with rasterio.open(small_world.truth) as file:
        assert file.colormap(1)[3][:3] == CLASSES[2].colour
        assert file.tags(1)["class_3"] == "forest"


def test_manifest_lists_every_file(small_world: SimulatedWorld) -> None:
    manifest = json.loads((small_world.path / "world.json").read_text())
    actual = tree(small_world.path)
    actual.pop("world.json")
    assert {name: about["sha256"] for name, about in manifest["files"].items()} == actual
    assert (
        small_world.bytes
        == sum(path.stat().st_size for path in small_world.path.rglob("*") if path.is_file())
        - (small_world.path / "world.json").stat().st_size
    )


def test_a_pixelwise_rule_learns_some_but_not_all(small_world: SimulatedWorld) -> None:
    """Classes separate well in ten bands, yet a pixel alone does not tell everything: context has to help."""
    chosen = [(f, i) for f, i in load_items(small_world) if i["id"].startswith("S2A_33TXL_20220724")]
    folder, _ = chosen[0]
    bands = np.stack([read(folder / f"{name}.tif") for name in ("B02", "B03", "B04", "B08")], -1).astype(float)
    bands = np.concatenate([bands, np.repeat(np.repeat(read(folder / "B11.tif"), 2, 0), 2, 1)[..., None]], -1)
    land = read(folder / "landcover.tif")
    scl = np.repeat(np.repeat(read(folder / "SCL.tif"), 2, 0), 2, 1)
    usable = (land > 0) & ~np.isin(scl, (0, 3, 8, 9, 10))
    left = np.arange(land.shape[1])[None, :] < land.shape[1] // 2
    learn, judge = usable & left, usable & ~left
    scores = []
    for value in range(1, 8):  # Gaussian maximum likelihood, the classic of remote sensing
        sample = bands[learn & (land == value)]
        if len(sample) < 30:
            scores.append(np.full(judge.sum(), -np.inf))
            continue
        covariance = np.cov(sample.T) + np.eye(5) * 25
        apart = bands[judge] - sample.mean(0)
        distance = np.einsum("ni,ij,nj->n", apart, np.linalg.inv(covariance), apart)
        scores.append(-0.5 * distance - 0.5 * np.linalg.slogdet(covariance)[1] + np.log(len(sample)))
    accuracy = (np.argmax(scores, 0) + 1 == land[judge]).mean()
    assert 0.6 < accuracy < 0.97, accuracy


def modules_after(name: str) -> set[str]:
    """What a new process has loaded once it has imported one module."""
    code = f"import sys, {name}; print(*sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True, text=True)
    found = set(printed.stdout.split())
    assert name in found
    return found


def test_importing_ingest_does_not_load_the_simulator() -> None:
    assert not [name for name in modules_after("ingest") if "simulate" in name or name.startswith("jax")]
    assert not {"jax", "fastapi"} & modules_after("ingest.simulate.scenes")
