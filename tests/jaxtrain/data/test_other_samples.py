"""Stores of single and of several classes fit where their labels say the same; a store of one class can be judged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from jaxtrain.data.opening import open_training_data
from jaxtrain.prepare import prepare
from jaxtrain.runs.rundir import ModelCard
from zarr_store.errors import InvalidInput
from zarr_store.samples import Sample, SampleSpec, write_samples

from ..cube_factory import tiny_config
from ..sample_factory import BANDS, CLASSES, make_samples


def card_of(store: Path) -> ModelCard:
    data = {"classes": {}, "split": {"kind": "random"}}
    config = tiny_config(store, data={"cube": str(store), **data}, model={"name": "cnn", "width": 4, "depth": 1})
    return prepare(config, open_training_data(str(store)), None)[0]


def labels(card: ModelCard, store: Path) -> np.ndarray:
    chosen = open_training_data(str(store)).select_all(card)
    return chosen.reader.read(chosen.windows.rows)["label"]


def test_labels_of_single_names_fit_a_run_of_single_classes(tmp_path: Path) -> None:
    one = make_samples(tmp_path / "one.zarr", count=24)
    several = make_samples(tmp_path / "several.zarr", count=24, several=True)
    expected = [(i // 4 + i) % 3 for i in range(24)]
    assert labels(card_of(one), several).tolist() == expected
    assert labels(card_of(several), one).tolist() == np.eye(3, dtype=np.uint8)[expected].tolist()


def test_images_of_several_classes_do_not_fit_a_run_of_single_ones(tmp_path: Path) -> None:
    spec = SampleSpec(2, BANDS, (16, 16), "uint8", CLASSES, "several")
    image = np.zeros((3, 16, 16), np.uint8)
    rows = [Sample(image, np.array(row, np.uint8), 0.0, 0.0, "x") for row in ([1, 0, 0], [1, 1, 0])]
    write_samples(tmp_path / "mixed.zarr", spec, rows)
    card = card_of(make_samples(tmp_path / "one.zarr", count=24))
    with pytest.raises(
        InvalidInput, match=r"1 of 2 samples of .* have several classes or none, but the model predicts"
    ):
        labels(card, tmp_path / "mixed.zarr")


def test_a_store_of_one_class_is_judged_and_not_trained_on(tmp_path: Path) -> None:
    lake = make_samples(tmp_path / "lake.zarr", count=8, classes=("lake",))
    assert labels(card_of(make_samples(tmp_path / "one.zarr", count=24)), lake).tolist() == [1] * 8
    with pytest.raises(InvalidInput, match="holds one class, lake: a network needs at least two"):
        card_of(lake)


def test_all_wrong_labels_and_colours_are_named(tmp_path: Path) -> None:
    store = make_samples(tmp_path / "one.zarr", count=24)
    config = tiny_config(store, data={"cube": str(store), "classes": {"0": "a", "7": "b", "9": "c"}})
    with pytest.raises(InvalidInput, match="has no label 7, 9; it has 0 = field"):
        prepare(config, open_training_data(str(store)), None)
    config = tiny_config(
        store, data={"cube": str(store), "classes": {"0": "a"}, "colours": {"x": "#000000", "y": "#000001"}}
    )
    with pytest.raises(InvalidInput, match="unknown classes 'x', 'y'"):
        prepare(config, open_training_data(str(store)), None)
