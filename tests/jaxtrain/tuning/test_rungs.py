"""Paused and promoted trials: who goes on, what a promotion continues, and how the study shows it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from jaxtrain.loop import train
from jaxtrain.shared import SharedParts
from jaxtrain.tuning import worker as worker_module
from jaxtrain.tuning.page import per_worker, trial_rows, write_page
from jaxtrain.tuning.rungs import RungPruner, Rungs, Training, count_begun, first_of, promote, trainings_of
from jaxtrain.tuning.search import begin_search
from jaxtrain.tuning.study import StudyFolder
from jaxtrain.tuning.worker import Budget, TrialNews, work
from zarr_store.errors import Preempted

from ..cube_factory import shared_cube, tiny_config
from .test_search import SHORT, write_space

SPACE: dict[str, Any] = {"optim.learning_rate": {"low": 1e-4, "high": 3e-2, "log": True}}


def waiting(*scores: float, rung: int = 1) -> list[Training]:
    """Trainings that are paused at a rung with these scores."""
    return [Training(number, {rung: score}, "paused", rung) for number, score in enumerate(scores)]


def test_the_best_quarter_of_a_rung_is_promoted() -> None:
    assert Rungs(waiting(0.1, 0.4, 0.2)).promoted() is None
    assert Rungs(waiting(0.1, 0.4, 0.2, 0.3)).promoted() == Training(1, {1: 0.4}, "paused", 1)
    assert Rungs(waiting(0.1, 0.4, 0.2, 0.3), lower=True).promoted() == Training(0, {1: 0.1}, "paused", 1)
    gone = [Training(1, {1: 0.4, 4: 0.5}, "complete"), *waiting(0.1, 0.2, 0.3)]
    assert Rungs(gone).promoted() is None  # the quarter of four has gone on
    late = [*gone, *(Training(number, {1: 0.0}, "paused", 1) for number in range(5, 9))]
    promoted = Rungs(late).promoted()
    assert promoted is not None
    assert promoted.number == 2  # worse ones have come, so that a second of them goes on


def test_the_highest_rung_goes_first_and_a_score_that_is_not_finite_last() -> None:
    high = [Training(10 + number, {1: 0.9, 4: score}, "paused", 4) for number, score in enumerate((0.5, 0.6, 0.7, 0.1))]
    low = [Training(20 + number, {1: 0.99}, "paused", 1) for number in range(4)]
    assert [one.number for one in high if Rungs([*low, *high], best_so_far=False).goes_on(one.number, 4)] == [12]
    found = Rungs([*low, *high], best_so_far=False).promoted()
    assert found is not None
    assert found.number == 12
    spoiled = waiting(math.nan, 0.1, math.nan, math.nan)
    assert Rungs(spoiled).goes_on(1, 1)


def test_the_best_score_so_far_counts_of_validations_and_the_last_of_folds() -> None:
    dips = [Training(0, {1: 0.9, 2: 0.1, 3: 0.1, 4: 0.2}), *(Training(n, {1: 0.3, 4: 0.3}) for n in range(1, 4))]
    assert Rungs(dips).goes_on(0, 4)
    assert not Rungs(dips, best_so_far=False).goes_on(0, 4)


def test_the_best_paused_one_is_finished_when_no_other_begins() -> None:
    rungs = Rungs([*waiting(0.1, 0.4, 0.2), Training(7, {1: 0.9}, "complete"), Training(8, {1: 0.9}, "ended")])
    best = rungs.to_finish(None)
    assert best is not None
    assert best.number == 1
    assert rungs.to_finish(2) == best
    assert rungs.to_finish(1) is None


def made(number: int, scores: dict[int, float], state: TrialState = TrialState.PRUNED, **about: Any) -> FrozenTrial:
    """A trial of a study."""
    value = max(scores.values()) if state == TrialState.COMPLETE else None
    trial = create_trial(state=state, value=value, intermediate_values=scores, user_attrs=about)
    trial.number = number
    return trial


def test_a_trial_that_a_release_before_stopped_is_compared_and_not_continued() -> None:
    trials = [made(number, {1: 0.1 * number}) for number in range(4)]
    assert [one.state for one in trainings_of(trials)] == ["ended"] * 4
    assert Rungs(trainings_of(trials)).promoted() is None
    assert Rungs([*trainings_of(trials), *waiting(0.9)]).promoted() is not None


@pytest.mark.parametrize("url", [None, "sqlite"])
def test_a_promotion_is_one_entry_of_a_plain_study(tmp_path: Path, url: str | None) -> None:
    """It is whole at once, so that a process that dies right after it leaves a trial that another one takes."""
    storage = None if url is None else f"sqlite:///{tmp_path / 's.db'}"
    study = optuna.create_study(storage=storage, pruner=RungPruner(), sampler=optuna.samplers.RandomSampler(seed=0))
    for score in (0.3, 0.8):
        trial = study.ask({"x": FloatDistribution(0, 1)})
        trial.report(score, 1)
        assert trial.should_prune()  # the best quarter of fewer than four is nobody
        trial.set_user_attr("paused", 1)
        study.tell(trial, state=TrialState.PRUNED)
    again = promote(study, trainings_of(study.trials)[1])
    found = study.trials[2]
    assert again.number == found.number == 2
    assert (found.state, found.params, found.intermediate_values) == (
        TrialState.RUNNING,
        study.trials[1].params,
        {1: 0.8},
    )
    assert found.user_attrs == {"continues": 1, "passed": 1}
    assert again.suggest_float("x", 0, 1) == study.trials[1].params["x"]
    assert [(one.number, one.state) for one in trainings_of(study.trials)] == [(0, "paused"), (1, "running")]
    assert count_begun(study.trials) == 2


@pytest.fixture(scope="module")
def config() -> Any:
    return tiny_config(shared_cube(), **SHORT, mesh={"data": 1, "model": 1})


@pytest.fixture(scope="module")
def shared() -> SharedParts:
    """Compiled steps of all tests of this file."""
    return SharedParts()


def begin(config: Any, folder: Path, **options: Any) -> StudyFolder:
    return begin_search(config, write_space(folder, SPACE), folder / "study", sampler="random", **options)


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory, config: Any, shared: SharedParts) -> Any:
    """Eight trials of four validations."""
    news: list[TrialNews] = []
    study = begin(config, tmp_path_factory.mktemp("rungs"))
    work(study, Budget(trials=8), shared=shared, on_trial=news.append)
    return study, news


def lines_of(run: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if line["kind"] == "train"]


def test_a_quarter_of_the_trials_is_finished_and_the_others_wait(searched: Any, shared: SharedParts) -> None:
    study, news = searched
    trials = study.trials()
    assert count_begun(trials) == 8
    states = [one.state for one in trainings_of(trials)]
    assert states.count("complete") == 2
    assert states.count("paused") == 6
    assert set(shared.compiled().values()) == {1}
    for one in trainings_of(trials):
        assert (study.run_of(one.number) / "checkpoints").exists() == (
            one.state == "paused" or one.number == first_of(study.best())
        )
    assert [one.finished for one in news][-1] == 8
    assert any(one.state == "paused" and "paused after step 1: accuracy 0." in one.message for one in news)
    (rate,) = per_worker(trials)
    assert (rate["trials"], rate["steps"]) == (8, 8 + 2 * 3)


def test_a_promoted_trial_goes_on_exactly(searched: Any, shared: SharedParts, tmp_path: Path) -> None:
    study, _ = searched
    promoted = [trial for trial in study.trials() if "continues" in trial.user_attrs]
    assert promoted, "no trial was promoted: the test shows nothing"
    for trial in promoted:
        before = study.trials()[trial.user_attrs["continues"]]
        assert trial.params == before.params
        assert trial.intermediate_values[1] == before.intermediate_values[1]
        assert sorted(trial.intermediate_values) == [1, 2, 3, 4]
        assert trial.value == pytest.approx(max(trial.intermediate_values.values()))
        assert (before.user_attrs["steps"], trial.user_attrs["steps"]) == (1, 3)
        assert not study.run_of(trial.number).exists()
    one = study.run_of(promoted[0].user_attrs["continues"])
    values = study.plan.read_space().values_of(promoted[0].params)
    train(study.plan.config_of(values), tmp_path / "alone", progress=False, shared=shared, report=False)
    alone = lines_of(tmp_path / "alone")
    assert [step for step, _ in lines_of(one)] == [step for step, _ in alone] == [1, 2, 3, 4]
    assert [loss for _, loss in lines_of(one)] == pytest.approx([loss for _, loss in alone], rel=1e-5)


def test_the_study_and_the_page_show_who_goes_on(searched: Any) -> None:
    study, _ = searched
    rows = trial_rows(study, study.plan.read_space())
    states = [row["state"] for row in rows]
    assert (states.count("paused"), states.count("went on"), states.count("complete")) == (6, 2, 2)
    assert {row["number"] for row in rows if row["state"] == "went on"} == {
        row["continues"] for row in rows if row["continues"] is not None
    }
    assert "<th>continues</th>" in write_page(study).read_text()
    journal = optuna.storages.journal.JournalFileBackend(str(study.path / "journal.log"))
    opened = optuna.load_study(study_name="study", storage=optuna.storages.JournalStorage(journal))
    assert {trial.state for trial in opened.trials} == {TrialState.COMPLETE, TrialState.PRUNED}
    assert opened.best_value == study.best().value


def test_more_trials_promote_and_the_same_command_does_nothing(searched: Any, config: Any, shared: SharedParts) -> None:
    study, _ = searched
    count = len(study.trials())
    work(study, Budget(trials=8), shared=shared)
    assert len(study.trials()) == count
    work(study, Budget(trials=12), shared=shared)
    assert count_begun(study.trials()) == 12
    assert [one.state for one in trainings_of(study.trials())].count("complete") >= 3


def test_an_interrupted_promotion_goes_on(
    config: Any, shared: SharedParts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jaxtrain.tuning import trial as module

    study, real, stopped = begin(config, tmp_path), module._Watch.__call__, list[int]()

    def stopping(self: Any, event: Any) -> None:
        real(self, event)
        if event.kind == "checkpoint" and event.step == 3 and not stopped:
            stopped.append(self.trial.number)
            raise Preempted("stopped")

    monkeypatch.setattr(module._Watch, "__call__", stopping)
    with pytest.raises(Preempted):
        work(study, Budget(trials=4), shared=shared)
    assert stopped, "nothing was interrupted: the test shows nothing"
    work(study, Budget(trials=4), shared=shared)
    first = first_of(study.trials()[stopped[0]])
    assert [step for step, _ in lines_of(study.run_of(first))] == [1, 2, 3, 4]
    assert study.trials()[stopped[0]].state == TrialState.COMPLETE
    assert sum(trial.user_attrs["steps"] for trial in study.trials()) == 4 + 3


def test_folds_pause_too(config: Any, shared: SharedParts, tmp_path: Path) -> None:
    study = begin(config, tmp_path, folds=2)
    work(study, Budget(trials=4), shared=shared)
    (done,) = [trial for trial in study.trials() if trial.state == TrialState.COMPLETE]
    assert len(done.user_attrs["folds"]) == 2
    assert done.intermediate_values[2] == pytest.approx(sum(done.user_attrs["folds"]) / 2)
    first = study.run_of(first_of(done))
    assert [[step for step, _ in lines_of(first / f"fold-{fold}")] for fold in range(2)] == [[1, 2, 3, 4]] * 2
    paused = [one for one in trainings_of(study.trials()) if one.state == "paused"]
    assert len(paused) == 3
    assert all(not (study.run_of(one.number) / "fold-1").exists() for one in paused)


def test_the_last_quarter_of_the_time_is_for_trials_that_have_begun(config: Any, tmp_path: Path) -> None:
    study = begin(config, tmp_path)
    paused = [made(number, {1: 0.1 * number}, paused=1, steps=1) for number in range(3)]

    def what(trials: list[FrozenTrial], seconds: float, budget: Budget | None = None) -> Any:
        return worker_module._what_now(study, budget or Budget(seconds=100.0), trials, seconds, "0")

    assert what(paused, 74.0) is worker_module._NOW
    assert what(paused, 75.0).number == 2
    assert what([], 99.0) is worker_module._NOW  # nothing waits: the time is used all the same
    assert what(paused, 100.0).number == 2  # a search is never without a trained network
    assert what([*paused, made(3, {1: 0.5}, TrialState.COMPLETE)], 100.0) is None
    steps = Budget(steps=4)
    assert what(paused[:2], 0.0, steps) is worker_module._NOW
    assert what(paused, 0.0, steps).number == 2


def test_a_run_that_has_come_further_returns_at_once(config: Any, shared: SharedParts, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(config, run, progress=False, shared=shared, report=False, until=3).steps == 3
    again = train(config, run, progress=False, shared=shared, report=False, until=1)
    assert (again.steps, again.resumed_from) == (3, 3)
    assert [step for step, _ in lines_of(run)] == [1, 2, 3]
