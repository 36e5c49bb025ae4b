"""Datasets to compute on: blocks of whole shards, physical numbers and masks, against numpy and on a cluster."""

from __future__ import annotations

import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
import xarray as xr
from dask.base import is_dask_collection

from zarr_store import BandSpec, CubeSpec, ShardWriter, create_cube, open_cube
from zarr_store.errors import UnknownName
from zarr_store.spec import DerivedSpec

from .conftest import ITEMS, NAME, cut


@pytest.fixture
def single_threaded() -> Any:
    with dask.config.set(scheduler="synchronous"):
        yield


def expected(pixels: dict[str, np.ndarray], *, scaled: bool, masked: bool) -> np.ndarray:
    values = pixels["reflectance"].astype(np.float32)
    if scaled:
        values = np.where(values == 0, np.float32(np.nan), values * np.float32(1e-4))
    if masked:
        values = np.where((pixels["status"] == 1)[:, None], values, np.float32(np.nan))
    return values


def test_blocks_are_whole_shards_or_chunks(cube_path: Path, spec: CubeSpec, pixels: dict[str, np.ndarray]) -> None:
    cube = open_cube(cube_path)
    shards = cube.dataset(NAME, chunks="shards")
    assert shards.reflectance.data.numblocks == (2, 1, 2, 2) == (2, 1, *_counts(spec, spec.layout.shard))
    assert shards.status.data.numblocks == (2, 2, 2)
    chunks = cube.dataset(NAME, chunks="chunks")
    assert chunks.reflectance.data.numblocks == (2, 1, 3, 4) == (2, 1, *_counts(spec, spec.layout.chunk))
    # one task for each block, and no more; coordinates are no Dask arrays
    assert len(shards.reflectance.data.dask) <= 2 * 2 * 2 + 1
    assert all(not is_dask_collection(c.data) for c in shards.coords.values())
    with dask.config.set(scheduler="synchronous"):
        for name, array in pixels.items():
            np.testing.assert_array_equal(shards[name].values, array)
            assert shards[name].dtype == array.dtype
    with pytest.raises(UnknownName, match="did you mean 'shards'"):
        cube.dataset(NAME, chunks="shard")  # type: ignore[arg-type]


def _counts(spec: CubeSpec, box: tuple[int, int, int]) -> tuple[int, int]:
    return (-(-spec.grid.height // box[1]), -(-spec.grid.width // box[2]))


def test_the_default_is_what_is_stored(cube_path: Path, pixels: dict[str, np.ndarray]) -> None:
    plain = open_cube(cube_path).dataset(NAME)
    assert not any(is_dask_collection(array.data) for array in plain.variables.values())
    assert plain.reflectance.dtype == np.uint16
    assert plain.reflectance.attrs["reflectance_scale"] == 1e-4


@pytest.mark.usefixtures("single_threaded")
@pytest.mark.parametrize("chunks", [None, "shards", "chunks"])
@pytest.mark.parametrize(("scaled", "masked"), [(True, False), (False, True), (True, True)])
def test_physical_numbers_and_masks_equal_numpy(
    cube_path: Path, pixels: dict[str, np.ndarray], chunks: Any, scaled: bool, masked: bool
) -> None:
    dataset = open_cube(cube_path).dataset(NAME, chunks=chunks, scaled=scaled, masked=masked)
    bands = dataset.reflectance
    assert (bands.dtype, bands.dims) == (np.float32, ("time", "band", "y", "x"))
    assert is_dask_collection(bands.data) == (chunks is not None)
    wanted = expected(pixels, scaled=scaled, masked=masked)
    assert np.isnan(wanted).any() != np.isnan(wanted).all()
    np.testing.assert_array_equal(bands.values, wanted)
    # every way to ask for a part: numbers, names, slices with steps, lists, points
    np.testing.assert_array_equal(bands.isel(time=1, band=1, y=3).values, wanted[1, 1, 3])
    np.testing.assert_array_equal(bands.sel(band="nir")[:, 5:40:3, ::-1].values, wanted[:, 1, 5:40:3, ::-1])
    np.testing.assert_array_equal(bands.isel(band=[1, 0], x=[50, 2, 7]).values, wanted[:, [1, 0]][..., [50, 2, 7]])
    np.testing.assert_array_equal(
        bands.isel(y=xr.DataArray([1, 30], dims="p"), x=xr.DataArray([4, 56], dims="p")).values,
        wanted[:, :, [1, 30], [4, 56]],
    )
    for name in ("status", "scl", "source_item"):
        np.testing.assert_array_equal(dataset[name].values, pixels[name])
        assert dataset[name].dtype == pixels[name].dtype


@pytest.mark.usefixtures("single_threaded")
def test_attributes_hold_for_what_the_numbers_are(cube_path: Path, tmp_path: Path) -> None:
    cube = open_cube(cube_path)
    scaled = cube.dataset(NAME, chunks="shards", scaled=True, masked=True)
    assert scaled.reflectance.attrs["units"] == "1"
    assert scaled.reflectance.attrs["long_name"] == "reflectance"
    assert not {"reflectance_scale", "reflectance_offset"} & set(scaled.reflectance.attrs)
    assert cube.dataset(NAME, masked=True).reflectance.attrs["reflectance_scale"] == 1e-4
    where = {**scaled.reflectance.attrs, **scaled.reflectance.encoding}["grid_mapping"]
    assert "32633" in scaled[where].attrs["crs_wkt"]
    assert scaled.x.attrs["units"] == "m"
    # and they come back from a file as they were: not cut to the integers that they came from
    scaled[["reflectance"]].to_zarr(tmp_path / "copy.zarr", consolidated=False)
    again = xr.open_zarr(tmp_path / "copy.zarr", chunks=None, consolidated=False)
    xr.testing.assert_equal(again.reflectance.load(), scaled.reflectance.load())
    assert again.reflectance.dtype == np.float32


@pytest.mark.usefixtures("single_threaded")
def test_bands_of_other_scales_and_indices(tmp_path: Path, spec: CubeSpec, pixels: dict[str, np.ndarray]) -> None:
    ndvi = DerivedSpec("ndvi", ("blue", "nir"), "(nir - blue) / (nir + blue)", "a test")
    own = replace(spec, bands=(BandSpec("blue", 0, 1e-4, -0.1), BandSpec("nir", 0, 2e-4)), derived=(ndvi,))
    index = np.arange(pixels["status"].size, dtype=np.int16).reshape(pixels["status"].shape)
    index[0, 0, :5] = ndvi.nodata
    create_cube(tmp_path / "own.zarr", [own], items=ITEMS, provenance={})
    writer = ShardWriter(tmp_path / "own.zarr", NAME)
    for region in own.shards().values():
        writer.write(region, cut({**pixels, "ndvi": index}, region), key="k", sources=[])
    scaled = open_cube(tmp_path / "own.zarr").dataset(NAME, scaled=True)
    wanted = (
        pixels["reflectance"] * np.array([1e-4, 2e-4], np.float32)[:, None, None]
        + np.array([-0.1, 0], np.float32)[:, None, None]
    )
    np.testing.assert_allclose(scaled.reflectance, np.where(pixels["reflectance"] == 0, np.nan, wanted), rtol=1e-6)
    np.testing.assert_allclose(scaled.reflectance[:, 1], scaled.reflectance.values[:, 1])
    assert np.isnan(scaled.ndvi[0, 0, :5]).all()
    np.testing.assert_allclose(scaled.ndvi[1], index[1] * np.float32(1e-4), rtol=1e-6)
    assert not {"index_scale", "index_nodata"} & set(scaled.ndvi.attrs)


def test_a_shard_that_was_never_written_is_masked(tmp_path: Path, spec: CubeSpec) -> None:
    create_cube(tmp_path / "new.zarr", [spec], items=ITEMS, provenance={})
    assert np.isnan(open_cube(tmp_path / "new.zarr").dataset(NAME, masked=True).reflectance).all()


def test_names_are_never_used_twice(cube_path: Path) -> None:
    cube = open_cube(cube_path)
    first, second = (cube.dataset(NAME, chunks="shards").reflectance.data.name for _ in range(2))
    assert first != second, "a cluster that holds blocks of an older cube would give them again"


def test_a_dataset_goes_to_workers(cube_path: Path, pixels: dict[str, np.ndarray]) -> None:
    lazy = open_cube(cube_path).dataset(NAME, scaled=True, masked=True)
    again = pickle.loads(pickle.dumps(lazy))
    np.testing.assert_array_equal(again.reflectance, expected(pixels, scaled=True, masked=True))


@pytest.mark.usefixtures("environment_given_back")  # Dask puts that of its workers into this process
def test_composites_on_a_cluster_equal_numpy(cube_path: Path, pixels: dict[str, np.ndarray]) -> None:
    """NDVI over time on a Dask cluster: another process reads the blocks."""
    from distributed import Client, LocalCluster

    wanted = expected(pixels, scaled=True, masked=True)
    with np.errstate(invalid="ignore"):
        ndvi = (wanted[:, 1] - wanted[:, 0]) / (wanted[:, 1] + wanted[:, 0])
    with (
        LocalCluster(
            n_workers=1, threads_per_worker=2, processes=True, host="127.0.0.1", dashboard_address="127.0.0.1:0"
        ) as cluster,
        Client(cluster),
    ):
        s2 = open_cube(cube_path).dataset(NAME, chunks="shards", scaled=True, masked=True)
        blue, nir = (s2.reflectance.sel(band=name) for name in ("blue", "nir"))
        composite = ((nir - blue) / (nir + blue)).max("time").compute()
    top = np.where(np.isnan(ndvi), -np.inf, ndvi).max(axis=0)
    np.testing.assert_allclose(composite, np.where(np.isinf(top), np.nan, top), rtol=1e-6)


def test_opening_a_cube_does_not_load_dask(cube_path: Path) -> None:
    code = (
        "import sys; from zarr_store import open_cube; "
        f"open_cube({str(cube_path)!r}).read({NAME!r}, 'status', __import__('zarr_store').Region(0, 1, 0, 4, 0, 4)); "
        "sys.exit('dask' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
