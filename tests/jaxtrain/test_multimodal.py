"""Training, evaluation and maps of several modalities on one hand-made cube."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxtrain import evaluate, predict, train
from jaxtrain.data.modality_source import open_sources
from jaxtrain.data.opening import open_training_data
from jaxtrain.inference.maps import open_map
from jaxtrain.prepare import prepare
from jaxtrain.runs.events import TrainEvent
from jaxtrain.runs.log import read_metrics
from jaxtrain.runs.rundir import load_card, program_of
from zarr_store.errors import InvalidInput, NothingFound, UnknownName
from zarr_store.read import open_cube

from .modal_factory import CLOUD, MODALITIES, RADAR_DB, make_modal_cube, modal_config


@pytest.fixture(scope="module")
def cube(tmp_path_factory: pytest.TempPathFactory) -> Path:
    url = tmp_path_factory.mktemp("modal") / "cube.zarr"
    make_modal_cube(url)
    return url


@pytest.fixture(scope="module")
def run(cube: Path) -> Path:
    train(modal_config(cube), cube.parent / "run")
    return cube.parent / "run"


def test_windows_of_all_modalities_are_the_same_ground(cube: Path) -> None:
    ready = open_training_data(str(cube)).prepare(modal_config(cube), None, None)
    assert [(one.name, one.ratio, one.dates) for one in ready.modalities] == [
        ("s2", 1, 0), ("s2_20", 2, 0), ("s1", 1, 0), ("dem", 1, 0)
    ]  # fmt: skip
    rows = np.array([[0, 16, 48], [1, 16, 48], [2, 64, 80]], np.int32)
    batch = ready.reader.read(rows)
    opened = open_cube(cube)
    fine = opened.tensorstore("s2", "reflectance").read().result()
    coarse = opened.tensorstore("s2_20", "reflectance").read().result()
    assert np.array_equal(batch["image_s2"][1], fine[1, :, 16:32, 48:64])
    assert np.array_equal(batch["image_s2_20"][1], coarse[1, :, 8:16, 24:32])
    # Sentinel-1 of the next day, in decibels; the last date has none within three days
    assert batch["image_s1"].mean() < -5
    assert not batch["observed_s1"][2].any()
    assert batch["observed_s1"][:2].all()
    # the first date is masked in Sentinel-2 and labelled all the same, as radar saw it
    assert not batch["observed_s2"][0].any()
    assert (batch["label"][0] != 255).all()
    assert batch["observed_dem"].all()
    assert 90 < batch["image_dem"].mean() < 260
    truth = opened.tensorstore("s2", "status").read().result()
    assert truth[0][CLOUD].max() == 2


def test_statistics_are_those_of_the_pixels_that_the_network_sees(cube: Path) -> None:
    ready = open_training_data(str(cube)).prepare(modal_config(cube), None, None)
    statistics = ready.statistics()
    batch = ready.reader.read(ready.plan.parts["train"].rows)
    first = 0
    for one in ready.modalities:
        seen = batch[f"observed_{one.name}"] == 1
        values = np.moveaxis(batch[f"image_{one.name}"], 1, -1)[seen].astype(float)
        last = first + len(one.bands)
        np.testing.assert_allclose(statistics.mean[first:last], values.mean(axis=0), rtol=1e-6)
        np.testing.assert_allclose(statistics.std[first:last], values.std(axis=0), rtol=1e-6)
        first = last
    assert statistics.class_pixels.tolist() == np.bincount(batch["label"].ravel(), minlength=256)[:3].tolist()
    assert RADAR_DB.min() - 3 < statistics.mean[4] < RADAR_DB.max() + 3


def test_a_run_learns_and_scores_the_same_pixels_without_a_modality(run: Path) -> None:
    every, without = evaluate(run), evaluate(run, without=["s2", "s2_20"])
    assert every.accuracy is not None
    assert without.accuracy is not None
    assert every.accuracy > 0.8
    assert without.accuracy > 0.6
    assert without.pixels == every.pixels
    assert without.seen["s2"] == 0
    assert every.seen["s2"] > 0.5
    assert without.seen["s1"] == every.seen["s1"]
    # its scores stand beside those of the run
    assert json.loads((run / "evaluation.json").read_text())["without"] == []
    assert (run / "evaluation-test-without-s2-s2_20.json").exists()


def test_a_map_says_which_modalities_were_used_where(run: Path, cube: Path, tmp_path: Path) -> None:
    made = predict(run, cube, tmp_path / "map.zarr", time="2023-08-10")
    layer = open_map(tmp_path / "map.zarr").read("modalities")
    # bits in the order of the configuration: s2 1, s2_20 2, s1 4, dem 8
    assert (layer[CLOUD] == 12).all()
    assert (layer[48:] == 15).all()
    assert made.modalities == {"s1+dem": 48 * 96, "s2+s2_20+s1+dem": 48 * 96}
    assert made.nodata == 0
    alone = predict(run, cube, tmp_path / "alone.zarr", time="2023-08-10", without=["s1", "dem"])
    assert alone.nodata == 48 * 96  # nothing that is left saw the clouded half
    assert (open_map(tmp_path / "alone.zarr").read("modalities")[48:] == 3).all()


def test_series_of_a_modality_take_the_nearest_dates(cube: Path) -> None:
    modalities = {**MODALITIES, "s1": {"collection": "s1", "dates": 2, "most_days": 10}}
    data = modal_config(cube).data.model_dump() | {"modalities": modalities}
    sources, _ = open_sources(modal_config(cube, data=data).data, open_cube(cube))
    assert sources[2].modality.dates == 2
    assert sources[2].steps.tolist() == [[0, 1], [0, 1], [0, 1]]


def test_training_windows_that_a_modality_saw_too_little_of_are_left_out(cube: Path) -> None:
    def rows_with(least: float) -> dict[str, list[list[int]]]:
        modalities = {**MODALITIES, "s2": {"collection": "s2", "min_observed": least}}
        data = modal_config(cube).data.model_dump() | {"modalities": modalities}
        plan = open_training_data(str(cube)).prepare(modal_config(cube, data=data), None, None).plan
        return {part: windows.rows.tolist() for part, windows in plan.parts.items()}

    every, clear = rows_with(0.0), rows_with(1.0)
    # cloud hides the upper half of the first date
    wanted = [row for row in every["train"] if row[0] > 0 or row[1] >= 48]
    assert clear["train"] == wanted
    assert len(wanted) < len(every["train"])
    assert (clear["validation"], clear["test"]) == (every["validation"], every["test"])


def test_no_training_window_that_a_modality_saw_enough_of_is_one_line(cube: Path) -> None:
    # the third date, which alone is left for training, has no partner in Sentinel-1
    modalities = {**MODALITIES, "s1": {"collection": "s1", "most_days": 0.9, "min_observed": 1.0}}
    data = modal_config(cube).data.model_dump() | {"modalities": modalities}
    split = {"block_m": 160, "test": 0.25, "validation": 0.15, "test_dates": ("2023-08-10", "2023-08-15")}
    config = modal_config(cube, data=data | {"split": split})
    with pytest.raises(NothingFound, match=r"modality s1 observed a share of 1 in none of \d+ training windows: lower"):
        open_training_data(str(cube)).prepare(config, None, None)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"s9": {"collection": "s9"}}, r"unknown collection 's9' .*modalities\.s9\.collection.*known: s1, s2, s2_20"),
        ({"s1": {"collection": "s1", "most_days": 0.1}}, r"no date of s1 lies within most_days = 0.1 .*0\.8 days away"),
        ({"dem": {"layer": "height"}}, r"unknown static layer 'height'"),
        ({"s2": {"collection": "s2", "bands": ["blue"]}}, r"unknown band 'blue'"),
    ],
)  # fmt: skip
def test_what_a_cube_lacks_is_one_line(cube: Path, changed: dict[str, dict[str, object]], words: str) -> None:
    data = {**modal_config(cube).data.model_dump(), "modalities": {**MODALITIES, **changed}}
    with pytest.raises(InvalidInput, match=words) as caught:
        open_training_data(str(cube)).prepare(modal_config(cube, data=data), None, None)
    assert "\n" not in str(caught.value)


def test_a_modality_that_the_run_does_not_have_is_named(run: Path) -> None:
    with pytest.raises(UnknownName, match="unknown modality 's3'"):
        evaluate(run, without=["s3"])
    with pytest.raises(InvalidInput, match="leaves no modality"):
        evaluate(run, without=list(MODALITIES))


def test_modalities_of_two_cubes(cube: Path, tmp_path: Path) -> None:
    make_modal_cube(tmp_path / "radar.zarr", only=("s1",), layers=False)
    modalities = {"s2": {"collection": "s2"}, "s1": {"collection": "s1", "cube": str(tmp_path / "radar.zarr")}}
    data = {**modal_config(cube).data.model_dump(), "modalities": modalities}
    ready = open_training_data(str(cube)).prepare(modal_config(cube, data=data), None, None)
    batch = ready.reader.read(ready.plan.parts["train"].rows[:2])
    one = open_training_data(str(cube)).prepare(modal_config(cube), None, None)
    other = one.reader.read(ready.plan.parts["train"].rows[:2])
    np.testing.assert_allclose(batch["image_s1"], 10 ** (other["image_s1"] / 10), rtol=1e-4)


def test_the_card_keeps_the_modalities(run: Path) -> None:
    card = load_card(run)
    assert card.bands == ("s2:green", "s2:red", "s2:nir", "s2_20:swir", "s1:vv", "s1:vh", "dem:dem")
    assert [one.ratio for one in card.modalities] == [1, 2, 1, 1]


def test_a_wrong_name_in_a_placement_is_told_before_a_lack_of_devices(cube: Path) -> None:
    groups = [["s2", "fusion"], ["s1", "dem", "s3"], ["s2_20"]]
    config = modal_config(cube, placement={"kind": "branches", "groups": groups})
    card, _ = prepare(config, open_training_data(str(cube)), None)
    with pytest.raises(InvalidInput, match=r"names 's3', which this network does not have: its branches are s2, s2_20"):
        program_of(card, config, jax.devices()[:1])


@pytest.mark.usefixtures("shared_programs")
def test_a_run_under_a_placement_that_is_killed_goes_on(cube: Path, tmp_path: Path) -> None:
    """The branches lie on two groups, the fusion on one of them and two replicas of each."""
    placed: dict[str, dict[str, Any]] = {
        "placement": {"kind": "branches", "groups": [["s2", "fusion"], ["s1"]]},
        "mesh": {"data": 2},
    }
    only = {name: MODALITIES[name] for name in ("s2", "s1")}
    data = modal_config(cube).data.model_dump() | {"modalities": only}
    steps = {"steps": 9, "batch_size": 8, "evaluate_every": 9, "checkpoint_every": 4, "log_every": 1}
    config = modal_config(cube, data=data, run=steps, **placed)

    class KilledError(Exception):
        pass

    def kill(event: TrainEvent) -> None:
        if event.kind == "step" and event.step == 6:
            raise KilledError

    with pytest.raises(KilledError):
        train(config, tmp_path / "killed", on_event=kill)
    assert train(config, tmp_path / "killed").resumed_from == 4
    train(config, tmp_path / "whole")
    losses = [
        [line["loss"] for line in read_metrics(tmp_path / name) if line["kind"] == "train"]
        for name in ("whole", "killed")
    ]
    assert len(losses[0]) == 9
    assert losses[0] == losses[1]
