"""The space of a search: what it may name, and what is wrong with it in one line."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from typing import Any

import optuna
import pytest

from jaxtrain.config import TrainConfig
from jaxtrain.tuning.plan import check_search
from jaxtrain.tuning.space import _is_table, parse_space, trial_config
from zarr_store.errors import InvalidInput

BASE = TrainConfig.model_validate({"data": {"cube": "none.zarr"}})
SPACE = {
    "optim.momentum": {"low": 0.8, "high": 0.99, "when": {"optim.name": "sgd"}},
    "optim.name": ["adamw", "sgd"],
    "optim": {"learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}},
    "model.width": {"low": 8, "high": 24, "step": 8},
    "data.bands": [["red", "nir"], ["red"]],
    "model.dropout": {"low": 0.1, "high": 0.5, "when": {"model": {"name": ["cnn", "resnet"]}}},
}


def drawn(space, count=40):
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    return [space.suggest(study.ask(), BASE) for _ in range(count)]


def test_values_are_in_range_and_conditions_hold():
    space = parse_space(SPACE, BASE)
    assert [one.name for one in space.parameters].index("optim.name") < 2
    values = drawn(space)
    assert {one["optim.name"] for one in values} == {"adamw", "sgd"}
    assert all(("optim.momentum" in one) == (one["optim.name"] == "sgd") for one in values)
    assert {one["model.width"] for one in values} == {8, 16, 24}
    assert all(1e-4 <= one["optim.learning_rate"] <= 1e-2 for one in values)
    assert sum(one["optim.learning_rate"] < 1e-3 for one in values) in range(10, 31)  # logarithmic
    assert all("model.dropout" not in one for one in values)  # the network of the configuration is a unet
    assert {tuple(one["data.bands"]) for one in values} == {("red",), ("red", "nir")}


def test_a_trial_has_the_configuration_of_its_values():
    config = trial_config(
        {"data": {"cube": "none.zarr"}}, {"data.bands": ["red"], "optim.name": "sgd"}, where="trial 1"
    )
    assert config.data.bands == ("red",)
    assert config.optim.name == "sgd"
    with pytest.raises(InvalidInput, match=r"trial 2: .*patch 20 must be a multiple"):
        trial_config({"data": {"cube": "none.zarr"}}, {"data.patch": 20}, where="trial 2")


@pytest.mark.parametrize(("space", "message"), [
    ({}, "names no setting"),
    ({"optim.lerning_rate": [1e-3]}, "unknown setting 'optim.lerning_rate': did you mean 'optim.learning_rate'"),
    ({"optim": [1, 2]}, "optim is a section: name one of its settings"),
    ({"optim.learning_rate": 1e-3}, "is one value: expected a list"),
    ({"optim.learning_rate": {"low": 1e-2, "high": 1e-4}}, "low 0.01 must be below high 0.0001"),
    ({"optim.learning_rate": {"low": -1.0, "high": 1.0}}, r"optim.learning_rate = -1.0 is not legal: .*greater than 0"),
    ({"optim.learning_rate": {"low": 0.1, "hihg": 1.0}}, "optim.learning_rate.hihg is unknown: did you mean 'high'"),
    ({"optim.learning_rate": {"low": 0.1}}, "optim.learning_rate.high expects a number, got nothing"),
    ({"optim.weight_decay": {"low": 0.0, "high": 1.0, "log": True}}, "begins above 0"),
    ({"model.width": {"low": 8.5, "high": 16}}, "model.width = 8.5 is not legal"),
    ({"model.width": {"low": 8, "high": 16, "step": 2.5}}, "model.width is a whole number"),
    ({"model.width": {"low": 8, "high": 16, "step": 0}}, "step expects a number above 0"),
    ({"optim.name": ["adamw", "adamx"]}, 'optim.name = "adamx" is not legal'),
    ({"optim.name": ["adamw", "adamw"]}, "a choice twice"),
    ({"optim.name": []}, "at least one value"),
    ({"data.split.block_m": [100.0, 200.0]}, "is the same for all trials"),
    ({"mesh.data": [1, 2]}, "is the same for all trials"),
    ({"optim.name": ["adamw"], "optim.momentum": {"low": 0.1, "high": 0.9, "when": {"optim.name": "sgd"}}},
     'waits for optim.name = "sgd", which is none of its choices'),
    ({"optim.momentum": {"low": 0.1, "high": 0.9, "when": {"optim.nam": "sgd"}}}, "did you mean 'optim.name'"),
    ({"optim.momentum": {"low": 0.1, "high": 0.9, "when": {"optim.ema": 0.5}},
      "optim.ema": {"low": 0.1, "high": 0.9, "when": {"optim.momentum": 0.5}}}, "wait for each other"),
])  # fmt: skip
def test_a_wrong_space_is_one_line_with_the_way_out(space, message):
    with pytest.raises(InvalidInput, match=message) as caught:
        parse_space(space, BASE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "message"), [
    ('"optim.name" = [2023-01-01]', r'space: optim.name = "2023-01-01" is not legal: no setting has a date or time'),
    ('"data.bands" = [["red", 10:30:00]]', r'data.bands = \["red", "10:30:00"\] is not legal: no setting has a date'),
    ('"data.colours.water" = [2023-01-01T00:00:00Z]', "data.colours.water = .* no setting has a date or time"),
    ('"optim.ema" = { low = 0.1, high = 0.9, when = { "optim.name" = 2023-01-01 } }',
     'the condition of optim.ema, optim.name = "2023-01-01" is not legal: no setting has a date'),
    ('"optim.ema" = { low = 0.1, high = 0.9, when = { "optim.name" = 2023-01-01 } }\n"optim.name" = ["adamw", "sgd"]',
     'optim.ema waits for optim.name = "2023-01-01", which is none of its choices'),
    ('"optim.ema" = { low = 2023-01-01, high = 0.9 }', r"optim.ema.low expects a number, got datetime.date"),
    ('"optim.ema" = 2023-01-01', "is one value: expected a list"),
])  # fmt: skip
def test_dates_and_times_are_refused_wherever_they_stand(text, message):
    with pytest.raises(InvalidInput, match=message):
        parse_space(tomllib.loads(text), BASE)


@pytest.mark.parametrize("space", [
    {"optim.name.x": [1, 2]},
    {"optim": {"name": {"x": [1, 2]}}},
    {"data.bands.first": ["red", "nir"]},
    {"optim.ema": {"low": 0.1, "high": 0.9, "when": {"optim.name.x": 1}}},
])  # fmt: skip
def test_a_setting_below_a_plain_one_is_unknown(space):
    with pytest.raises(InvalidInput, match=r"unknown setting '(optim.name.x|data.bands.first)': did you mean"):
        parse_space(space, BASE)


def test_entries_of_tables_may_be_named():
    space = parse_space({"data.colours.water": ["#0000ff", "#000080"]}, BASE)
    assert [one.name for one in space.parameters] == ["data.colours.water"]
    assert _is_table(dict[str, int] | None)
    assert _is_table(Mapping[str, int])
    assert _is_table(Any)
    assert not any(map(_is_table, (str, int | None, tuple[str, ...])))
    tables = {"data": {"cube": "none.zarr", "colours": {"water": "#0000ff"}}}
    with pytest.raises(InvalidInput, match=r'trial 3: data.colours.water.x cannot be set, as water is no table: "#00'):
        trial_config(tables, {"data.colours.water.x": 1}, where="trial 3")


def test_samplers_and_pruners_that_cannot_serve_a_space():
    ranges = parse_space({"optim.learning_rate": {"low": 1e-4, "high": 1e-2}}, BASE)
    with pytest.raises(InvalidInput, match=r"cmaes draws numbers from ranges, and optim.name has choices"):
        check_search("cmaes", "asha", 0, parse_space(SPACE, BASE), BASE)
    check_search("cmaes", "asha", 0, ranges, BASE)
    with pytest.raises(InvalidInput, match=r"wilcoxon compares trials fold by fold: add --folds 5"):
        check_search("tpe", "wilcoxon", 0, ranges, BASE)
    short = BASE.model_copy(update={"run": BASE.run.model_copy(update={"steps": 50})})
    with pytest.raises(InvalidInput, match=r"a trial of run.steps = 50 has one .*--pruner none"):
        check_search("tpe", "asha", 0, ranges, short)
    check_search("tpe", "none", 0, ranges, short)
