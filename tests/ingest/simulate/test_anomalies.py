"""Planted anomalies are where the truth says, on the dates it says, and nowhere else."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path

import numpy as np
import pytest
import rasterio
import shapely
from pydantic import ValidationError

from ingest.request.parquet import open_geoparquet
from ingest.simulate import SimulateConfig, SimulatedWorld, simulate
from ingest.simulate.anomalies import KINDS, plant
from ingest.simulate.config import Anomaly
from ingest.simulate.ground import FOREST, WATER, Landscape
from zarr_store.crs import transformer_between
from zarr_store.errors import InvalidInput

BEFORE, AFTER, RADAR = dt.date(2022, 6, 6), dt.date(2022, 7, 24), dt.date(2022, 7, 25)
PLAIN = SimulateConfig(
    tiles=1, tile_px=300, overlap_px=0, clouds=0.0, dates=(BEFORE, AFTER), radiometry=("none",),
    radar_dates=(BEFORE, RADAR), block_px=128, seed=5,
)  # fmt: skip
ENTRIES = tuple(Anomaly(kind=kind, date=AFTER, size_m=60 if kind in ("ship", "building") else 120) for kind in KINDS)
PLANTED = PLAIN.model_copy(update={"anomalies": ENTRIES})


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SimulatedWorld]:
    folder = tmp_path_factory.mktemp("anomalies")
    return {"plain": simulate(folder / "plain", PLAIN), "planted": simulate(folder / "planted", PLANTED)}


def read(path: Path) -> np.ndarray:
    with rasterio.open(path) as file:
        return file.read(1)


def scene(world: SimulatedWorld, date: dt.date, name: str) -> np.ndarray:
    return read(next(world.path.glob(f"sentinel-2-l2a/*_{date:%Y%m%d}_*/{name}.tif")))


def test_scenes_differ_from_the_plain_world_only_in_planted_pixels_and_from_their_date(
    worlds: dict[str, SimulatedWorld],
) -> None:
    truth = read(worlds["planted"].path / "anomalies.tif")
    assert sorted(np.unique(truth)) == list(range(7))
    near = np.pad(truth > 0, 1)
    near = np.any([near[1 + i : 301 + i, 1 + j : 301 + j] for i in (-1, 0, 1) for j in (-1, 0, 1)], axis=0)
    for band in ("B02", "B08"):
        np.testing.assert_array_equal(scene(worlds["plain"], BEFORE, band), scene(worlds["planted"], BEFORE, band))
        changed = scene(worlds["plain"], AFTER, band) != scene(worlds["planted"], AFTER, band)
        assert not changed[~near].any()  # the sensor's blur reaches one pixel further
        for number in range(1, 7):
            assert changed[truth == number].mean() > 0.9, (band, number)


def test_radar_shows_them_too_but_no_cloud(worlds: dict[str, SimulatedWorld]) -> None:
    truth = read(worlds["planted"].path / "anomalies.tif")
    numbers: dict[str, set[int]] = {}
    for item in sorted(worlds["plain"].path.glob("sentinel-1-*/*/vv.tif")):
        plain, planted = read(item), read(worlds["planted"].path / item.relative_to(worlds["plain"].path))
        numbers[item.parent.name] = {int(number) for number in np.unique(truth[plain != planted])}
    before, after = (numbers[name] for name in sorted(numbers, key=lambda name: "20220725" in name))
    assert before == set()
    assert len(after) >= 3
    assert after <= {1, 2, 3, 4, 5}


def test_the_scene_classification_misses_the_cloud_and_sees_the_flood(worlds: dict[str, SimulatedWorld]) -> None:
    truth = read(worlds["planted"].path / "anomalies.tif")[::2, ::2]
    scl = scene(worlds["planted"], AFTER, "SCL")
    np.testing.assert_array_equal(scl[truth == 6], scene(worlds["plain"], AFTER, "SCL")[truth == 6])
    assert (scl[truth == 3] == 6).mean() > 0.8
    assert scene(worlds["planted"], AFTER, "B02")[read(worlds["planted"].path / "anomalies.tif") == 6].mean() > 4000


def test_tables_of_truth_agree_with_its_raster(worlds: dict[str, SimulatedWorld]) -> None:
    world = worlds["planted"]
    assert world.anomalies is not None
    assert worlds["plain"].anomalies is None
    with open_geoparquet(world.anomalies) as file:
        wkb, kinds = file.read("kind")
        _, pixels = file.read("pixels")
        crs = file.crs
    assert kinds is not None
    assert pixels is not None
    assert list(kinds) == list(KINDS)
    truth = read(world.path / "anomalies.tif")
    assert [int(count) for count in np.bincount(truth.ravel())[1:]] == list(pixels)
    document = json.loads((world.path / "anomalies.geojson").read_text())
    degrees = transformer_between(crs, "OGC:CRS84")
    for feature, raw in zip(document["features"], wkb, strict=True):
        outline = shapely.from_wkb(raw)
        assert outline.area == pytest.approx(100.0 * feature["properties"]["pixels"])
        x, y = degrees.transform(*outline.centroid.coords[0])
        assert shapely.geometry.shape(feature["geometry"]).centroid.distance(shapely.Point(x, y)) < 1e-6
    assert json.loads((world.path / "world.json").read_text())["config"]["anomalies"][0]["kind"] == "building"


def test_places_follow_from_the_seed_and_lie_on_ground_of_their_kind() -> None:
    landscape = Landscape(PLANTED)
    first, again = plant(landscape), plant(landscape)
    assert first.planted == again.planted
    other = plant(Landscape(PLANTED.model_copy(update={"anomalies": (ENTRIES[0].model_copy(update={"seed": 9}),)})))
    assert (other.planted[0].x, other.planted[0].y) != (first.planted[0].x, first.planted[0].y)
    ground = landscape.ground(landscape.world)
    for one, wanted in ((first.planted[1], FOREST), (first.planted[4], WATER)):
        found = one.covers(landscape.world)
        assert found is not None
        assert (ground.classes[found[0]][found[1]] == wanted).mean() >= 0.9


def test_a_world_without_anomalies_has_the_manifest_of_before() -> None:
    assert "anomalies" not in PLAIN.to_dict()
    assert "anomalies" in PLANTED.to_dict()


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"kind": "building", "date": AFTER, "x": 1.0}, "x and y belong together"),
        ({"kind": "building", "date": AFTER, "until": BEFORE}, "lies before date"),
        ({"kind": "building", "date": AFTER, "x": 1.0, "y": 1.0, "count": 2}, "x and y name one place"),
        ({"kind": "cloud", "date": dt.date(2022, 7, 1)}, "is not one of the dates"),
        ({"kind": "burn", "date": dt.date(2023, 7, 1)}, "is after the last date"),
        ({"kind": "crater", "date": AFTER}, "building"),
    ],
)
def test_what_cannot_be_planted_is_refused(entry: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        SimulateConfig.model_validate({**PLAIN.model_dump(), "anomalies": (entry,)})


def test_a_world_too_small_for_an_anomaly_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    config = PLAIN.model_copy(update={"anomalies": (Anomaly(kind="ship", date=AFTER, size_m=2500),)})
    with pytest.raises(InvalidInput, match="no place left for a ship of 2500 m"):
        simulate(tmp_path / "world", config)
    outside = PLAIN.model_copy(update={"anomalies": (Anomaly(kind="cloud", date=AFTER, x=0, y=0),)})
    with pytest.raises(InvalidInput, match="outside the world"):
        simulate(tmp_path / "world", outside)
    assert not list(tmp_path.iterdir())
