"""Trials that are computed as one program: the same answers as alone, and no trial in the way of another."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from optuna.trial import TrialState

from jaxtrain.loop import train
from jaxtrain.shared import SharedParts
from jaxtrain.tuning import population as module
from jaxtrain.tuning.lanes import decide_population, work_together
from jaxtrain.tuning.population import PopulationSpeed
from jaxtrain.tuning.rungs import count_begun
from jaxtrain.tuning.search import begin_search
from jaxtrain.tuning.worker import Budget
from zarr_store.errors import Preempted

from ..cube_factory import shared_cube, tiny_config
from .test_search import SHORT, write_space

SPACE: dict[str, Any] = {
    "optim.learning_rate": {"low": 1e-4, "high": 3e-2, "log": True},
    "model.dropout": {"low": 0.05, "high": 0.3},
}


def losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


@pytest.fixture(scope="module")
def config():
    return tiny_config(shared_cube(), **SHORT, mesh={"data": 1, "model": 1})


@pytest.fixture(scope="module")
def shared():
    """Compiled steps of all tests of this file."""
    return SharedParts()


@pytest.fixture(scope="module")
def searched(tmp_path_factory, shared):
    """Five trials in a population of two, some of which are paused after four steps, and one is promoted."""
    folder = tmp_path_factory.mktemp("population")
    run = SHORT["run"] | {"steps": 8, "evaluate_every": 4}
    longer = tiny_config(shared_cube(), run=run, mesh={"data": 1, "model": 1})
    study = begin_search(longer, write_space(folder, SPACE), folder / "study", sampler="random", pruner="asha")
    full: list[int] = []
    real = module._Group._compute

    def counted(self, calls):
        full.append(len(calls))
        return real(self, calls)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module._Group, "_compute", counted)
        compiled = work_together(study, Budget(trials=5), 2, shared=shared)
    return study, compiled, full


def test_a_population_is_compiled_once(searched):
    study, compiled, full = searched
    assert 2 in full, "the trials never met: the test shows nothing"
    (group,) = {trial.user_attrs["group"] for trial in study.trials()}
    assert compiled[f"{group} together"] == 1
    assert compiled[group] <= 1  # of a trial that was alone
    assert {trial.user_attrs["worker"] for trial in study.trials()} == {"0.0", "0.1"}


def test_each_trial_of_a_population_has_the_answer_of_one_by_itself(searched, tmp_path):
    study, _, _ = searched
    trials = study.trials()
    assert count_begun(trials) == 5
    assert {trial.state for trial in trials} == {TrialState.COMPLETE, TrialState.PRUNED}
    alone = SharedParts()
    for trial in trials[:2]:
        values = study.plan.read_space().values_of(trial.params)
        train(study.plan.config_of(values), tmp_path / str(trial.number), progress=False, shared=alone, report=False)
        found = losses(study.run_of(trial.number))
        assert found == pytest.approx(losses(tmp_path / str(trial.number))[: len(found)], rel=1e-5)


def test_a_member_that_fails_does_not_touch_the_others(config, shared, tmp_path):
    space = {"optim.learning_rate": [1e-3, 1e38], "model.dropout": {"low": 0.05, "high": 0.3}}
    study = begin_search(config, write_space(tmp_path, space), tmp_path / "study", sampler="random", pruner="none")
    work_together(study, Budget(trials=4), 2, shared=shared)
    states = {trial.params["optim.learning_rate"]: trial.state for trial in study.trials()}
    assert states == {"0.001": TrialState.COMPLETE, "1e+38": TrialState.FAIL}
    for trial in study.trials():
        if trial.state == TrialState.COMPLETE:
            assert all(map(math.isfinite, losses(study.run_of(trial.number))))
        else:
            assert "finite" in trial.user_attrs["reason"]


def test_an_interrupted_population_goes_on_from_its_checkpoints(config, shared, tmp_path, monkeypatch):
    study = begin_search(config, write_space(tmp_path, SPACE), tmp_path / "study", sampler="random", pruner="none")
    real = module._Group._compute
    steps: list[int] = []

    def stopping(self, calls):
        steps.append(len(calls))
        if len(steps) == 3:
            shared.stop.set()  # as SIGTERM does
        return real(self, calls)

    with monkeypatch.context() as patch:
        patch.setattr(module._Group, "_compute", stopping)
        with pytest.raises(Preempted):
            work_together(study, Budget(trials=2), 2, shared=shared)
    assert [trial.state for trial in study.trials()] == [TrialState.RUNNING] * 2
    shared.stop.clear()
    work_together(study, Budget(trials=2), 2, shared=shared)
    assert [trial.state for trial in study.trials()] == [TrialState.COMPLETE] * 2
    for number in range(2):
        lines = [json.loads(line) for line in (study.run_of(number) / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2, 3, 4]


def test_the_faster_way_is_measured_once_and_kept_in_the_study(config, shared, tmp_path, monkeypatch):
    study = begin_search(config, write_space(tmp_path, SPACE), tmp_path / "study", sampler="random", pruner="none")
    notes: list[str] = []
    assert decide_population(study, Budget(trials=2), shared) is None  # nothing is measured on a processor
    monkeypatch.setattr("jaxtrain.tuning.lanes.MEASURED", ("cpu",))
    work_together(study, Budget(trials=2), None, shared=shared, on_note=notes.append)
    (kept,) = study.study().user_attrs["populations"]
    assert kept["size"] == 2
    assert 0 < kept["alone_s"] < 10
    assert 0 < kept["together_s"] < 10
    way = "together" if kept["is_faster"] else "one after the other"
    assert notes == [f"{PopulationSpeed(kept['device'], 2, kept['alone_s'], kept['together_s']).words()}: {way}"]
    workers = {trial.user_attrs["worker"] for trial in study.trials()}
    assert workers == ({"0.0", "0.1"} if kept["is_faster"] else {"0"})
    monkeypatch.setattr("jaxtrain.tuning.lanes.measure_population", lambda *_: pytest.fail("measured again"))
    work_together(study, Budget(trials=2), None, shared=shared, on_note=notes.append)
    assert notes[0] == notes[1]


def test_a_population_is_taken_only_where_it_is_faster():
    assert PopulationSpeed("device", 4, 0.1, 0.3).is_faster
    assert not PopulationSpeed("device", 4, 0.1, 0.5).is_faster
    assert not PopulationSpeed("device", 4, 0.1, None).is_faster
