"""What has nothing to do with the values of a trial stops the search and loses nothing; a free worker waits."""

from __future__ import annotations

import socket
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from jaxtrain.tuning import trial as trial_module
from jaxtrain.tuning import worker as worker_module
from jaxtrain.tuning.plan import SearchPlan
from jaxtrain.tuning.rungs import Rungs, count_begun, trainings_of
from jaxtrain.tuning.study import StudyFolder
from jaxtrain.tuning.worker import Budget, TrialNews, work
from zarr_store.errors import AccessError, NoSpace, TerrashardError

SPACE: dict[str, Any] = {name: {"low": 1e-4, "high": 1e-2, "log": True} for name in ("optim.learning_rate",)}
STEPS = 40
NEVER: Any = SimpleNamespace(stop=SimpleNamespace(is_set=lambda: False))


@pytest.fixture
def search(tmp_path: Path) -> StudyFolder:
    run = {"steps": STEPS, "evaluate_every": 10}
    plan = SearchPlan(
        settings={"data": {"cube": "x.zarr", "label": "scl"}, "run": run}, space=SPACE, digest="d", score="accuracy",
        sampler="random",
    )  # fmt: skip
    return StudyFolder.create(tmp_path / "study", plan)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Trainings that only count: the steps of each run by its folder, and the error that the next one meets."""
    about: dict[str, Any] = {"steps": {}, "error": None, "when": lambda before: True}

    def train(config: Any, out: Path, *, on_event: Any, until: int | None = None, **_: Any) -> Any:
        before = about["steps"].get(out, 0)
        last = max(before, min(STEPS, until or STEPS))
        (out / "checkpoints").mkdir(parents=True, exist_ok=True)
        if about["error"] is not None and about["when"](before):
            raise about["error"]
        for step in range(before + 10, last + 1, 10):
            on_event(SimpleNamespace(kind="step", step=step, metrics={}))
            on_event(
                SimpleNamespace(
                    kind="validation", step=step, metrics={"accuracy": 50 * config.optim.learning_rate + step / 1e3}
                )
            )
        about["steps"][out] = last
        return SimpleNamespace(steps=last, stopped_early=False, best_score=0.5, validation={"accuracy": 0.5})

    monkeypatch.setattr(trial_module, "train", train)
    monkeypatch.setattr(trial_module, "_check_data", lambda *_: True)
    monkeypatch.setattr(trial_module, "_score", lambda *_, **__: 0.5)
    return about


def states(search: StudyFolder) -> list[str]:
    return [one.state for one in trainings_of(search.trials())]


@pytest.mark.parametrize("error", [AccessError("the bucket does not answer"), NoSpace("the disk is full")], ids=str)
def test_a_promoted_trial_that_cannot_read_or_write_loses_no_training(
    error: TerrashardError, search: StudyFolder, trained: dict[str, Any]
) -> None:
    trained.update(error=error, when=lambda before: before > 0)
    with pytest.raises(type(error)):
        work(search, Budget(trials=12), shared=NEVER)
    assert "running" in states(search), "no promotion met the error: the test shows nothing"
    assert "ended" not in states(search)
    begun = count_begun(search.trials())
    assert len(list(search.path.glob("trials/*/checkpoints"))) == begun
    trained["error"] = None
    work(search, Budget(trials=12), shared=NEVER)
    assert states(search).count("complete") >= 3
    assert set(states(search)) == {"complete", "paused"}


def test_a_full_disk_ends_no_trial_and_a_bucket_of_one_trial_ends_that_trial(
    search: StudyFolder, trained: dict[str, Any]
) -> None:
    trained["error"] = NoSpace("the disk is full")
    with pytest.raises(NoSpace):
        work(search, Budget(trials=4), shared=NEVER)
    assert states(search) == ["running"]
    trained.update(error=AccessError("no such bucket"), when=lambda before: len(trained["steps"]) == 1 and not before)
    work(search, Budget(trials=4), shared=NEVER)
    assert states(search).count("ended") >= 1
    assert states(search).count("complete") >= 1


def test_steps_that_a_killed_process_did_and_did_not_record_count(search: StudyFolder, trained: dict[str, Any]) -> None:
    study = search.study()
    begun = study.ask()
    search.plan.read_space().suggest(begun, search.plan.base)
    trained["steps"][search.run_of(0)] = 10  # killed between the checkpoint and the pause
    begun.report(0.01, 1)
    news: list[TrialNews] = []
    work(search, Budget(trials=1), shared=NEVER, on_trial=news.append)
    assert news, "the trial was not taken over"
    assert [trial.user_attrs["steps"] for trial in search.trials()] == [10, STEPS - 10]


def test_a_free_worker_waits_while_a_trial_that_runs_may_leave_another_to_finish() -> None:
    host = socket.gethostname()

    def made(number: int, worker: str, seconds: float, scores: dict[int, float], state: TrialState, **more: Any) -> Any:
        done = {"steps": 100, "seconds": seconds} if state != TrialState.RUNNING else {}
        value = max(scores.values()) if state == TrialState.COMPLETE else None
        trial = create_trial(
            state=state, value=value, intermediate_values=scores,
            user_attrs={"worker": worker, "host": host, **done, **more},
        )  # fmt: skip
        trial.number, trial.datetime_start = number, datetime.now() - timedelta(seconds=1)
        return trial

    trials: list[FrozenTrial] = [
        made(n, str(n % 2), 10.0 if n % 2 == 0 else 1.0, {1: n / 150}, TrialState.PRUNED, paused=1) for n in range(4)
    ]
    trials.append(made(4, "1", 1.0, trials[3].intermediate_values, TrialState.RUNNING, continues=3, passed=1))
    plan = SimpleNamespace(pauses=True, members=0, rungs=lambda some: Rungs(trainings_of(some)))
    folder: Any = SimpleNamespace(plan=plan)
    assert worker_module._what_now(folder, Budget(trials=5), trials, 0.0, "0") is worker_module._LATER
    plan.pauses = False
    assert worker_module._what_now(folder, Budget(trials=6), trials, 0.0, "0") is None


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_cma_es_learns_from_paused_trials() -> None:
    """Most trials are paused; a sampler that saw complete ones only would draw nearly all values at random."""
    plan = SearchPlan(
        settings={"data": {"cube": "x.zarr", "label": "scl"}, "run": {"steps": 12, "evaluate_every": 1}},
        space={"optim.learning_rate": {"low": 1e-4, "high": 1e-2}, "optim.weight_decay": {"low": 0.0, "high": 0.1}},
        digest="d", score="accuracy", sampler="cmaes",
    )  # fmt: skip
    assert plan.pauses
    study = optuna.create_study(direction="maximize", sampler=plan.make_sampler(), pruner=plan.make_pruner())
    ranges: dict[str, BaseDistribution] = {name: FloatDistribution(0, 1) for name in "abc"}
    for number in range(30):
        trial = study.ask(ranges)
        value = -sum((trial.params[name] - 0.3) ** 2 for name in "abc")
        trial.report(value, 1)
        if number == 0:
            study.tell(trial, value)
        else:
            study.tell(trial, state=TrialState.PRUNED)
    generations = [v for trial in study.trials for k, v in trial.system_attrs.items() if k.endswith("generation")]
    assert max(generations, default=0) >= 2
