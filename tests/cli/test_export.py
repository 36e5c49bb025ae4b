"""A slice of a cube as a GeoTIFF, as other programs see it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio

from zarr_store import CubeSpec, open_cube

Run = Callable[..., Any]
NAME = "sentinel-2-l2a"


def test_bands_of_one_date(run: Run, cube: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.tif"
    done = run("export", cube, out, "--time", "2023-08-15", "--bands", "red,blue", "--json")
    assert done.code == 0, done.err
    assert done.json["bands"] == ["red", "blue"]
    stored = open_cube(cube)
    with rasterio.open(out) as made:
        assert made.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert made.crs.to_epsg() == 32633
        assert tuple(made.transform)[:6] == stored.spec(NAME).grid.transform
        assert made.descriptions == ("red", "blue")
        assert made.nodatavals == (0, 0)
        assert (made.scales, made.offsets) == ((1e-4, 1e-4), (0.0, 0.0))
        assert made.tags()["terrashard_time"] == "2023-08-15T10:00:00Z"
        expected = stored.dataset(NAME)["reflectance"].isel(time=1, band=[2, 0]).to_numpy()
        np.testing.assert_array_equal(made.read(), expected)


@pytest.mark.parametrize(("array", "nodata"), [("status", 0), ("scl", 0), ("source_item", -1)])
def test_other_arrays(run: Run, cube: Path, tmp_path: Path, array: str, nodata: int) -> None:
    out = tmp_path / "out.tif"
    assert run("export", cube, out, "--time", "0", "--array", array).code == 0
    with rasterio.open(out) as made:
        np.testing.assert_array_equal(made.read(1), open_cube(cube).dataset(NAME)[array].isel(time=0).to_numpy())
        assert made.nodata == nodata
        assert made.descriptions == (array,)
        assert (made.tags(1).get("class_2") == "masked") == (array == "status")


def test_what_cannot_be_exported(run: Run, cube: Path, tmp_path: Path, make_cube: Callable[..., CubeSpec]) -> None:
    for arguments, words in (
        ((cube, "o.tif"), "has 3 dates and a GeoTIFF holds one; choose it with --time"),
        ((cube, "o.tif", "--time", "2023-08-1"), "means 2023-08-10"),
        ((cube, "o.tif", "--time", "2023-09"), "2023-09"),
        ((cube, "o.tif", "--time", "0", "--bands", "rde"), "did you mean 'red'?"),
        ((cube, "o.tif", "--time", "0", "--array", "statsu"), "did you mean 'status'?"),
        ((cube, "o.tif", "--time", "0", "--array", "scl", "--bands", "red"), "array scl has none"),
        ((cube, "o.png", "--time", "0"), "must be a .tif file"),
    ):
        outcome = run("export", arguments[0], tmp_path / str(arguments[1]), *arguments[2:])
        assert outcome.code == 2
        assert words in outcome.error_line()
    make_cube(tmp_path / "part.zarr", skip=(2,))
    outcome = run("export", tmp_path / "part.zarr", tmp_path / "o.tif", "--time", "2")
    assert (outcome.code, "never written" in outcome.error_line()) == (6, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cube.zarr", "part.zarr"]


@pytest.mark.real_data
def test_a_real_slice_is_the_cubes(run: Run, zagreb: Path, tmp_path: Path) -> None:
    cube, out = tmp_path / "zagreb.zarr", tmp_path / "out.tif"
    selection = f"--collection {NAME} --bands red,nir,scl --mask scl --datetime 2023-08-18 --workers 1".split()
    made = run("ingest", zagreb, cube, *selection)
    assert made.code == 0, made.err
    assert run("export", cube, out).code == 0
    with rasterio.open(out) as opened:
        expected = open_cube(cube).dataset(NAME)["reflectance"].isel(time=0).to_numpy()
        np.testing.assert_array_equal(opened.read(), expected)
        assert opened.shape == (1749, 915)
        assert opened.descriptions == ("red", "nir")
        assert opened.overviews(1) == [2, 4]
