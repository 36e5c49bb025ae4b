"""Pairs of times against brute force, and coordinates of steps from item tables."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from zarr_store.create import create_cube
from zarr_store.errors import InvalidInput, UnknownName
from zarr_store.grid import Grid
from zarr_store.read import open_cube
from zarr_store.spec import BandSpec, CubeSpec
from zarr_store.steps import nearest_times, pair_collections, step_coordinates

times = st.sets(st.integers(0, 10**6), max_size=12).map(lambda s: np.array(sorted(s), "int64").astype("datetime64[s]"))


@given(times, times, st.one_of(st.none(), st.floats(0, 3)))
def test_pairs_equal_brute_force(ours: np.ndarray, theirs: np.ndarray, most_days: float | None) -> None:
    pairing = nearest_times(ours, theirs, most_days=most_days)
    for step, moment in enumerate(ours.astype(np.int64)):
        gaps = [(abs(int(t) - int(moment)), k) for k, t in enumerate(theirs.astype(np.int64))]
        near = [g for g in gaps if most_days is None or g[0] <= most_days * 86_400]
        expected = min(near)[1] if near else -1
        assert pairing.index[step] == expected
        assert pairing.gap_s[step] == (int(theirs[expected].astype(np.int64)) - int(moment) if near else 0)


def test_the_earlier_of_two_equally_near_times_is_taken() -> None:
    ours, theirs = (np.array(days, "datetime64[s]") for days in (["2023-08-10"], ["2023-08-05", "2023-08-15"]))
    assert nearest_times(ours, theirs).index.tolist() == [0]


def test_a_negative_gap_is_refused() -> None:
    with pytest.raises(InvalidInput, match="0 days or more, got -1"):
        nearest_times(np.array([], "datetime64[s]"), np.array([], "datetime64[s]"), most_days=-1)


ROWS = [
    {"id": "a", "datetime": "2023-08-01T05:00:00Z", "step": 0, "orbit_direction": "ascending", "relative_orbit": 44,
     "platform": "sentinel-1a"},
    {"id": "b", "datetime": "2023-08-01T05:00:25Z", "step": 0, "orbit_direction": "ascending", "relative_orbit": 44,
     "platform": "sentinel-1b"},
    {"id": "c", "datetime": "2023-08-07T17:00:00Z", "step": 1, "orbit_direction": "descending", "relative_orbit": 124,
     "platform": "sentinel-1a"},
]  # fmt: skip


def test_orbits_are_coordinates_of_radar(tmp_path: Path) -> None:
    grid = Grid("EPSG:32633", (10.0, 0.0, 0.0, 0.0, -10.0, 0.0), (16, 16))
    radar = CubeSpec("s1", "backscatter", (BandSpec("vv", None),), grid, ("2023-08-01T05:00:00", "2023-08-07T17:00:00"))
    light = CubeSpec("s2", "reflectance", (BandSpec("red"),), grid, ("2023-08-06T10:00:00",))
    item = {"id": "x", "datetime": "2023-08-06T10:00:00Z", "step": 0}
    create_cube(tmp_path / "cube.zarr", [radar, light], items={"s1": ROWS, "s2": [item]}, provenance={})
    with xr.open_zarr(tmp_path / "cube.zarr", group="s1") as dataset:
        assert {"orbit_direction", "relative_orbit", "platform"} <= set(dataset.backscatter.coords)
        assert dataset.orbit_direction.values.tolist() == ["ascending", "descending"]
        assert dataset.relative_orbit.values.tolist() == [44, 124]
        assert dataset.platform.values.tolist() == ["sentinel-1a,sentinel-1b", "sentinel-1a"]
        assert dataset.sel(time=dataset.orbit_direction == "ascending").sizes["time"] == 1
    cube = open_cube(tmp_path / "cube.zarr")
    assert "platform" not in cube.dataset("s2").coords
    assert pair_collections(cube, "s2", "s1").index.tolist() == [1]
    assert pair_collections(cube, "s1", "s2", most_days=2).index.tolist() == [-1, 0]
    with pytest.raises(UnknownName):
        pair_collections(cube, "s2", "s3")


def test_unknown_and_mixed_orbits_are_said() -> None:
    mixed = [*ROWS, {**ROWS[2], "relative_orbit": 51}]
    assert step_coordinates(mixed, 3)["relative_orbit"][0].tolist() == [44, -1, -1]
    assert step_coordinates(mixed, 3)["platform"][0].tolist()[2] == ""
    assert step_coordinates([{"id": "a", "datetime": "x"}], 1) == {}
