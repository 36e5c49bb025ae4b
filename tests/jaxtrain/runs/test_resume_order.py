"""A run that is continued answers in the order of classes that its card has fixed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from jaxtrain.config import TrainConfig
from jaxtrain.data.opening import open_training_data
from jaxtrain.prepare import check_same_run, prepare
from jaxtrain.runs.rundir import config_differences
from zarr_store.errors import InvalidInput

from ..cube_factory import CLASSES, make_cube, shared_cube, tiny_config
from ..sample_factory import make_samples

TURNED = dict(reversed(CLASSES.items()))


def with_classes(config: TrainConfig, classes: dict[str, str]) -> TrainConfig:
    return config.model_copy(update={"data": config.data.model_copy(update={"classes": classes})})


def test_classes_in_another_order_are_another_configuration(tmp_path: Path) -> None:
    config = tiny_config(shared_cube())
    turned = with_classes(config, TURNED)
    assert config.data.classes == turned.data.classes, "as mappings the two are equal"
    (line,) = config_differences(config, turned)
    assert line.startswith("data.classes (the order of the classes): ")
    assert line.index('"4"') < line.index('"6"') < line.rindex('"6"') < line.rindex('"4"')
    card, _ = prepare(config, open_training_data(config.data.cube), None)
    with pytest.raises(InvalidInput, match=r"another configuration.*data\.classes \(the order"):
        check_same_run(tmp_path / "run", card, turned, True)


def test_values_of_one_class_have_no_order() -> None:
    config = tiny_config(shared_cube())
    one, same, other = (
        with_classes(config, classes)
        for classes in (
            {"4": "green", "5": "green", "6": "water"},
            {"5": "green", "6": "water", "4": "green"},
            {"6": "water", "4": "green", "5": "green"},
        )
    )
    assert config_differences(one, same) == []
    assert len(config_differences(one, other)) == 1


def test_no_clipping_is_one_setting_in_both_spellings() -> None:
    config = tiny_config(shared_cube(), optim={"clip_norm": None})
    assert config_differences(config, tiny_config(shared_cube(), optim={"clip_norm": float("inf")})) == [
        line for line in config_differences(config, tiny_config(shared_cube())) if "clip_norm" not in line
    ]


@pytest.mark.parametrize("kind", ["cube", "cubes", "samples"])
def test_labels_of_a_continued_run_are_those_of_its_card(kind: str, tmp_path: Path) -> None:
    if kind == "samples":
        url = str(make_samples(tmp_path / "s.zarr"))
        names = {"0": "field", "1": "lake", "2": "town"}
        config = TrainConfig.model_validate({"data": {"cube": url, "classes": names}, "model": {"name": "resnet"}})
    else:
        far = tmp_path / "far.zarr"
        if kind == "cubes":
            make_cube(far, shape=(1, 192, 160), seed=3)
        names = CLASSES
        cube = str(shared_cube())
        config = tiny_config("", data={"cube": [cube, str(far)] if kind == "cubes" else cube})
    config = with_classes(config, names)
    turned = with_classes(config, dict(reversed(names.items())))
    data = open_training_data(config.data.cube)
    card, first = prepare(config, data, None)
    assert prepare(turned, data, None)[0].classes.names == card.classes.names[::-1], "a new run would turn them"
    kept, again = prepare(turned, data, card)
    assert kept is card
    assert again.classes == card.classes
    rows = first.plan.parts["train"].rows[:8]
    np.testing.assert_array_equal(again.reader.read(rows)["label"], first.reader.read(rows)["label"])
