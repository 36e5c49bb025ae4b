"""Grids: snapping, offsets, sub-grids, CRS spelling."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zarr_store import Grid
from zarr_store.errors import InvalidInput

UTM = "EPSG:32633"


def test_from_bounds_snaps_outwards_to_the_anchor() -> None:
    grid = Grid.from_bounds(UTM, (500_001, 5_000_001, 500_119, 5_000_119), resolution=60, anchor=(499_980, 5_000_000))
    assert grid.bounds == (499_980.0, 5_000_000.0, 500_160.0, 5_000_120.0)
    assert grid.shape == (2, 3)


@given(
    left=st.integers(-1000, 1000),
    width=st.integers(1, 500),
    bottom=st.integers(-1000, 1000),
    height=st.integers(1, 500),
    resolution=st.sampled_from([0.1, 1.0, 7.0, 10.0, 20.0]),
    anchor=st.integers(-50, 50),
)
def test_from_bounds_covers_and_is_smallest(
    left: int, width: int, bottom: int, height: int, resolution: float, anchor: int
) -> None:
    bounds = (left, bottom, left + width, bottom + height)
    grid = Grid.from_bounds(UTM, bounds, resolution=resolution, anchor=(anchor, anchor))
    west, south, east, north = grid.bounds
    slack = 1e-6 * resolution * 2
    assert west <= left + slack
    assert south <= bottom + slack
    assert east >= left + width - slack
    assert north >= bottom + height - slack
    assert left - west < resolution + slack
    assert east - (left + width) < resolution + slack
    assert ((west - anchor) / resolution) == pytest.approx(round((west - anchor) / resolution), abs=1e-5)


def test_offset_of_sees_half_pixels() -> None:
    # the real tiles 33TWL and 33TWM at 120 m: 100 020 m apart is 833.5 pixels
    north = Grid(UTM, (120.0, 0, 499_980.0, 0, -120.0, 5_200_020.0), (915, 915))
    south = Grid(UTM, (120.0, 0, 499_980.0, 0, -120.0, 5_100_000.0), (915, 915))
    assert north.offset_of(south) is None
    assert north.offset_of(north.window(-3, 5, 10, 10)) == (-3, 5)
    assert north.offset_of(Grid("EPSG:32634", north.transform, north.shape)) is None
    assert north.offset_of(north.coarsen(2)) is None


def test_pixel_centres_match_the_transform() -> None:
    grid = Grid(UTM, (10.0, 0, 100.0, 0, -20.0, 1000.0), (2, 3))
    np.testing.assert_array_equal(grid.x(), [105, 115, 125])
    np.testing.assert_array_equal(grid.y(), [990, 970])


def test_coarsen_rounds_up() -> None:
    assert Grid(UTM, (10.0, 0, 0.0, 0, -10.0, 0.0), (17, 16)).coarsen(8).shape == (3, 2)


def test_json_round_trip_and_one_spelling_of_a_crs() -> None:
    grid = Grid.from_bounds("epsg:32633", (0, 0, 100, 100), resolution=10)
    assert grid.crs == UTM
    assert Grid.from_dict(grid.to_dict()) == grid


def test_lonlat_bounds_of_zagreb() -> None:
    grid = Grid(UTM, (120.0, 0, 499_980.0, 0, -120.0, 5_200_020.0), (1749, 915))
    west, south, east, north = grid.lonlat_bounds()
    assert west == pytest.approx(14.9997, abs=1e-3)
    assert north == pytest.approx(46.953, abs=1e-2)
    assert south < 45.1
    assert east > 16.4


@pytest.mark.parametrize(
    ("transform", "shape", "words"),
    [
        ((10.0, 1.0, 0, 0, -10.0, 0), (1, 1), "north-up"),
        ((10.0, 0, 0, 0, 10.0, 0), (1, 1), "north-up"),
        ((10.0, 0, 0, 0, -10.0, 0), (0, 4), "at least one pixel"),
    ],
)
def test_bad_grids_are_refused(transform: tuple[float, ...], shape: tuple[int, int], words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        Grid(UTM, transform, shape)  # type: ignore[arg-type]


def test_bad_bounds_resolution_and_crs_are_refused() -> None:
    with pytest.raises(InvalidInput, match="positive area"):
        Grid.from_bounds(UTM, (10, 0, 0, 10), resolution=1)
    with pytest.raises(InvalidInput, match="positive number"):
        Grid.from_bounds(UTM, (0, 0, 10, 10), resolution=0)
    with pytest.raises(InvalidInput, match="unknown CRS 'EPSG:99999999'"):
        Grid.from_bounds("EPSG:99999999", (0, 0, 10, 10), resolution=1)


def test_equal_grids_are_written_alike() -> None:
    whole = Grid("EPSG:32633", (10, 0, 600_000, 0, -10, 5_000_000), (3, 4))
    assert json.dumps(whole.to_dict()) == json.dumps(Grid.from_dict(json.loads(json.dumps(whole.to_dict()))).to_dict())
    assert json.dumps(whole.to_dict()["transform"]) == "[10.0, 0.0, 600000.0, 0.0, -10.0, 5000000.0]"
