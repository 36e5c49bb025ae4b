"""What files state of their numbers beside the numbers: masks, scales, offsets, units and signs are used or refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from rasterio.enums import ColorInterp

import ingest.raster.gdal_read as gdal_read
import ingest.raster.header as header_module
from ingest.plan.making import make_plan
from ingest.plan.plan import Plan
from ingest.raster.access import header_cache
from ingest.raster.coarse import read_coarse
from ingest.raster.read import read_on_grid
from ingest.raster.values import Stated, Values
from ingest.request.config import IngestConfig
from ingest.run.loop import IngestReport, run
from ingest.scenes.scene import AssetRef
from ingest.testing import write_raster
from ingest.upkeep.repair import verify_sources
from zarr_store.errors import AssetUnreadable, InvalidInput
from zarr_store.grid import Grid
from zarr_store.read import open_cube

SIZE = 64
GRID = Grid("EPSG:32633", (10.0, 0.0, 500_000.0, 0.0, -10.0, 5_100_000.0), (SIZE, SIZE))
S2, S1 = "sentinel-2-l2a", "sentinel-1-rtc"
DN = np.random.default_rng(1).integers(2500, 6000, GRID.shape).astype(np.uint16)
DB = np.random.default_rng(2).normal(-12, 3, GRID.shape).astype(np.float32)


def with_mask(path: Path, pixels: np.ndarray, hidden: int, **profile: Any) -> None:
    """A file whose first columns hold numbers, and a mask that hides them."""
    pixels = pixels.copy()
    pixels[:, :hidden] = 2777
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
        write_raster(path, GRID, pixels, **profile)
        with rasterio.open(path, "r+") as file:
            valid = np.full(GRID.shape, 255, np.uint8)
            valid[:, :hidden] = 0
            file.write_mask(valid)
    with rasterio.open(path) as file:
        assert (file.read_masks(1)[:, :hidden] == 0).all()


def tagged(path: Path, pixels: np.ndarray, *, unit: str = "", scale: float = 1.0, offset: float = 0.0) -> None:
    write_raster(path, GRID, pixels, nodata=None if pixels.dtype.kind == "f" else 0)
    with rasterio.open(path, "r+") as file:
        file.scales, file.offsets = (scale,), (offset,)
        if unit:
            file.units = (unit,)


def item(name: str, number: int, collection: str, bands: dict[str, Any], **properties: Any) -> dict[str, Any]:
    west, south, east, north = GRID.lonlat_bounds()
    ring = [[west, south], [east, south], [east, north], [west, north], [west, south]]
    radar = {"platform": "sentinel-1a", "sar:product_type": "RTC", "sat:orbit_state": "descending"}
    optical = {"platform": "sentinel-2a", "s2:processing_baseline": "03.01", "s2:mgrs_tile": "33TWM"}
    given = {
        "datetime": f"2023-08-{number + 1:02d}T10:06:49Z", "sat:relative_orbit": 122,
        **(radar if collection == S1 else optical), **properties,
    }  # fmt: skip
    key = "vv" if collection == S1 else "B02"
    return {
        "type": "Feature", "stac_version": "1.0.0", "id": name, "collection": collection, "links": [],
        "bbox": [west, south, east, north], "geometry": {"type": "Polygon", "coordinates": [ring]},
        "properties": {name: value for name, value in given.items() if value is not None},
        "assets": {key: {"href": f"{name}.tif", **({"raster:bands": [bands]} if bands else {})}},
    }  # fmt: skip


def write_optical(folder: Path) -> list[dict[str, Any]]:
    with_mask(folder / "masked.tif", DN, 20, nodata=None)
    both = DN.copy()
    both[:, 40:] = 0
    with_mask(folder / "both.tif", both, 20)
    tagged(folder / "scale.tif", DN * 5, scale=2e-5)
    write_raster(folder / "stated.tif", GRID, DN * 5)
    tagged(folder / "over.tif", DN * 5, scale=2e-5)
    tagged(folder / "offset.tif", DN, scale=1e-4, offset=-0.1)
    signed = DN.astype(np.int16)
    signed[0], signed[1], signed[2] = -50, -9999, -20_000
    write_raster(folder / "signed.tif", GRID, signed, nodata=-9999)
    items = [item(name, n, S2, {}) for n, name in enumerate(("masked", "both", "scale"))]
    items.append(item("stated", 3, S2, {"scale": 2e-5, "nodata": 0}))
    items.append(item("over", 4, S2, {"scale": 1e-4, "nodata": 0}))
    items.append(item("offset", 5, S2, {}, **{"s2:processing_baseline": None}))
    items.append(item("signed", 6, S2, {}))
    return items


def expected_optical() -> dict[str, np.ndarray]:
    masked = DN.copy()
    masked[:, :20] = 0
    both = masked.copy()
    both[:, 40:] = 0
    signed = DN.copy()
    signed[0], signed[1], signed[2] = 1, 0, 0
    return {
        "masked": masked, "both": both, "scale": DN, "stated": DN, "over": DN, "offset": DN - 1000, "signed": signed,
    }  # fmt: skip


def write_radar(folder: Path) -> list[dict[str, Any]]:
    power = (10 ** (DB.astype(np.float64) / 10)).astype(np.float32)
    tagged(folder / "item-db.tif", DB)
    tagged(folder / "file-db.tif", DB, unit="dB")
    tagged(folder / "silent-db.tif", DB)
    noisy = power.copy()
    noisy[0, :5] = -1e-4
    tagged(folder / "noisy.tif", noisy)
    scaled = power * 1000
    tagged(folder / "scaled.tif", scaled.astype(np.float32), scale=1e-3)
    return [
        item("item-db", 0, S1, {"unit": "dB"}), item("file-db", 1, S1, {"unit": "1"}), item("silent-db", 2, S1, {}),
        item("noisy", 3, S1, {}), item("scaled", 4, S1, {}),
    ]  # fmt: skip


CONFIG = IngestConfig(bands=("blue",), mask="none", group="item")
RADAR = IngestConfig(bands=("vv",), mask="none", group="item")


class Made:
    """A plan of some items, and the cube that it made."""

    def __init__(self, folder: Path, items: list[dict[str, Any]], config: IngestConfig, client: Any) -> None:
        self.source = folder / "items.json"
        self.source.write_text(json.dumps({"type": "FeatureCollection", "features": items}))
        self.plan: Plan = make_plan(str(self.source), config)
        self.path = folder / "cube.zarr"
        self.report: IngestReport = run(self.plan, self.path, client=client)
        self.trust = IngestConfig(allow_local=(str(folder),))

    def image(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Pixels and status of the step of one item."""
        collection = self.plan.recipes[0].spec.collection
        rows = {row["id"]: row["step"] for row in self.plan.items[collection]}
        cube, main = open_cube(self.path), self.plan.recipes[0].spec.kind
        at = rows[name]
        shape = (at, slice(None), slice(None))
        return (
            np.asarray(cube.dataset(collection)[main].values[at, 0]),
            np.asarray(cube.dataset(collection)["status"].values[shape]),
        )


@pytest.fixture(scope="module")
def optical(tmp_path_factory: pytest.TempPathFactory, local_client: Any) -> Made:
    folder = tmp_path_factory.mktemp("optical")
    return Made(folder, write_optical(folder), CONFIG, local_client)


@pytest.fixture(scope="module")
def radar(tmp_path_factory: pytest.TempPathFactory, local_client: Any) -> Made:
    folder = tmp_path_factory.mktemp("radar")
    return Made(folder, write_radar(folder), RADAR, local_client)


@pytest.mark.parametrize("name", expected_optical())
def test_reflectance_is_what_the_file_states(optical: Made, name: str) -> None:
    pixels, status = optical.image(name)
    expected = expected_optical()[name]
    np.testing.assert_array_equal(pixels, expected)
    np.testing.assert_array_equal(status, (expected > 0).astype(np.uint8))


def test_the_plan_says_what_was_converted_and_the_sources_agree(optical: Made) -> None:
    said = "\n".join(optical.plan.warnings)
    for words in ("scale of 2e-05", "scale 2e-05 is stated", "offset of -1000 (OFFSET tag)"):
        assert words in said
    assert optical.report.exit_code == 0
    found = verify_sources(optical.path, optical.trust)
    assert (found.different, found.unread, found.doubted) == ((), (), ())
    assert Plan.from_json(optical.plan.to_json(), "plan") == optical.plan


def test_backscatter_in_decibel_becomes_power(radar: Made) -> None:
    power = 10 ** (DB.astype(np.float64) / 10)
    for name in ("item-db", "file-db", "scaled"):
        pixels, status = radar.image(name)
        np.testing.assert_allclose(pixels, power, rtol=2e-5)
        assert (status == 1).all()
    pixels, status = radar.image("noisy")
    assert np.isnan(pixels[0, :5]).all()
    assert (status[0, :5] == 0).all()
    np.testing.assert_allclose(pixels[1:], power[1:], rtol=2e-5)


def test_backscatter_that_must_be_decibel_is_refused_by_name(radar: Made) -> None:
    """Power is never negative: nothing states the unit, so nothing is guessed."""
    _, status = radar.image("silent-db")
    assert (status == 3).all()
    (name,) = radar.report.unsupported
    assert name == "silent-db, asset vv"
    assert "decibel" in radar.report.missing[name]
    assert "repeat the same command" not in radar.report.summary()
    assert "convert the files" in radar.report.summary()
    with pytest.raises(InvalidInput, match="decibel"):
        make_plan(str(radar.source), IngestConfig(bands=("vv",), mask="none", group="item", strict=True))


@contextmanager
def blind() -> Iterator[None]:
    """Files are read as before: their numbers alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stated, "of", classmethod(lambda cls, dataset: cls()))
        patch.setattr(Values, "of", classmethod(lambda cls, *a, **k: cls()))
        patch.setattr(Values, "_power", lambda self, raw, empty: raw)
        patch.setattr("ingest.plan.tags._MOST_NEGATIVE", 1.0)
        patch.setattr("ingest.plan.tags.find_mask_beside", lambda href: None)
        for module in (gdal_read, header_module):
            patch.setattr(module, "has_mask", lambda dataset: False)
        header_cache.cache_clear()
        yield
    header_cache.cache_clear()


@pytest.mark.parametrize(("write", "config", "silent"), [
    (write_optical, CONFIG, ("masked", "both", "scale", "over", "offset")),
    (write_radar, RADAR, ("item-db", "file-db", "silent-db", "noisy", "scaled")),
])  # fmt: skip
def test_verify_sources_finds_cubes_that_were_made_without_it(
    tmp_path: Path, local_client: Any, write: Callable[[Path], list[dict[str, Any]]], config: IngestConfig,
    silent: tuple[str, ...],
) -> None:  # fmt: skip
    """Each silent fault of a cube of before: its pixels differ from their sources, or its sources are refused now."""
    items = [one for one in write(tmp_path) if one["id"] in silent]
    for one in items:  # plans of before knew neither scale nor unit of an item
        for asset in one["assets"].values():
            asset.pop("raster:bands", None)
    with blind():
        made = Made(tmp_path, items, config, local_client)
    assert made.report.exit_code == 0, "it was silent"
    if "masked" in silent:
        (tmp_path / "over.tif.msk").write_bytes((tmp_path / "over.tif").read_bytes())
    found = verify_sources(made.path, made.trust)
    steps = {row["step"]: row["id"] for rows in made.plan.items.values() for row in rows}
    caught = {steps[one.index[0]] for one in found.different}
    caught |= {name for name in silent if any(f"scene {name}," in text for text in found.doubted)}
    assert caught == set(silent)
    assert any("over.tif.msk" in text for text in found.doubted) is ("masked" in silent)


@pytest.mark.parametrize(("write", "says"), [
    (lambda path: tagged(path, DN, offset=-0.05), "OFFSET of -0.05"),
    (lambda path: tagged(path, DN, scale=-1e-4), "SCALE of -0.0001"),
    (lambda path: tagged(path, DN, unit="dB"), "'db'"),
    (lambda path: tagged(path, DN, unit="percent"), "'percent'"),
])  # fmt: skip
def test_what_cannot_be_applied_is_refused_by_name(tmp_path: Path, write: Callable[[Path], None], says: str) -> None:
    write(tmp_path / "odd.tif")
    ref = AssetRef(band="blue", key="B02", href=str(tmp_path / "odd.tif"), nodata=0)
    with pytest.raises(AssetUnreadable, match=says) as caught:
        read_on_grid(ref, None, GRID, "nearest", scene="S")
    assert caught.value.final
    assert "no repeated run" in str(caught.value)


def test_a_class_layer_with_a_scale_and_an_alpha_band_are_refused_by_name(tmp_path: Path) -> None:
    tagged(tmp_path / "scl.tif", np.full(GRID.shape, 4, np.uint8), scale=2.0)
    classes = AssetRef(band="scl", key="SCL", href=str(tmp_path / "scl.tif"), nodata=0, kind="class")
    with pytest.raises(AssetUnreadable, match="expected a class layer, the file states a SCALE of 2"):
        read_on_grid(classes, None, GRID, "nearest", stored="uint8", scene="S")
    profile = {"driver": "GTiff", "height": SIZE, "width": SIZE, "count": 2, "dtype": "uint16", "crs": GRID.crs,
               "transform": GRID.affine, "alpha": "yes"}  # fmt: skip
    with rasterio.open(tmp_path / "alpha.tif", "w", **profile) as file:
        file.write(DN, 1)
        file.write(np.full(GRID.shape, 65535, np.uint16), 2)
        file.colorinterp = (ColorInterp.gray, ColorInterp.alpha)
    ref = AssetRef(band="blue", key="B02", href=str(tmp_path / "alpha.tif"), nodata=0)
    with pytest.raises(AssetUnreadable, match=r"the file has 2, of which band 2 is alpha") as caught:
        read_on_grid(ref, None, GRID, "nearest", scene="S")
    assert caught.value.final


def test_a_mask_beside_a_file_is_refused_by_name(tmp_path: Path) -> None:
    for name in ("beside.tif", "beside.tif.msk", "good.tif"):
        write_raster(tmp_path / name, GRID, DN, nodata=None)
    source = tmp_path / "items.json"
    items = [item("beside", 0, S2, {}), item("good", 1, S2, {})]
    source.write_text(json.dumps({"type": "FeatureCollection", "features": items}))
    plan = make_plan(str(source), CONFIG)
    assert "a mask lies beside the file (beside.tif.msk)" in "\n".join(plan.warnings)
    refusals = {s.item_id: a.refusal for task in plan.tasks for s in task.sources for a in s.assets}
    assert "beside.tif.msk" in str(refusals["beside"])
    assert refusals["good"] is None


@pytest.mark.parametrize("packing", [
    {"compress": "deflate", "predictor": 2}, {"compress": "none"}, {"compress": "lzw"}, {"compress": "zstd"},
    {"tiled": False, "blockxsize": SIZE, "blockysize": 12}, {"BIGTIFF": "YES"}, {"ENDIANNESS": "BIG"},
])  # fmt: skip
def test_masks_of_every_packing_hide_pixels(tmp_path: Path, packing: dict[str, Any]) -> None:
    with_mask(tmp_path / "m.tif", DN, 20, nodata=None, **packing)
    ref = AssetRef(band="blue", key="B02", href=str(tmp_path / "m.tif"), nodata=0)
    expected = expected_optical()["masked"]
    for window in ((0, 0, SIZE, SIZE), (5, 7, 30, 40)):
        got = read_on_grid(ref, None, GRID.window(*window), "nearest", scene="S")
        row, col, height, width = window
        np.testing.assert_array_equal(got, expected[row : row + height, col : col + width])
    with rasterio.open(tmp_path / "m.tif", "r+") as file:
        file.build_overviews([2])
    coarse = Grid(GRID.crs, (20.0, 0.0, 500_000.0, 0.0, -20.0, 5_100_000.0), (32, 32))
    np.testing.assert_array_equal(
        read_coarse(ref, None, coarse, "nearest", scene="S") != 0, np.broadcast_to(np.arange(32) >= 10, (32, 32))
    )


def test_zero_stays_without_data_and_a_saturated_number_saturated() -> None:
    raw = np.array([[0, 1, 10, 30_000, 65_534, 65_535]], np.uint16)
    got = Values(factor=0.2).store(raw, "uint16", {30_000.0})
    assert got.tolist() == [[0, 1, 2, 0, 13_107, 65_535]]
    got = Values(factor=100.0).store(np.array([[0, 3, 900]], np.int32), "uint16", set())
    assert got.tolist() == [[0, 300, 65_535]]
    decibel = np.array([[np.nan, 0.0, -10.0, -9999.0]], np.float32)
    got = Values(decibel=True).store(decibel, "float32", {-9999.0})
    np.testing.assert_allclose(got, [[np.nan, 1.0, 0.1, np.nan]], rtol=1e-6)
