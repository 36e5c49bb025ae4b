"""Population-based training: who copies whom, what changes, and the same answer after an interruption."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial

from jaxtrain.shared import SharedParts
from jaxtrain.tuning.generations import Turn, explore, turn_of
from jaxtrain.tuning.page import trial_rows, write_page
from jaxtrain.tuning.search import begin_search
from jaxtrain.tuning.worker import Budget, work
from zarr_store.errors import InvalidInput, Preempted

from ..cube_factory import shared_cube, tiny_config
from .test_search import SHORT, write_space

SPACE: dict[str, Any] = {"optim.learning_rate": {"low": 1e-4, "high": 3e-2, "log": True}}


def ended(scores):
    """Trials of the first generation with these scores; None failed."""
    trials = []
    for number, score in enumerate(scores):
        state = TrialState.FAIL if score is None else TrialState.COMPLETE
        trial = create_trial(state=state, value=score)
        trial.number = number
        trials.append(trial)
    return trials


def test_the_worst_members_copy_one_of_the_best():
    scores = [0.5, 0.9, 0.1, 0.6, 0.8, 0.2, 0.7, 0.55, 0.56, 0.57]
    turns = [turn_of(10 + member, ended(scores), 10, 0, lower=False) for member in range(10)]
    assert [turn.member for turn in turns if turn.explores] == [2, 5]  # a fifth of ten
    assert {turns[2].parent, turns[5].parent} <= {1, 4}
    assert all(turn.parent == turn.member for turn in turns if not turn.explores)
    assert turn_of(3, [], 10, 0, lower=False) == Turn(0, 3)
    down = [turn_of(10 + member, ended(scores), 10, 0, lower=True) for member in range(10)]
    assert [turn.member for turn in down if turn.explores] == [1, 4]


def test_a_member_that_failed_copies_too():
    turns = [turn_of(4 + member, ended([None, 0.5, 0.6, 0.7]), 4, 0, lower=False) for member in range(4)]
    assert [turn.parent for turn in turns] == [3, 1, 2, 3]
    assert [turn.explores for turn in turns] == [True, False, False, False]
    lost = turn_of(2, ended([None, None]), 2, 0, lower=False)
    assert lost.parent is None  # nothing is left to copy: it begins anew


def test_changes_are_factors_within_the_range():
    draws = np.random.default_rng(0)
    found = {round(explore(1e-3, FloatDistribution(1e-4, 1e-2, log=True), draws), 7) for _ in range(20)}
    assert found == {8e-4, 1.2e-3}
    assert {explore(1e-4, FloatDistribution(1e-4, 1.1e-4), draws) for _ in range(20)} == {1e-4, 1.1e-4}
    assert {explore(4, IntDistribution(2, 10, step=2), draws) for _ in range(20)} == {2, 6}
    assert {explore("b", CategoricalDistribution(["a", "b", "c"]), draws) for _ in range(20)} == {"a", "c"}


@pytest.fixture(scope="module")
def config():
    return tiny_config(shared_cube(), **SHORT, mesh={"data": 1, "model": 1})


@pytest.fixture(scope="module")
def shared():
    """Compiled steps of all tests of this file."""
    return SharedParts()


def begin(config, folder):
    folder.mkdir(exist_ok=True)
    return begin_search(config, write_space(folder, SPACE), folder / "study", sampler="pbt", members=3)


@pytest.fixture(scope="module")
def searched(tmp_path_factory, config, shared):
    """Three members, four generations of one step."""
    study = begin(config, tmp_path_factory.mktemp("generations"))
    work(study, Budget(), shared=shared)
    return study


def steps_of(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if line["kind"] == "train"]


def test_each_generation_goes_on_from_its_parents(searched, shared):
    trials = searched.trials()
    assert len(trials) == 12
    assert {trial.state for trial in trials} == {TrialState.COMPLETE}
    assert shared.compiled() != {}
    assert set(shared.compiled().values()) == {1}
    copies = [trial for trial in trials if trial.user_attrs["explores"]]
    assert len(copies) == 3  # one of three members, after each generation but the last
    rates = {trial.number: trial.params["optim.learning_rate"] for trial in trials}
    for trial in trials[3:]:
        parent = trial.user_attrs["parent"]
        generation = trial.user_attrs["generation"]
        mine, its = steps_of(searched.run_of(trial.number)), steps_of(searched.run_of(parent))
        assert [step for step, _ in mine] == list(range(1, generation + 2))
        assert mine[:-1] == its
        factor = rates[trial.number] / rates[parent]
        inside = 1e-4 < rates[trial.number] < 3e-2
        assert not inside or factor == pytest.approx(1.0) or (trial in copies and round(factor, 6) in (0.8, 1.2))
        assert trial.user_attrs["steps"] == 1


def test_the_history_is_in_the_study_and_on_the_page(searched):
    rows = trial_rows(searched, searched.plan.read_space())
    assert [(row["generation"], row["member"]) for row in rows] == [divmod(number, 3) for number in range(12)]
    page = write_page(searched).read_text()
    assert "Members over the generations" in page
    assert "How the best member came about" in page
    best = searched.best()
    assert (searched.run_of(best.number) / "checkpoints").exists()
    journal = optuna.storages.journal.JournalFileBackend(str(searched.path / "journal.log"))
    opened = optuna.load_study(study_name="study", storage=optuna.storages.JournalStorage(journal))
    assert opened.best_value == best.value


def test_an_interrupted_population_gives_the_same_answer(searched, config, shared, tmp_path, monkeypatch):
    from jaxtrain.tuning import trial as module

    study = begin(config, tmp_path / "again")
    real, stops = module._Watch.__call__, [4, 7]

    def stopping(self, event):
        real(self, event)
        if event.kind == "step" and self.trial.number in stops:
            stops.remove(self.trial.number)
            raise Preempted("stopped")

    monkeypatch.setattr(module._Watch, "__call__", stopping)
    for _ in range(2):
        with pytest.raises(Preempted):
            work(study, Budget(), shared=shared)
    work(study, Budget(), shared=shared)
    assert not stops

    def answers(study):
        return [(trial.number, trial.params, trial.value) for trial in study.trials()]

    assert answers(study) == answers(searched)


@pytest.mark.parametrize(
    ("space", "options", "words"),
    [
        ({"model.width": [4, 6]}, {}, "model.width belongs to its shape"),
        ({"model.dropout": {"low": 0.0, "high": 0.3}}, {}, "model.dropout may be 0"),
        (SPACE, {"pruner": "asha"}, "leave out --pruner asha"),
        (SPACE, {"folds": 2}, "leave out --folds"),
        (SPACE, {"members": 1}, "at least two members"),
    ],
)
def test_what_a_population_cannot_search_is_refused(config, tmp_path, space, options, words):
    with pytest.raises(InvalidInput, match=words):
        begin_search(config, write_space(tmp_path, space), tmp_path / "study", **{"sampler": "pbt", **options})
    assert not (tmp_path / "study").exists()
