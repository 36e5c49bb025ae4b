"""Areas of pixels on the ground, against the ellipsoid and against geodesics."""

from __future__ import annotations

import numpy as np
import pytest
from pyproj import Geod

from zarr_store.grid import Grid
from zarr_store.pixel_area import PixelAreas


def test_degrees_add_up_to_the_earth_and_agree_with_geodesics() -> None:
    earth = PixelAreas(Grid("EPSG:4326", (1.0, 0.0, -180.0, 0.0, -1.0, 90.0), (180, 360)))
    assert earth.rows(0, 180).sum() * 360 == pytest.approx(510_065_621.724e6, rel=1e-9)  # WGS 84
    pixel = PixelAreas(Grid("EPSG:4326", (0.001, 0.0, 16.0, 0.0, -0.001, 46.0), (10, 10))).rows(3, 4)[0, 0]
    west, east, north, south = 16.0, 16.001, 45.997, 45.996
    exact, _ = Geod(ellps="WGS84").polygon_area_perimeter([west, east, east, west], [south, south, north, north])
    assert pixel == pytest.approx(exact, rel=1e-5)


def test_a_projection_is_nominal_unless_it_is_badly_wrong() -> None:
    utm = PixelAreas(Grid("EPSG:32633", (10.0, 0.0, 6e5, 0.0, -10.0, 5e6), (20, 30)))
    np.testing.assert_array_equal(utm.rows(0, 5), [[100.0]])
    feet = PixelAreas(Grid("EPSG:2263", (100.0, 0.0, 9.8e5, 0.0, -100.0, 2e5), (20, 30)))
    assert feet.rows(0, 1)[0, 0] == pytest.approx(100**2 * (1200 / 3937) ** 2)
    mercator = PixelAreas(Grid("EPSG:3857", (1000.0, 0.0, 0.0, 0.0, -1000.0, 8_399_738.0), (40, 30)))  # 60° N
    areas = mercator.rows(0, 2)
    assert areas.shape == (2, 30)
    assert areas[0, 0] == pytest.approx(250_000, rel=0.01)
