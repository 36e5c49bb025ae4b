from __future__ import annotations

import dataclasses
import datetime as dt

import numpy as np
import pytest
from pydantic import ValidationError

from ingest.simulate import CLASSES, SimulateConfig
from ingest.simulate.clouds import SCL_CLOUD, scene_classes, shadow_offset, sky
from ingest.simulate.config import _sun
from ingest.simulate.ground import CROP, FOREST, WATER, Landscape
from ingest.simulate.noise import curve, fractal, key_of, smooth, white
from ingest.simulate.spectra import BANDS, surface
from zarr_store.grid import Grid

GRID = Grid("EPSG:32633", (10.0, 0.0, 600_000.0, 0.0, -10.0, 5_000_040.0), (180, 260))


def test_every_window_sees_the_same_landscape(small_config: SimulateConfig) -> None:
    land = Landscape(small_config)
    whole = land.ground(land.world)
    part = land.ground(land.world.window(37, 61, 90, 101))
    for field in dataclasses.fields(whole):
        if field.name != "grid":
            expected = getattr(whole, field.name)[37:127, 61:162]
            assert np.array_equal(getattr(part, field.name), expected), field.name


def test_the_seed_decides_the_landscape(small_config: SimulateConfig) -> None:
    one = Landscape(small_config)
    other = Landscape(small_config.model_copy(update={"seed": 12}))
    again = Landscape(small_config)
    window = one.world.window(0, 0, 100, 100)
    assert np.array_equal(one.ground(window).classes, again.ground(window).classes)
    assert not np.array_equal(one.ground(window).classes, other.ground(window).classes)


@pytest.mark.parametrize("seed", [0, 1, 2, 3, 4])
def test_every_class_occurs_and_none_rules(seed: int) -> None:
    land = Landscape(SimulateConfig(seed=seed, tile_px=256, overlap_px=32))
    shares = np.bincount(land.ground(land.world).classes.ravel(), minlength=8) / np.prod(land.world.shape)
    assert shares[0] == 0
    for land_class in CLASSES:
        assert 0.004 < shares[land_class.value] < 0.75, (land_class.name, shares)


def test_noise_has_mean_0_and_variance_1() -> None:
    wide = Grid("EPSG:32633", (10.0, 0.0, 0.0, 0.0, -10.0, 0.0), (1000, 1000))
    for field in (smooth(3, wide, 150.0), fractal(4, wide, 200.0, octaves=4)):
        assert abs(field.mean()) < 0.1
        assert 0.9 < field.std() < 1.1
    line = curve(5, np.arange(0.0, 200_000.0, 10.0), 100.0)
    assert abs(line.mean()) < 0.1
    assert 0.9 < line.std() < 1.1


def test_white_noise_is_tied_to_the_lattice_and_the_key() -> None:
    def draw(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    whole = white(1, GRID, GRID, draw)
    part = white(1, GRID, GRID.window(100, 90, 70, 150), draw)
    assert np.array_equal(part, whole[100:170, 90:240])
    assert not np.array_equal(whole, white(2, GRID, GRID, draw))
    assert abs(np.corrcoef(whole[:, :-1].ravel(), whole[:, 1:].ravel())[0, 1]) < 0.02
    assert key_of(1, "a") != key_of(1, "b")


def test_sun_at_zagreb_is_where_earth_search_says() -> None:
    # S2A_33TWL_20230818: elevation 55.66, azimuth 156.70, for the tile centre at 45.56 N
    elevation, azimuth = _sun(dt.datetime(2023, 8, 18, 10, 8, 8, tzinfo=dt.UTC), lon=15.7, lat=45.56)
    assert elevation == pytest.approx(55.66, abs=1.5)
    assert azimuth == pytest.approx(156.70, abs=3.0)


def test_fields_are_green_in_season_and_water_is_dark(small_config: SimulateConfig) -> None:
    land = Landscape(small_config)
    ground = land.ground(land.world)
    keys = [band.key for band in BANDS]
    ndvi = {}
    for date in (dt.date(2022, 1, 15), dt.date(2022, 5, 25), dt.date(2022, 7, 15)):
        acquisition = small_config.model_copy(update={"dates": (date,)}).acquisitions()[0]
        face = surface(ground, acquisition)
        red, nir = (face.reflectance(keys.index(key)) for key in ("red", "nir"))
        assert red.min() > 0
        assert nir.max() < 1
        ndvi[date.month] = (nir - red) / (nir + red)
        assert nir[ground.classes == WATER].mean() < 0.06
    inside = (ground.classes == CROP) & (ground.margin == 0)
    cereal = inside & (ground.crop == 0)
    maize = inside & (ground.crop == 1)
    assert ndvi[1][cereal].mean() < 0.35 < 0.6 < ndvi[5][cereal].mean()  # green in May,
    assert ndvi[7][cereal].mean() < 0.4  # harvested in July,
    assert ndvi[5][maize].mean() < 0.4 < 0.6 < ndvi[7][maize].mean()  # when maize stands high
    assert ndvi[7][ground.classes == FOREST].mean() > 0.7


def test_shadows_lie_away_from_the_sun_by_height_over_tangent(small_config: SimulateConfig) -> None:
    acquisition = small_config.acquisitions()[1]
    land = Landscape(small_config)
    east, north = shadow_offset(small_config, acquisition, land.scale)
    assert north > 0 > east  # the morning sun stands in the south-east
    height = np.hypot(east, north) * np.tan(np.radians(acquisition.sun_elevation))
    assert 1100 * land.scale <= height <= 1900 * land.scale
    above = sky(small_config, acquisition, land.world, land.scale)
    rows, cols = round(-north / 10), round(east / 10)
    moved = np.roll(above.cloud, (rows, cols), (0, 1))
    inner = (slice(60, -60), slice(60, -60))
    open_ground = above.cloud[inner] < 0.01
    assert np.corrcoef(moved[inner][open_ground], above.shadow[inner][open_ground])[0, 1] > 0.95


def test_scene_classes_follow_clouds_and_ground(small_config: SimulateConfig) -> None:
    land = Landscape(small_config)
    acquisition = small_config.acquisitions()[1]
    ground = land.ground(land.world)
    above = sky(small_config, acquisition, land.world, land.scale)
    scl = scene_classes(ground, surface(ground, acquisition), above)
    assert 0.02 < (above.cloud > 0.9).mean() < 0.9
    assert set(np.unique(scl[above.cloud > 0.9])) == {9}
    clear = (above.cloud < 0.05) & (above.cirrus < 0.01)
    assert not np.isin(scl[clear], SCL_CLOUD).any()
    assert set(np.unique(scl[clear & (above.shadow > 0.5)])) == {3}
    lit = clear & (above.shadow < 0.05)
    assert set(np.unique(scl[lit & (ground.classes == WATER)])) == {6}
    assert set(np.unique(scl[lit])) <= {4, 5, 6, 7}


def test_clear_skies_cost_nothing(small_config: SimulateConfig) -> None:
    clear = small_config.model_copy(update={"clouds": 0.0})
    above = sky(clear, clear.acquisitions()[0], GRID, 1.0)
    assert not above.cloud.any()
    assert not above.shadow.any()
    assert not above.cirrus.any()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"tile_px": 101}, "even"),
        ({"overlap_px": 1024}, "less than tile_px"),
        ({"resolution_m": 15}, "multiple of 10"),
        ({"dates": ["2022-06-01", "2022-05-01"]}, "ascending"),
        ({"dates": []}, "at least 1"),
        ({"tiels": 2}, "Extra inputs"),
        ({"clouds": 2.0}, "less than or equal"),
    ],
)
def test_bad_configs_are_refused(values: dict, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        SimulateConfig.model_validate(values)


def test_tiles_lie_on_the_mgrs_lattice_and_overlap() -> None:
    config = SimulateConfig(tiles=4, tile_px=100, overlap_px=20)
    tiles = {tile.name: tile.grid for tile in config.tile_list()}
    assert tiles["33TXK"].transform[2] == 600_000
    assert tiles["33TXK"].transform[5] == 5_000_040
    # nested in 20 m pixels of the tiling grid, whose tiles start at multiples of 20 m
    assert all(grid.transform[2] % 20 == 0 and grid.transform[5] % 20 == 0 for grid in tiles.values())
    assert tiles["33TWL"].offset_of(tiles["33TXL"]) == (0, 80)
    assert tiles["33TWL"].offset_of(tiles["33TWK"]) == (80, 0)
    assert config.world_grid().shape == (180, 180)
