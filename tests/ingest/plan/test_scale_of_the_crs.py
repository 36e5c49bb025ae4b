"""Grids whose units are no metres on the ground, whose pixels are not square, and that cross the antimeridian."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from pydantic import ValidationError
from pyproj import Transformer
from rasterio.enums import Resampling
from rasterio.vrt import WarpedVRT

from ingest.plan.plan import Plan
from ingest.raster.resample import axis_ratios, pick_resampling, scale_ratio
from ingest.request.config import IngestConfig
from zarr_store.errors import InvalidInput
from zarr_store.grid import Grid
from zarr_store.ground import ground_scale, turn_of

from ..small_scenes import cube_of, land, make_scene, plan_of, write_items, write_tif

LAT = -16.9


@pytest.fixture(scope="module")
def across(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """Three scenes that meet at 180°: of UTM 60S and 01S, and one in degrees that begins at -180."""
    folder = tmp_path_factory.mktemp("across")
    paths: list[Path] = []
    for name, crs, lon in (("W60", "EPSG:32760", 179.98), ("E01", "EPSG:32701", -179.99999)):
        x, y = Transformer.from_crs("EPSG:4326", crs, always_xy=True).transform(lon, LAT)
        corner = (round(x, -1), round(y, -1))
        paths.append(write_tif(folder / name / "B02.tif", land(200, 210, len(paths)), crs=crs, corner=corner))
    items = [
        make_scene(name, {"B02": path}, s2__mgrs_tile=tile)
        for name, tile, path in zip(("W60", "E01"), ("60KXF", "01KAB"), paths, strict=True)
    ]
    return write_items(folder, *items), paths


def _by_rasterio(paths: list[Path], plan: Plan) -> np.ndarray:
    """Where GDAL finds data of any of the files, on the grid of a plan."""
    grid = plan.grid
    seen = np.zeros(grid.shape, bool)
    for path in paths:
        with (
            rasterio.open(path) as file,
            WarpedVRT(
                file, crs=grid.crs, transform=grid.affine, width=grid.width, height=grid.height, nodata=0,
                resampling=Resampling.nearest, tolerance=1e-6,
            ) as warped,
        ):  # fmt: skip
            seen |= warped.read(1) > 0
    return seen


@pytest.mark.parametrize(
    ("crs", "resolution", "region"),
    [
        ("EPSG:4326", 1e-4, (179.985, -16.915, -179.985, -16.905)),
        ("EPSG:4326", 1e-4, None),
        ("EPSG:3857", 10.0, (179.985, -16.915, -179.985, -16.905)),
        ("EPSG:4258", 1e-4, (179.985, -16.915, -179.985, -16.905)),
        ("EPSG:6933", 10.0, None),
        ("EPSG:4087", 10.0, (179.985, -16.915, -179.985, -16.905)),
    ],
)
def test_a_target_across_the_antimeridian_has_the_pixels_of_both_sides(
    across: tuple[Path, list[Path]], crs: str, resolution: float, region: Any
) -> None:
    source, paths = across
    plan = plan_of(source, crs=crs, resolution=resolution, bbox=region, resampling="nearest")
    assert plan.grid.width < 600
    assert len(plan.items["sentinel-2-l2a"]) == 2
    arrays = cube_of(plan)
    expected = _by_rasterio(paths, plan)
    assert expected.mean() > 0.8
    assert np.array_equal(arrays["status"][0] == 1, expected)
    assert set(np.unique(arrays["source_item"])) >= {0, 1}


def test_a_raster_in_degrees_is_found_on_the_other_side_of_the_antimeridian(tmp_path: Path) -> None:
    west, east = land(50, 50, 1), land(50, 50, 2)
    a = write_tif(tmp_path / "a/B02.tif", west, crs="EPSG:4326", corner=(179.995, 10.0), size=(1e-4, 1e-4))
    b = write_tif(tmp_path / "b/B02.tif", east, crs="EPSG:4326", corner=(-180.0, 10.0), size=(1e-4, 1e-4))
    items = [make_scene("A", {"B02": a}, s2__mgrs_tile="60PZS"), make_scene("B", {"B02": b}, s2__mgrs_tile="01PAS")]
    for settings in ({}, {"bbox": (179.995, 9.995, -179.995, 10.0)}):
        arrays = cube_of(plan_of(write_items(tmp_path, *items), **settings))
        assert np.array_equal(arrays["reflectance"][0, 0], np.hstack([west, east]) - 1000)


def test_clipping_reaches_over_the_antimeridian(across: tuple[Path, list[Path]]) -> None:
    source, paths = across
    ring = [[179.99, -16.913], [-179.99, -16.913], [-179.99, -16.907], [179.99, -16.907], [179.99, -16.913]]
    geometry = {"type": "Polygon", "coordinates": [ring]}
    plan = plan_of(source, crs="EPSG:4326", resolution=1e-4, geometry=geometry, resampling="nearest")
    assert plan.grid.lonlat_bounds()[2] == pytest.approx(180.01, abs=1e-3)
    assert (cube_of(plan)["status"][0] == 1).sum() == _by_rasterio(paths, plan).sum()


def test_pixels_that_are_not_square_are_copied(tmp_path: Path) -> None:
    """At 60° N, 0.00018 × 0.00009 degrees are 10 m by 10 m."""
    pixels = land(70, 60, 27)
    path = write_tif(tmp_path / "B02.tif", pixels, crs="EPSG:4326", corner=(15.0, 60.0), size=(0.00018, 0.00009))
    plan = plan_of(write_items(tmp_path, make_scene("A", {"B02": path})))
    assert plan.grid.resolution == (0.00018, 0.00009)
    assert "0.00018×9e-05: the finest" in plan.summary()
    assert plan.statistics["sentinel-2-l2a"]["resampled_share"] == 0.0
    assert np.array_equal(cube_of(plan)["reflectance"][0, 0], pixels - 1000)
    metres = plan_of(write_items(tmp_path, make_scene("A", {"B02": path})), crs="EPSG:32633")
    assert metres.grid.resolution == (10.0, 10.0)


@pytest.mark.parametrize(
    ("crs", "resolution", "metres"),
    [("EPSG:32633", 10.0, (10.0, 10.0)), ("EPSG:3857", 20.0, (10.0, 10.0)), ("EPSG:4326", 9e-5, (5.0, 10.0))],
)
def test_masks_grow_by_the_same_distance_on_the_ground(
    tmp_path: Path, crs: str, resolution: float, metres: tuple[float, float]
) -> None:
    """50 m of cloud at 60° N, grown by 100 m to each side."""
    scl = np.full((64, 64), 4, np.uint8)
    scl[30:35, 30:35] = 9
    x, y = Transformer.from_crs("EPSG:4326", "EPSG:32633", always_xy=True).transform(15.0, 60.0)
    corner = (round(x, -1), round(y, -1))
    assets = {"B02": write_tif(tmp_path / "B02.tif", land(), corner=corner),
              "SCL": write_tif(tmp_path / "SCL.tif", scl, corner=corner)}  # fmt: skip
    source = write_items(tmp_path, make_scene("A", assets))
    plan = plan_of(source, bands="blue,scl", mask="scl", mask_dilate_m=100.0, crs=crs, resolution=resolution)
    rows, cols = np.nonzero(cube_of(plan)["status"][0] == 2)
    assert (np.ptp(cols) + 1) * metres[0] == pytest.approx(250, abs=22)
    assert (np.ptp(rows) + 1) * metres[1] == pytest.approx(250, abs=22)


def test_a_kernel_is_chosen_by_what_pixels_measure_on_the_ground() -> None:
    """20 units of EPSG:3857 are 10 m at 60° N, so nothing is coarsened; in UTM all is as the numbers say."""
    source = Grid("EPSG:32633", (10, 0, 500_000, 0, -10, 6_652_000), (100, 100))
    mercator = Grid("EPSG:3857", (20, 0, 1_669_000, 0, -20, 8_400_000), (100, 100))
    assert scale_ratio(source, mercator) == pytest.approx(1.0, abs=0.01)
    assert pick_resampling("data", source, mercator, "bilinear") == "bilinear"
    assert pick_resampling("class", source, mercator, "bilinear") == "nearest"
    degrees = Grid("EPSG:4326", (2e-4, 0, 15.0, 0, -1e-4, 60.0), (100, 100))
    assert axis_ratios(source, degrees) == pytest.approx((1.11, 1.11), abs=0.02)
    assert scale_ratio(source, Grid("EPSG:32634", (10, 0, 100_000, 0, -10, 6_652_000), (9, 9))) == 1.0
    far = mercator.window(5_000, 5_000, 10, 10)
    assert scale_ratio(source, far) == scale_ratio(source, mercator), "no window changes it"


def test_units_and_turns_of_crs() -> None:
    assert turn_of("EPSG:3395") == pytest.approx(40_075_016.7, abs=0.1)
    assert turn_of("EPSG:6933") == pytest.approx(2 * 17_367_530.445, abs=0.1)
    assert turn_of("EPSG:3035") == turn_of("EPSG:8857") == 0.0
    polar = Grid("EPSG:32661", (10, 0, 2_000_000, 0, -10, 2_000_000), (9, 9))
    assert ground_scale(polar) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("settings", "unit"),
    [
        ({"crs": "EPSG:4326", "resolution": 10.0}, "degrees"),
        ({"crs": "EPSG:4326", "resolution": 1.0}, "degrees"),
        ({"crs": "EPSG:32633", "resolution": 0.00009}, "metres"),
        ({"crs": "EPSG:3857", "resolution": 200_000.0}, "metres"),
    ],
)
def test_a_resolution_in_other_units_is_refused_at_the_door(settings: dict[str, Any], unit: str) -> None:
    with pytest.raises(InvalidInput, match=unit):
        IngestConfig.from_flat(settings)


def test_a_resolution_in_other_units_is_refused_where_the_files_choose_the_crs(tmp_path: Path) -> None:
    source = write_items(tmp_path, make_scene("A", {"B02": write_tif(tmp_path / "B02.tif", land())}))
    with pytest.raises(InvalidInput, match=r"units of EPSG:32633, which are metres: .* 10 m are about 10 there"):
        plan_of(source, resolution=0.0001)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"crs": "EPSG:4326", "resolution": 0.5}, "resolution 0.5 is in units of EPSG:4326"),
        ({"crs": "EPSG:32633", "resolution": 0.05}, "resolution 0.05 is in units of EPSG:32633"),
        ({"crs": "EPSG:4326", "resolution": 0.0001}, None),
        ({"resolution": 60}, None),
    ],
)
def test_pixels_of_quite_another_size_than_those_of_the_files_are_reported(
    tmp_path: Path, settings: dict[str, Any], words: str | None
) -> None:
    source = write_items(tmp_path, make_scene("A", {"B02": write_tif(tmp_path / "B02.tif", land(8, 8))}))
    said = [text for text in plan_of(source, **settings).warnings if "in units of" in text]
    assert [text.startswith(words or "") for text in said] == ([True] if words else [])


@pytest.mark.parametrize("box", ["17,45,16,46", "1,-10,-1,10", "170,-20,160,20"])
def test_a_box_the_long_way_round_needs_a_word(box: str) -> None:
    west, _, east, _ = (float(number) for number in box.split(","))
    with pytest.raises(InvalidInput, match="--wrap") as caught:
        IngestConfig.from_flat({"bbox": box})
    assert f"that is {east + 360 - west:g} degrees" in str(caught.value)
    assert IngestConfig.from_flat({"bbox": box, "wrap": True}).selection.bbox is not None


@pytest.mark.parametrize("box", ["170,-20,-170,20", "179.9,-1,-179.9,1", "0,-10,-180,10", "-180,-90,180,90"])
def test_a_box_across_the_antimeridian_needs_none(box: str) -> None:
    assert IngestConfig.from_flat({"bbox": box}).plan_settings()["bbox"]


def test_an_uncut_ring_is_cut_unless_the_long_way_is_meant(caplog: pytest.LogCaptureFixture) -> None:
    ring = [[179.9, -17], [-179.9, -17], [-179.9, -16], [179.9, -16], [179.9, -17]]
    geometry = {"type": "Polygon", "coordinates": [ring]}
    cut = IngestConfig(geometry=geometry).selection.geometry
    assert cut is not None
    assert cut["type"] == "MultiPolygon"
    assert "the short way, over the antimeridian" in caplog.text
    assert IngestConfig(geometry=cut).selection.geometry == cut
    assert IngestConfig(geometry=geometry, wrap=True).selection.geometry == geometry
    world = {"type": "Polygon", "coordinates": [[[-180, -60], [180, -60], [180, 60], [-180, 60], [-180, -60]]]}
    assert IngestConfig(geometry=world).selection.geometry == world


def test_a_section_is_checked_in_python_too() -> None:
    with pytest.raises((InvalidInput, ValidationError), match="--wrap"):
        IngestConfig(bbox=(17, 45, 16, 46))
