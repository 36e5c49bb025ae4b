"""Numbers of each modality of other data mean what they meant in training, or are refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxtrain.config import TrainConfig
from jaxtrain.data.opening import open_training_data
from jaxtrain.evaluation.own_data import open_own
from jaxtrain.evaluation.scores import select_data
from jaxtrain.prepare import check_same_run, prepare
from jaxtrain.runs.rundir import ModelCard, config_differences
from zarr_store.errors import InvalidInput
from zarr_store.labels import label_boxes
from zarr_store.layers import open_layer, write_layer
from zarr_store.read import open_cube

from ..modal_factory import MODALITIES, make_modal_cube, modal_config


def config_of(cube: Path, **modalities: dict[str, Any]) -> TrainConfig:
    data = modal_config(cube).data.model_dump()
    return modal_config(cube, data={**data, "modalities": modalities or MODALITIES})


@pytest.fixture(scope="module")
def cube(tmp_path_factory: pytest.TempPathFactory) -> Path:
    url = tmp_path_factory.mktemp("numbers") / "cube.zarr"
    make_modal_cube(url)
    return url


@pytest.fixture(scope="module")
def card(cube: Path) -> ModelCard:
    return prepare(config_of(cube), open_training_data(str(cube)), None)[0]


def with_heights(cube: Path, there: Path, change: Any, *, kind: Any = "values", **origin: str) -> Path:
    """Copy a cube, with its layer of elevation written anew."""
    shutil.copytree(cube, there)
    opened = open_cube(there)
    height = open_layer(opened, "dem").read()
    boxes = [(box, change(height[box.y0 : box.y1, box.x0 : box.x1])) for box in label_boxes(opened)]
    write_layer(str(there), "dem", kind, lambda: boxes, origin={"made": "anew", **origin}, replace=True)
    return there


@pytest.mark.parametrize("unit", ["dB", "1"])
def test_decibels_are_not_turned_into_decibels_again(unit: str, card: ModelCard, tmp_path: Path) -> None:
    make_modal_cube(tmp_path / "db.zarr", only=("s2", "s1"), layers=True, decibels=unit)
    other = open_training_data(str(tmp_path / "db.zarr"))
    words = r"s1\.decibel.*in dB already" if unit == "dB" else r"s1\.decibel.*band vv .*mean -1\d.*power is above 0"
    only = {name: MODALITIES[name] for name in ("s2", "s1")}
    with pytest.raises(InvalidInput, match=words):
        prepare(config_of(tmp_path / "db.zarr", **only), other, None)
    learned = prepare(config_of(Path(card.cube), **only), open_training_data(card.cube), None)[0]
    with pytest.raises(InvalidInput, match=r"s1\.decibel|units are dB and 1"):
        select_data(learned, other, part=None)
    assert select_data(learned, other, part=None, without=["s1"]).windows


def test_a_layer_in_another_unit_without_a_name_is_warned_of(card: ModelCard, cube: Path, tmp_path: Path) -> None:
    same = with_heights(cube, tmp_path / "same.zarr", lambda height: height + 1)
    assert not [line for line in select_data(card, open_training_data(str(same)), part=None).warnings if "dem" in line]
    other = with_heights(cube, tmp_path / "cm.zarr", lambda height: 100 * height)
    found = select_data(card, open_training_data(str(other)), part=None)
    (line,) = [line for line in found.warnings if "modality dem" in line]
    assert "unlike those of training" in line


def test_a_layer_of_classes_is_no_layer_of_numbers(card: ModelCard, cube: Path, tmp_path: Path) -> None:
    other = with_heights(cube, tmp_path / "codes.zarr", lambda height: (height / 50).astype(np.uint8), kind="classes")
    with pytest.raises(InvalidInput, match=r"band dem .*one holds numbers, the other codes of classes"):
        select_data(card, open_training_data(str(other)), part=None)


def test_a_cube_may_lack_a_modality_that_is_left_out(card: ModelCard, tmp_path: Path) -> None:
    make_modal_cube(tmp_path / "less.zarr", only=("s2", "s2_20"))
    less = open_training_data(str(tmp_path / "less.zarr"))
    with pytest.raises(InvalidInput, match="unknown collection 's1'"):
        select_data(card, less, part=None)
    chosen = select_data(card, less, part=None, without=["s1"])
    batch = chosen.reader.read(chosen.windows.rows[:3])
    assert batch["image_s1"].shape == (3, 2, 16, 16)
    assert not batch["observed_s1"].any()
    every = select_data(card, open_training_data(card.cube), part=None, without=["s1"])
    assert np.array_equal(batch["image_s2"], every.reader.read(chosen.windows.rows[:3])["image_s2"])


def test_modalities_in_another_order_are_another_configuration(cube: Path, card: ModelCard, tmp_path: Path) -> None:
    turned = config_of(cube, **dict(reversed(MODALITIES.items())))
    assert config_differences(card.config, card.config) == []
    assert config_differences(card.config, turned) == [
        "data.modalities (their order): s2, s2_20, s1, dem → dem, s1, s2_20, s2"
    ]
    with pytest.raises(InvalidInput, match=r"another configuration.*data\.modalities \(their order\)"):
        check_same_run(tmp_path / "run", card, turned, True)


def test_a_cube_of_a_modality_moves_with_the_cube_of_the_windows(tmp_path: Path) -> None:
    make_modal_cube(tmp_path / "old" / "cube.zarr", only=("s2",))
    make_modal_cube(tmp_path / "old" / "radar" / "s1.zarr", only=("s1",), layers=False)
    radar = {"collection": "s1", "cube": str(tmp_path / "old" / "radar" / "s1.zarr")}
    config = config_of(tmp_path / "old" / "cube.zarr", s2={"collection": "s2"}, s1=radar)
    card = prepare(config, open_training_data(config.data.cube), None)[0]
    (tmp_path / "old").rename(tmp_path / "new")
    data = open_own(card, tmp_path / "new" / "run")
    assert data.digest(card) == card.cube_digest
    test = select_data(card, data, part="test")
    assert test.warnings == ()
    assert test.reader.read(test.windows.rows[:1])["observed_s1"].any()
    there = {**radar, "cube": str(tmp_path / "new" / "radar" / "s1.zarr")}
    moved = config_of(tmp_path / "new" / "cube.zarr", s2={"collection": "s2"}, s1=there)
    assert config_differences(card.config, moved) == []
