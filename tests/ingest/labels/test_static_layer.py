"""Static layers: any raster on the grid of a cube, against what numpy and rasterio give; and what is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from rasterio.enums import Resampling
from rasterio.warp import reproject

from ingest.labels.static_layer import stack_layer
from ingest.request.config import IngestConfig
from ingest.testing import write_raster
from zarr_store import BandSpec, CubeSpec, create_cube, find_layers, open_cube, open_layer, verify_cube
from zarr_store.errors import AccessError, CubeMismatch, InvalidInput, NothingFound, UnknownName
from zarr_store.grid import Grid
from zarr_store.labels import find_labels
from zarr_store.spec import Layout

CRS = "EPSG:32633"
GRID = Grid(CRS, (10.0, 0.0, 500_000.0, 0.0, -10.0, 5_100_000.0), (60, 72))


@pytest.fixture
def cube(tmp_path: Path) -> Path:
    """A cube of two grids: layers lie on the finest, in four boxes."""
    path = tmp_path / "cube.zarr"
    times = ("2023-08-10T10:00:00",)
    layout = Layout("t", (1, 16, 16), (1, 32, 32))
    specs = [
        CubeSpec(name, "reflectance", (BandSpec("red"),), grid, times, (), layout)
        for name, grid in (("fine", GRID), ("coarse", GRID.coarsen(2)))
    ]
    rows = [{"id": "A", "datetime": times[0]}]
    create_cube(path, specs, items={"fine": rows, "coarse": rows}, provenance={})
    return path


def raster(path: Path, grid: Grid, pixels: np.ndarray, nodata: float | None = None, **stated: Any) -> Path:
    write_raster(path, grid, pixels, nodata=nodata)
    if stated:
        with rasterio.open(path, "r+") as file:
            for name, value in stated.items():
                setattr(file, name, (value,))
    return path


def heights(grid: Grid, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(-20, 900, grid.shape).astype(np.int16)


def layer(cube: Path, name: str = "dem") -> np.ndarray:
    return open_layer(open_cube(cube), name).read()


def test_values_on_the_grid_are_copied_with_scale_offset_and_nodata(cube: Path, tmp_path: Path) -> None:
    pixels = heights(GRID)
    pixels[:5] = -9999
    source = raster(tmp_path / "dem.tif", GRID, pixels, -9999, scales=0.5, offsets=100.0, units="m")
    report = stack_layer(cube, source, name="dem")
    expected = np.where(pixels == -9999, np.nan, pixels * 0.5 + 100).astype(np.float32)
    np.testing.assert_array_equal(layer(cube), expected)
    opened = open_layer(open_cube(cube), "dem")
    assert (opened.unit, opened.kind, opened.dtype, opened.shape) == ("m", "values", "float32", GRID.shape)
    assert opened.origin["sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert {key: opened.origin[key] for key in ("file", "scale", "offset", "nodata", "unit")} == {
        "file": "dem.tif", "scale": 0.5, "offset": 100.0, "nodata": -9999.0, "unit": "m",
    }  # fmt: skip
    statistics = opened.statistics
    assert statistics is not None
    assert statistics.count == np.isfinite(expected).sum() == report.with_data
    known = expected[np.isfinite(expected)].astype(np.float64)
    np.testing.assert_allclose(
        (statistics.mean, statistics.std, statistics.least, statistics.most),
        (known.mean(), known.std(), known.min(), known.max()),
        rtol=1e-12,
    )
    assert stack_layer(cube, source, name="dem").written is False
    assert (find_layers(open_cube(cube)), verify_cube(cube).damaged_labels) == (("dem",), ())


def test_a_coarser_and_a_finer_raster_are_interpolated_and_averaged(cube: Path, tmp_path: Path) -> None:
    for size, kernel in ((30.0, Resampling.bilinear), (5.0, Resampling.average)):
        grid = Grid(CRS, (size, 0.0, 499_700.0, 0.0, -size, 5_100_300.0), (int(1500 / size), int(1500 / size)))
        pixels = heights(grid).astype(np.float32)
        report = stack_layer(cube, raster(tmp_path / f"{size}.tif", grid, pixels), name=f"d{size:g}")
        expected = np.full(GRID.shape, np.nan, np.float32)
        reproject(pixels, expected, src_transform=grid.affine, src_crs=CRS, dst_transform=GRID.affine, dst_crs=CRS,
                  resampling=kernel)  # fmt: skip
        assert report.resampling == kernel.name
        np.testing.assert_allclose(layer(cube, f"d{size:g}"), expected, rtol=1e-5, atol=1e-2)


def test_degrees_are_compared_with_metres_on_the_ground(cube: Path, tmp_path: Path) -> None:
    """A pixel of 0.003 degrees is 300 m wide: it is interpolated, although 0.003 is a smaller number than 10."""
    west, south, east, north = GRID.lonlat_bounds()
    grid = Grid("EPSG:4326", (0.003, 0.0, west - 0.01, 0.0, -0.003, north + 0.01), (12, 12))
    assert (south, east) > (north - 0.03, west)
    source = raster(tmp_path / "d.tif", grid, heights(grid).astype(np.float32))
    assert stack_layer(cube, source, name="dem").resampling == "bilinear"


def test_classes_keep_their_codes(cube: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).choice(np.array([3, 7, 255], np.uint8), GRID.shape)
    stack_layer(cube, raster(tmp_path / "soil.tif", GRID, pixels, 255), name="soil", kind="classes")
    np.testing.assert_array_equal(layer(cube, "soil"), pixels)
    opened = open_layer(open_cube(cube), "soil")
    assert (opened.classes, opened.statistics) == (((3, "class 3"), (7, "class 7")), None)
    with pytest.raises(InvalidInput, match=r"has class values? [\d … ]*255, but a layer holds 0 … 254.*--nodata 255"):
        stack_layer(cube, raster(tmp_path / "all.tif", GRID, pixels, None), name="all", kind="classes")


def test_an_item_names_the_raster_and_says_what_its_numbers_mean(cube: Path, tmp_path: Path) -> None:
    pixels = heights(GRID)
    raster(tmp_path / "t.tif", GRID, pixels)
    kind = "image/tiff; application=geotiff"
    band = {"nodata": -5, "scale": 0.1, "offset": 2, "unit": "K"}
    item = {
        "type": "Feature", "id": "ERA5", "assets": {
            "t": {"href": "t.tif", "type": kind, "raster:bands": [band]},
            "q": {"href": "../outside.tif", "type": kind}, "small": {"href": "t.png", "type": "image/png"},
        },
    }  # fmt: skip
    path = tmp_path / "item.json"
    path.write_text(json.dumps(item))
    with pytest.raises(InvalidInput, match=r"has 2 rasters \(t, q\); name one with --asset KEY"):
        stack_layer(cube, str(path), name="t")
    with pytest.raises(InvalidInput, match=r"has no asset 'z'; it has t, q, small"):
        stack_layer(cube, str(path), name="t", asset="z")
    with pytest.raises(InvalidInput, match=r"outside\.tif.*--allow-local"):
        stack_layer(cube, str(path), name="t", asset="q")
    report = stack_layer(cube, str(path), name="t", asset="t")
    expected = np.where(pixels == -5, np.nan, pixels * 0.1 + 2).astype(np.float32)
    np.testing.assert_allclose(layer(cube, "t"), expected, rtol=1e-6)
    assert (report.unit, report.origin["item"], report.origin["asset"]) == ("K", "ERA5", "t")


def test_a_url_is_fetched_whole_and_its_digest_kept(cube: Path, tmp_path: Path, server: Any) -> None:
    data = raster(tmp_path / "dem.tif", GRID, heights(GRID), -1).read_bytes()
    server.answer["/dem.tif"] = lambda _: (200, {"Content-Type": "image/tiff"}, data)
    config = IngestConfig(allow_private_hosts=True, retries=0)
    report = stack_layer(cube, f"{server.url}/dem.tif?sig=secret", name="dem", config=config)
    np.testing.assert_array_equal(np.nan_to_num(layer(cube), nan=-1), heights(GRID))
    assert report.origin["sha256"] == hashlib.sha256(data).hexdigest()
    assert "secret" not in json.dumps(report.to_dict())
    with pytest.raises(AccessError, match=r"none\.tif could not be read: .*404"):
        stack_layer(cube, f"{server.url}/none.tif", name="none", config=config)


def test_what_does_not_fit_is_refused_and_nothing_changes(cube: Path, tmp_path: Path) -> None:
    pixels = heights(GRID)
    far = Grid(CRS, (10.0, 0.0, 700_000.0, 0.0, -10.0, 5_100_000.0), GRID.shape)
    plain, good = raster(tmp_path / "p.tif", GRID, pixels), raster(tmp_path / "g.tif", GRID, pixels, -9999)
    bare = write_raster(tmp_path / "bare.tif", GRID, pixels, nodata=-9999, crs=None)
    (tmp_path / "text.tif").write_text("<html>")
    for source, asked, kind, message in (
        (plain, {}, InvalidInput, "holds int16 and states no value .*--nodata N"),
        (raster(tmp_path / "far.tif", far, pixels, -9999), {}, InvalidInput, "lies at .*outside the cube"),
        (bare, {}, InvalidInput, "no coordinate reference system"),
        (tmp_path / "text.tif", {}, InvalidInput, "expected a GeoTIFF"),
        (tmp_path / "none.tif", {}, InvalidInput, "cannot read .*No such file"),
        (raster(tmp_path / "e.tif", GRID, pixels * 0 + 7, 7), {}, NothingFound, "has no data for any pixel"),
        (good, {"band": 2}, InvalidInput, "no band 2"),
        (good, {"asset": "x"}, InvalidInput, "--asset x names an asset of a STAC item"),
        (good, {"name": "reflectance"}, InvalidInput, "has an array reflectance"),
        (good, {"kind": "classes", "unit": "m"}, InvalidInput, "apply to values"),
        (good, {"scale": float("nan")}, InvalidInput, "--scale must be a finite number"),
    ):  # fmt: skip
        options: dict[str, Any] = {"name": "dem", **asked}
        with pytest.raises(kind, match=message) as caught:
            stack_layer(cube, source, **options)
        assert "\n" not in str(caught.value)
    assert find_labels(open_cube(cube)) == ()
    stack_layer(cube, plain, name="dem", nodata="none")
    with pytest.raises(CubeMismatch, match="give another --name, or --replace"):
        stack_layer(cube, good, name="dem")
    np.testing.assert_array_equal(layer(cube), pixels)
    assert stack_layer(cube, good, name="dem", replace=True).written
    with pytest.raises(UnknownName, match="dem"):
        open_layer(open_cube(cube), "dew")
