"""Overviews for looking: close to the average of all pixels, on the same place, and read in a fraction of the bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio.enums import Resampling

from ingest.raster.coarse import read_coarse
from ingest.raster.read import read_on_grid
from ingest.scenes.scene import AssetRef
from ingest.testing import write_raster
from zarr_store.errors import AssetUnreadable
from zarr_store.grid import Grid

FINE = Grid("EPSG:32633", (10.0, 0.0, 600_000.0, 0.0, -10.0, 5_000_000.0), (512, 640))


@pytest.fixture
def asset(tmp_path: Path) -> AssetRef:
    """A smooth band with a corner without data, and overviews by averages."""
    rows, columns = np.mgrid[0:512, 0:640]
    pixels = (1000 + 5 * rows + 3 * columns).astype(np.uint16)
    pixels[:100, :100] = 0
    path = write_raster(tmp_path / "a.tif", FINE, pixels)
    with rasterio.open(path, "r+") as dataset:
        dataset.build_overviews([2, 4, 8], Resampling.average)
    return AssetRef("red", "red", str(path), nodata=0)


@pytest.mark.parametrize("factor", [3, 8, 10, 20])
def test_overviews_lie_where_the_pixels_do(asset: AssetRef, factor: int) -> None:
    target = FINE.coarsen(factor)
    exact = read_on_grid(asset, FINE, target, "bilinear").astype(float)
    quick = read_coarse(asset, FINE, target, "bilinear").astype(float)
    inner = (slice(1, -1), slice(1, -1))
    both = (exact[inner] > 0) & (quick[inner] > 0)
    assert both.mean() > 0.9
    # half a coarse pixel of shift would be 2.5 × factor and more
    assert np.abs(exact[inner] - quick[inner])[both].max() < 8 * (1 if factor == 8 else factor / 2)
    assert (quick[: 60 // factor, : 60 // factor] == 0).all()


def test_a_file_without_a_fitting_overview_is_read_whole(asset: AssetRef) -> None:
    np.testing.assert_array_equal(
        read_coarse(asset, FINE, FINE, "bilinear"), read_on_grid(asset, FINE, FINE, "bilinear")
    )


def test_another_file_than_was_planned_is_refused(asset: AssetRef) -> None:
    with pytest.raises(AssetUnreadable, match="not the one that was planned"):
        read_coarse(asset, FINE.coarsen(2), FINE.coarsen(8), "bilinear")


def test_a_window_is_that_part_of_the_whole(asset: AssetRef) -> None:
    coarse = FINE.coarsen(8)
    whole = read_coarse(asset, FINE, coarse, "bilinear")
    part = read_coarse(asset, FINE, coarse.window(30, 40, 20, 24), "bilinear")
    np.testing.assert_array_equal(part, whole[30:50, 40:64])
