from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import rasterio

from ingest.simulate import SimulateConfig, SimulatedWorld
from ingest.simulate.ground import BUILT, FOREST, WATER, Landscape
from ingest.simulate.radar import ENL, NODATA, RadarPass, backscatter, mean_backscatter, radar_passes
from ingest.simulate.spectra import surface


def test_speckle_has_the_stated_number_of_looks(small_config: SimulateConfig) -> None:
    land = Landscape(small_config)
    ground = land.ground(land.world)
    overpass = radar_passes(small_config)[0]
    face = surface(ground, small_config.acquisitions()[0])
    power = backscatter(small_config, land.world, ground, face, overpass, "vv")
    ratio = (power / mean_backscatter(ground, face, overpass, "vv")).astype(np.float64)
    assert ratio.mean() == pytest.approx(1.0, abs=0.01)
    assert ratio.mean() ** 2 / ratio.var() == pytest.approx(ENL, rel=0.03)
    # gamma distributed: skewness 2 / sqrt(looks)
    skew = ((ratio - ratio.mean()) ** 3).mean() / ratio.std() ** 3
    assert skew == pytest.approx(2 / np.sqrt(ENL), rel=0.1)


def test_polarisations_and_passes_speckle_apart(small_config: SimulateConfig) -> None:
    land = Landscape(small_config)
    ground = land.ground(land.world)
    face = surface(ground, small_config.acquisitions()[0])
    first, second = radar_passes(small_config)
    assert (first.ascending, second.ascending) == (True, False)

    def speckle(overpass: RadarPass, name: str) -> np.ndarray:
        power = backscatter(small_config, land.world, ground, face, overpass, name)
        mean: np.ndarray = mean_backscatter(ground, face, overpass, name)
        return (power / mean).ravel()

    one = speckle(first, "vv")
    for other in (speckle(first, "vh"), speckle(second, "vv")):
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.02


def test_files_hold_linear_power_over_the_same_ground(
    small_world: SimulatedWorld, small_config: SimulateConfig
) -> None:
    with rasterio.open(small_world.truth) as file:
        truth = file.read(1)
    folders = sorted((small_world.path / "sentinel-1-rtc").glob("*_rtc"))
    assert len(folders) == len(small_config.radar_dates)
    for folder in folders:
        item = json.loads((folder / f"{folder.name}.json").read_text())
        decibel = {}
        for name in ("vv", "vh"):
            with rasterio.open(folder / f"{name}.tif") as file:
                assert (file.dtypes[0], file.nodata) == ("float32", NODATA)
                assert list(file.shape) == item["properties"]["proj:shape"]
                assert list(file.transform)[:6] == item["properties"]["proj:transform"]
                power = file.read(1)
            seen = power != NODATA
            assert 0.5 < seen.mean() < 1.0  # a corner is outside the swath
            assert power[seen].min() > 0
            decibel[name] = {c: 10 * np.log10(power[seen & (truth == c)].mean()) for c in (WATER, FOREST, BUILT)}
        for name, levels in decibel.items():
            assert levels[WATER] < levels[FOREST] - 6 < levels[BUILT] - 6, (name, levels)
        assert decibel["vh"][FOREST] < decibel["vv"][FOREST] - 3
        assert item["properties"]["sat:orbit_state"] in ("ascending", "descending")


def test_a_world_without_radar_has_one_collection(small_config: SimulateConfig) -> None:
    assert radar_passes(small_config.model_copy(update={"radar_dates": ()})) == ()
    assert [dataclasses.asdict(p)["index"] for p in radar_passes(small_config)] == [0, 1]
