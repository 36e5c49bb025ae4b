"""GDAL 3.13 or newer opens cubes and maps as they are: place, pixels, values of no data and overviews.

The tests run where `gdalinfo` and `gdal_translate` of such a release, built with the driver Zarr, are on the PATH.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import rasterio
import xarray as xr

from jaxtrain.data.classes import Classes
from jaxtrain.inference.maps import create_map, open_map
from zarr_store import Grid, open_cube

from .conftest import NAME

CLASSES = Classes.from_list([{"name": name, "values": [i], "colour": "#0000ff"} for i, name in enumerate("ab")])
GRID = Grid("EPSG:32633", (10.0, 0.0, 500_000.0, 0.0, -10.0, 5_000_000.0), (701, 499))


def call(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=120).stdout


def reads_shards() -> bool:
    """Whether the programs of a GDAL that reads sharded Zarr are here."""
    if not (shutil.which("gdalinfo") and shutil.which("gdal_translate")):
        return False
    version = re.search(r"GDAL (\d+)\.(\d+)", call("gdalinfo", "--version"))
    return bool(version) and tuple(map(int, version.groups())) >= (3, 13) and "Zarr" in call("gdalinfo", "--formats")


pytestmark = pytest.mark.skipif(not reads_shards(), reason="no GDAL 3.13 with the driver Zarr on the PATH")


def about(store: Path, array: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(call("gdalinfo", "-json", f'ZARR:"{store}":/{array}'))
    return found


def pixels(store: Path, array: str, out: Path, *options: str) -> npt.NDArray[Any]:
    """All bands of an array, (band, y, x)."""
    call("gdal_translate", "-q", *options, f'ZARR:"{store}":/{array}', str(out))
    with rasterio.open(out) as file:
        read: npt.NDArray[Any] = file.read()
    return read


def test_a_map_with_its_overviews(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxtrain.inference.maps.CHUNK", 128)
    rng = np.random.default_rng(0)
    url = tmp_path / "m.zarr"
    with create_map(url, GRID, CLASSES, attributes={}) as writer:
        writer.write(0, 0, rng.integers(0, 2, GRID.shape).astype(np.uint8), rng.integers(0, 100, GRID.shape, np.uint8))
    made = open_map(url)
    for name in ("class", "confidence"):
        found = about(url, name)
        (band,) = found["bands"]
        assert found["geoTransform"] == [500_000.0, 10.0, 0.0, 5_000_000.0, 0.0, -10.0]
        assert found["stac"]["proj:epsg"] == 32633
        assert band["noDataValue"] == 255
        np.testing.assert_array_equal(pixels(url, name, tmp_path / f"{name}.tif")[0], made.read(name))
        level = xr.open_zarr(url, group="overview/4", chunks=None, mask_and_scale=False)[name]
        alone = pixels(url, f"overview/4/{name}", tmp_path / f"{name}-alone.tif")[0]
        np.testing.assert_array_equal(alone, level)
        if name == "class":  # 3.13 looks for overviews of the first array that `multiscales` names, and of no other
            assert [one["size"] for one in band["overviews"]] == [[125, 176], [32, 44]]
            np.testing.assert_array_equal(pixels(url, name, tmp_path / "small.tif", "-ovr", "0")[0], level)


def test_a_sharded_cube_with_its_overview(cube_path: Path, tmp_path: Path) -> None:
    cube = open_cube(cube_path)
    spec = cube.spec(NAME)
    times, height, width = spec.shape
    for array in ("reflectance", "status"):
        found = about(cube_path, f"{NAME}/{array}")
        assert found["size"] == [width, height]
        assert found["stac"]["proj:epsg"] == int(spec.grid.crs.partition(":")[2])
        a, b, c, d, e, f = spec.grid.transform
        assert found["geoTransform"] == [c, a, b, f, d, e]
        stored = xr.open_zarr(cube_path, group=NAME, chunks=None, mask_and_scale=False)[array].values
        read = pixels(cube_path, f"{NAME}/{array}", tmp_path / f"{array}.tif")
        np.testing.assert_array_equal(read, stored.reshape(-1, height, width))
    found = about(cube_path, f"{NAME}/reflectance")
    assert len(found["bands"]) == times * len(spec.bands)
    small = spec.grid.coarsen(8).shape
    assert [one["size"] for one in found["bands"][0]["overviews"]] == [list(small[::-1])]
