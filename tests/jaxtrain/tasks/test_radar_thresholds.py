"""The stated rate of false alarms is that of ground on which nothing changed, in a simulated Sentinel-1 world."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ingest.simulate import SimulateConfig
from ingest.simulate.ground import Landscape
from ingest.simulate.radar import backscatter, radar_passes
from ingest.simulate.spectra import surface
from jaxtrain.tasks.anomalies import AnomalyOptions, AnomalyResult, find_anomalies
from jaxtrain.tasks.date_change import LOOKS, normal_ratio
from jaxtrain.tasks.held_out import held_out
from jaxtrain.tasks.layers import open_layers
from jaxtrain.tasks.tables import open_table
from jaxtrain.tasks.work import LocalWorkers, keep_blocks
from zarr_store.create import create_cube
from zarr_store.spec import BandSpec, CubeSpec, Layout
from zarr_store.write import ShardWriter

SIDE, DATES = 384, 5


@pytest.fixture(scope="module")
def radar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cube of simulated Sentinel-1 backscatter on five dates of one orbit, on which nothing changes."""
    days = tuple(dt.date(2022, 7, 1) + dt.timedelta(days=at) for at in range(2 * DATES))
    config = SimulateConfig(tiles=1, tile_px=SIDE, overlap_px=0, dates=days[:1], radar_dates=days, seed=11)
    landscape = Landscape(config)
    ground = landscape.ground(landscape.world)
    season = config.acquisitions()[0]
    passes = [one for one in radar_passes(config) if one.ascending]
    power = np.stack([
        np.stack([
            backscatter(config, landscape.world, ground, surface(ground, dataclasses.replace(season, time=one.time)),
                        one, name)
            for name in ("vv", "vh")
        ])
        for one in passes
    ])  # fmt: skip
    url = tmp_path_factory.mktemp("radar") / "cube.zarr"
    spec = CubeSpec(
        "s1", "backscatter", (BandSpec("vv", nodata=None), BandSpec("vh", nodata=None)), landscape.world,
        tuple(one.time.replace(tzinfo=None).isoformat() for one in passes),
        layout=Layout("s1", (1, 128, 128), (1, 384, 384)),
    )  # fmt: skip
    create_cube(url, [spec], items={"s1": [{"id": "i"}]}, provenance={})
    for region in spec.shards().values():
        arrays: dict[str, Any] = {
            "backscatter": power[region.t0 : region.t1], "status": np.ones(region.shape, np.uint8),
            "source_item": np.zeros(region.shape, np.int16),
        }  # fmt: skip
        ShardWriter(url, "s1").write(region, arrays, key="k", sources=())
    return url


def look(radar: Path, out: Path, **chosen: Any) -> tuple[AnomalyResult, np.ndarray, np.ndarray]:
    """Result, scores, and which pixels are held out."""
    keep_blocks(0)
    options = AnomalyOptions(**chosen)
    found = find_anomalies(radar, out, options, workers=LocalWorkers(1))
    table = open_table(str(radar))
    chosen_ids = held_out(table, np.arange(SIDE * SIDE, dtype=np.uint64), options.seed).reshape(SIDE, SIDE)
    return found, np.asarray(open_layers(out / "anomalies.zarr")["score"]), chosen_ids


@pytest.mark.parametrize("dates", [1, 2, 5])
def test_the_ratio_of_speckle_alone_is_a_standard_normal_number(dates: int) -> None:
    rng = np.random.default_rng(dates)
    power = 0.07 * rng.gamma(LOOKS, 1 / LOOKS, (dates + 1, 1, 500, 400))
    decibels = (10 * np.log10(power)).astype(np.float32)
    if dates > 1:
        decibels[0, :, ::2] = np.nan  # fewer clear dates in half of the pixels
    found = normal_ratio(decibels)
    assert found.mean() == pytest.approx(0, abs=0.01)
    assert found.std() == pytest.approx(1, abs=0.01)
    for limit, share in ((-3.09, 1e-3), (-2.326, 1e-2), (2.326, 1e-2), (3.09, 1e-3)):
        beyond = (found > limit) if limit > 0 else (found < limit)
        assert beyond.mean() == pytest.approx(share, rel=0.25)
    assert np.isnan(normal_ratio(np.where(np.arange(dates + 1)[:, None, None, None] < dates, np.nan, decibels))).all()


@pytest.mark.parametrize("rate", [1e-2, 1e-3])
def test_by_chi2_the_stated_share_of_unchanged_ground_is_flagged(radar: Path, tmp_path: Path, rate: float) -> None:
    """Decibels are skewed: their χ² flags three times the share at one in a thousand."""
    found, _, _ = look(radar, tmp_path / "out", dates="change", threshold="chi2", rate=rate)
    assert found.flagged / found.pixels == pytest.approx(rate, rel=0.25)
    assert json.loads((tmp_path / "out/anomalies.json").read_text())["held_out"] == 0


@pytest.mark.parametrize("chosen", [
    {"method": "rx", "time": "4", "usual": "0"},
    {"method": "rx", "time": "4", "usual": "0,1,2"},
    {"method": "local-rx", "time": "4", "usual": "0,2"},
    {"method": "local-rx", "time": "4", "usual": "0"},
    {"method": "rx", "dates": "change", "time": "1,2,4", "usual": "0,1,3"},
])  # fmt: skip
def test_an_empirical_threshold_keeps_its_rate_on_held_out_ground_of_another_date(
    radar: Path, tmp_path: Path, chosen: dict[str, str]
) -> None:
    found, scores, apart = look(radar, tmp_path / "out", **chosen, rate=1e-2)
    assert found.rule.endswith(f"on {chosen['usual']})")
    share = (scores[apart] > found.threshold).mean()
    assert share == pytest.approx(1e-2, rel=0.25)
    # with one date that is scored, each usual date has rows of its own: their mean has less speckle
    dates = 1 if chosen.get("dates") == "change" else len(chosen["usual"].split(","))
    assert found.held_out == dates * apart.sum()


def test_what_is_usual_is_fitted_to_the_usual_dates(radar: Path, tmp_path: Path) -> None:
    """Scores of a date against itself differ from those against another date."""
    itself, own, _ = look(radar, tmp_path / "own", time="4", rate=1e-2)
    _, other, _ = look(radar, tmp_path / "other", time="4", usual="0", rate=1e-2)
    _, plain, _ = look(radar, tmp_path / "plain", time="4", usual="4", rate=1e-2)
    assert not np.array_equal(own, other)
    np.testing.assert_array_equal(own, plain)
    assert itself.rule == "quantile of held-out scores (25% of the ground)"
