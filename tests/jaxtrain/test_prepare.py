"""What a run begins with: the weights of classes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from jaxtrain.config import TrainConfig
from jaxtrain.data.opening import open_training_data
from jaxtrain.data.statistics import Statistics
from jaxtrain.prepare import _class_weights, dates_left_out, prepare
from zarr_store.errors import InvalidInput

from .cube_factory import shared_cube


def config_of(**optim: object) -> TrainConfig:
    return TrainConfig.model_validate({"data": {"cube": "none"}, "optim": optim})


def statistics_of(*class_pixels: int, value: tuple[float, float] | None = None) -> Statistics:
    pixels = np.array(class_pixels, np.int64)
    return Statistics(np.zeros(1), np.ones(1), pixels, int(pixels.sum()), "index", value)


def test_rare_classes_weigh_by_the_inverse_square_root_of_their_share() -> None:
    """A class of 1 % weighs seven times as much as one of 49 %, and a labelled pixel weighs one on average."""
    weights = np.array(_class_weights(config_of(class_weights="balanced"), statistics_of(4900, 100, 5000, 0)))
    share = np.array([0.49, 0.01, 0.5])
    np.testing.assert_allclose(weights[1] / weights[0], 7.0, rtol=1e-6)
    np.testing.assert_allclose(weights[:3], (1 / np.sqrt(share)) / (share / np.sqrt(share)).sum(), rtol=1e-6)
    assert float((weights[:3] * share).sum()) == pytest.approx(1.0)
    assert np.isfinite(weights[3]), "a class without pixels"


def test_without_balance_there_are_no_weights_and_values_have_none() -> None:
    assert _class_weights(config_of(class_weights="none"), statistics_of(1, 2)) is None
    with pytest.raises(InvalidInput, match="values are learned: use 'none'"):
        _class_weights(config_of(class_weights="balanced"), statistics_of(1, value=(0.0, 1.0)))


def test_a_loss_that_cannot_be_added_up_is_not_accumulated() -> None:
    config = config_of(loss="dice", accumulate=2)
    with pytest.raises(InvalidInput, match=r"'dice' is a quotient over the whole batch.*raise run\.batch_size"):
        prepare(config, open_training_data(str(shared_cube())), None)


def test_dates_that_make_no_whole_series_are_named() -> None:
    config = TrainConfig.model_validate(
        {"data": {"cube": str(shared_cube()), "patch": 32, "classes": {"4": "a", "6": "b"}, "split": {"block_m": 320}}}
    )
    card, _ = prepare(config, open_training_data(config.data.cube), None)
    assert dates_left_out(card) == []

    def of(dates: int, times: int) -> list[str]:
        data = config.data.model_copy(update={"dates": dates})
        return dates_left_out(
            replace(card, config=config.model_copy(update={"data": data}), times=tuple(map(str, range(times))))
        )

    assert of(2, 4) == []
    (line,) = of(3, 5)
    assert line.startswith("the last 2 of 5 dates make no whole series of data.dates = 3: no part has them")
