"""Searches: what trials share, what they leave, how they continue, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from dataclasses import replace
from typing import Any

import jax
import optuna
import pytest
import tomli_w
from optuna.trial import TrialState

from cli.session import Session
from cli.tuning import show_search
from jaxtrain.launching.places import ThisMachine
from jaxtrain.loop import train
from jaxtrain.runs.events import TrainingResult
from jaxtrain.runs.rundir import LOCK_KEY
from jaxtrain.settings import read_train_config
from jaxtrain.shared import SharedParts
from jaxtrain.tuning.page import per_worker, trial_rows, write_page
from jaxtrain.tuning.search import begin_search
from jaxtrain.tuning.study import StudyFolder
from jaxtrain.tuning.verdict import Contender, Verdict, settle, write_best
from jaxtrain.tuning.worker import Budget, TrialNews, work
from jaxtrain.tuning.workers import WORKER, run_workers
from zarr_store.errors import InvalidInput, Preempted
from zarr_store.folder import FolderStore
from zarr_store.lock import CubeLock

from ..cube_factory import CLASSES, make_cube, shared_cube, tiny_config

SPACE: dict[str, Any] = {
    "optim.learning_rate": {"low": 1e-4, "high": 3e-2, "log": True},
    "model.dropout": {"low": 0.05, "high": 0.3},
    "model.width": [4, 6],
}
SHORT: dict[str, dict[str, Any]] = {
    "run": {"steps": 4, "batch_size": 8, "evaluate_every": 1, "checkpoint_every": 1, "log_every": 1}
}
OPTIONS: dict[str, Any] = {"sampler": "random", "pruner": "median"}


def write_space(folder, space=None):
    path = folder / "space.toml"
    path.write_text(tomli_w.dumps(SPACE if space is None else space))
    return path


@pytest.fixture(scope="module")
def config():
    return tiny_config(shared_cube(), **SHORT)


@pytest.fixture(scope="module")
def shared():
    """Compiled steps of all tests of this file."""
    return SharedParts()


@pytest.fixture(scope="module")
def searched(tmp_path_factory, config, shared):
    """Nine trials in this process."""
    folder, news = tmp_path_factory.mktemp("search"), list[TrialNews]()
    study = begin_search(config, write_space(folder), folder / "study", **OPTIONS)
    with jax.numpy_dtype_promotion("strict"):  # as in every test, so that these share what is compiled here
        work(study, Budget(trials=9), on_trial=news.append, shared=shared)
    return study, news


def test_trials_of_one_shape_are_compiled_once(searched, shared):
    study, _ = searched
    assert list(shared.compiled().values()) == [1, 1]  # a program for each width
    groups = {trial.params["model.width"]: trial.user_attrs["group"] for trial in study.trials()}
    assert set(groups.values()) == set(shared.compiled())


def test_a_trial_has_the_best_validation_of_its_run(searched):
    study, news = searched
    trials = study.trials()
    assert [trial.number for trial in trials] == list(range(9))
    states = {trial.state for trial in trials}
    assert states == {TrialState.COMPLETE, TrialState.PRUNED}, "no trial was stopped early: the test shows nothing"
    for trial in trials:
        history = [json.loads(line) for line in (study.run_of(trial.number) / "metrics.jsonl").read_text().splitlines()]
        seen = [line["accuracy"] for line in history if line["kind"] == "validation"]
        assert list(trial.intermediate_values.values()) == pytest.approx(seen)
        if trial.state == TrialState.COMPLETE:
            assert trial.value == pytest.approx(max(seen))
        else:
            assert len(seen) < 4
    assert [one.state for one in news if one.number == 0] == ["begun", "complete"]
    rate = per_worker(trials)[0]
    assert rate["trials"] == 9
    assert rate["steps"] == sum(row["steps"] for row in trial_rows(study, study.plan.read_space()))


def test_a_shared_run_equals_one_of_its_own(searched, tmp_path):
    """The numbers of a trial reach its step: the same run by itself has the same losses."""
    study, _ = searched
    trial = next(trial for trial in reversed(study.trials()) if trial.state == TrialState.COMPLETE)
    config = study.plan.config_of(study.plan.read_space().values_of(trial.params))
    train(config, tmp_path / "alone", progress=False)

    def losses(run):
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [line["loss"] for line in lines]

    assert losses(study.run_of(trial.number)) == pytest.approx(losses(tmp_path / "alone"), rel=1e-4)


def test_only_the_best_keeps_its_checkpoints(searched):
    study, _ = searched
    kept = [number for number in range(9) if (study.run_of(number) / "checkpoints").exists()]
    assert study.best().number in kept
    assert len(kept) < 9


def test_the_study_is_a_plain_one(searched):
    study, _ = searched
    journal = optuna.storages.journal.JournalFileBackend(str(study.path / "journal.log"))
    opened = optuna.load_study(study_name="study", storage=optuna.storages.JournalStorage(journal))
    assert opened.best_value == study.best().value
    assert opened.metric_names == ["accuracy"]


def test_the_best_is_trained_by_one_command_and_compared_with_the_defaults(searched, shared):
    study, _ = searched
    write_best(study)
    config = read_train_config([study.path / "best.toml"])
    assert config.optim.learning_rate == study.best().params["optim.learning_rate"]
    assert config.run.monitor == "accuracy"
    notes: list[str] = []
    verdict = settle(study, 1, shared, notes.append)
    assert len(notes) == 2
    assert len(verdict.best.test) == len(verdict.defaults.test) == 1
    assert verdict.best.validation[0] == pytest.approx(study.best().value)
    assert set(shared.compiled().values()) == {1}  # two more trainings
    page = write_page(study).read_text()
    for text in ("data:image/png", "optim.learning_rate", verdict.words().split(":")[0], "trials an hour", "pruned"):
        assert text in page


def test_a_verdict_of_another_trial_is_not_shown_as_that_of_the_best(config, shared, tmp_path, capsys):
    study = begin_search(config, write_space(tmp_path), tmp_path / "study", sampler="random", pruner="none")
    work(study, Budget(trials=1), shared=shared)
    sides = [Contender("best", (0.8,), (0.7,), 0.8), Contender("defaults", (0.6,), (0.5,))]
    made = Verdict("accuracy", lower=False, seeds=(0,), best=sides[0], defaults=sides[1])
    study.write("verdict.json", json.dumps({**made.to_dict(), "trial": 0}).encode())

    def shown():
        show_search(Session(json=True), study)
        out = capsys.readouterr()
        return json.loads(out.out)["verdict"], out.err, write_page(study).read_text()

    verdict, lines, page = shown()
    assert verdict["current"]
    assert verdict["verdict"] == made.words()
    assert f"verdict       {made.words()}" in lines
    assert "<h2>Best and defaults, trained anew</h2>" in page
    better = study.study().ask()
    study.study().tell(better, 2.0)  # a better one, which is not trained again
    verdict, lines, page = shown()
    words = f"of trial 0, the best before: {made.words()}"
    assert not verdict["current"]
    assert verdict["verdict"] == words
    assert f"verdict       {words}" in lines
    assert words in page
    assert "<h2>Trial 0, the best before, and defaults, trained anew</h2>" in page
    assert "<tr><td>trial 0</td>" in page


def test_a_lucky_trial_is_seen():
    def verdict(best, defaults):
        sides = (Contender("best", best, best, 0.9), Contender("defaults", defaults, defaults))
        return Verdict("accuracy", lower=False, seeds=(0, 1, 2), best=sides[0], defaults=sides[1]).words()

    assert "was lucky" in verdict((0.80, 0.81, 0.79), (0.80, 0.82, 0.81))
    assert "within the spread" in verdict((0.80, 0.85, 0.81), (0.80, 0.82, 0.81))
    assert "better by 0.0900" in verdict((0.90, 0.91, 0.89), (0.80, 0.82, 0.81))


def test_the_same_search_continues_and_another_is_refused(searched, shared, config, tmp_path):
    study, _ = searched
    again = begin_search(config, write_space(tmp_path), study.path, **OPTIONS)
    work(again, Budget(trials=9), shared=shared)
    assert len(again.trials()) == 9
    with pytest.raises(InvalidInput, match=r"another search .*sampler: random → tpe"):
        begin_search(config, write_space(tmp_path), study.path, sampler="tpe", pruner="median")
    other = tiny_config(shared_cube(), **SHORT, optim={"warmup_steps": 1})
    with pytest.raises(InvalidInput, match=r"optim.warmup_steps: 2 → 1"):
        begin_search(other, write_space(tmp_path), study.path, **OPTIONS)
    swapped = dict(reversed(config.data.classes.items()))
    other = tiny_config(shared_cube(), **SHORT, data={"classes": swapped})
    with pytest.raises(InvalidInput, match=r"data.classes \(their order\): 4, 5, 6 → 6, 5, 4"):
        begin_search(other, write_space(tmp_path), study.path, **OPTIONS)
    with pytest.raises(InvalidInput, match=r"space.model.width: \[4, 6\] → \[4, 8\]"):
        begin_search(config, write_space(tmp_path, SPACE | {"model.width": [4, 8]}), study.path, **OPTIONS)


def test_data_that_change_during_a_search_end_it_and_classes_nobody_has_are_named(shared, tmp_path):
    make_cube(tmp_path / "c.zarr")
    classes = {**CLASSES, "11": "snow"}
    config = tiny_config(tmp_path / "c.zarr", **SHORT, data={"classes": classes}, model={"dropout": 0.0})
    lines: list[str] = []
    space = write_space(tmp_path, {"optim.learning_rate": {"low": 1e-4, "high": 3e-2}})
    study = begin_search(config, space, tmp_path / "study", **OPTIONS, on_warning=lines.append)
    assert lines == ["class 'snow' (value 11) occurs nowhere in the data: check data.classes, or leave them out"]
    work(study, Budget(trials=1), shared=shared)
    shutil.rmtree(tmp_path / "c.zarr")
    make_cube(tmp_path / "c.zarr", seed=5)
    for _ in range(2):  # each time before a step is made
        with pytest.raises(InvalidInput, match=r"c\.zarr has changed since the search began"):
            work(study, Budget(trials=9))
    states = [trial.state for trial in study.trials()]
    assert states == [TrialState.COMPLETE, TrialState.FAIL, TrialState.FAIL]
    assert study.trials()[1].user_attrs["steps"] == 0


def test_what_cannot_be_a_search_is_refused_and_leaves_nothing(config, tmp_path):
    space = write_space(tmp_path)
    with pytest.raises(InvalidInput, match=r"run.monitor = 'r2', but classes are learned"):
        begin_search(config, space, tmp_path / "study", score="r2")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(InvalidInput, match="holds no search; nothing was changed"):
        begin_search(config, space, tmp_path / "full")
    with pytest.raises(InvalidInput, match="the database cannot be opened"):
        begin_search(config, space, tmp_path / "study", storage="nothing://nowhere")
    with pytest.raises(InvalidInput, match="holds no search"):
        StudyFolder.open(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "space.toml"]


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("at", ["study", "attributes", "config.toml", "space.toml", "search.json"])
def test_a_search_that_was_killed_while_it_began_is_begun_by_the_same_command(
    config, tmp_path, monkeypatch, at, stored
):
    class Killed(BaseException):
        pass

    def begin(out="study"):
        options = OPTIONS | ({"storage": f"sqlite:///{tmp_path}/study.db"} if stored else {})
        return begin_search(config, write_space(tmp_path), tmp_path / out, **options)

    def kill(*_: Any, **__: Any) -> None:
        raise Killed

    def kill_at_file(store: Any, key: str, data: bytes) -> None:
        if key == at:  # its bytes are there, but not yet under its name
            store.root.mkdir(exist_ok=True)
            (store.root / f".{key}.abc.partial").write_bytes(data[:5])
            raise Killed
        real(store, key, data)

    real = FolderStore.write
    with monkeypatch.context() as patch:
        if at == "study":
            patch.setattr(optuna.Study, "set_metric_names", kill)
        elif at == "attributes":
            patch.setattr(optuna.Study, "set_user_attr", kill)
        else:
            patch.setattr(FolderStore, "write", kill_at_file)
        with pytest.raises(Killed):
            begin()
    assert not (tmp_path / "study" / "search.json").exists()
    folder = begin()
    assert StudyFolder.open(folder.path).plan == folder.plan
    assert folder.study().metric_names == ["accuracy"]


@pytest.mark.parametrize("name", ["config.toml", "space.toml", ".notes.partial"])
def test_files_of_a_person_are_no_beginning_of_a_search(config, tmp_path, name):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text("# mine")
    with pytest.raises(InvalidInput, match="holds no search; nothing was changed"):
        begin_search(config, write_space(tmp_path), tmp_path / "mine")
    assert [(path.name, path.read_text()) for path in (tmp_path / "mine").iterdir()] == [(name, "# mine")]


def test_trials_that_fail_are_kept_and_five_alike_end_the_search(config, tmp_path):
    fails = {"data.patch": [36], "model.depth": [3], "optim.learning_rate": {"low": 1e-4, "high": 1e-3}}
    study = begin_search(config, write_space(tmp_path, fails), tmp_path / "study", **OPTIONS)
    with pytest.raises(InvalidInput, match=r"first 5 trials failed alike, .*patch 36 must be a multiple"):
        work(study, Budget(trials=20))
    trials = study.trials()
    assert [trial.state for trial in trials] == [TrialState.FAIL] * 5
    assert "patch 36" in trials[0].user_attrs["reason"]


def test_one_failure_does_not_end_the_search(config, shared, tmp_path):
    study = begin_search(config, write_space(tmp_path, {"data.patch": [33, 32]}), tmp_path / "study", **OPTIONS)
    work(study, Budget(trials=4), shared=shared)
    assert {trial.state for trial in study.trials()} >= {TrialState.FAIL, TrialState.COMPLETE}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_trial_whose_score_is_not_finite_fails_with_its_reason(config, shared, tmp_path, monkeypatch, value):
    from jaxtrain.tuning import trial as module

    def train_badly(config: Any, out: Any, **more: Any) -> TrainingResult:
        done = train(config, out, **more)
        return replace(done, best_score=value) if out.name == "0000" else done

    monkeypatch.setattr(module, "train", train_badly)
    study = begin_search(config, write_space(tmp_path), tmp_path / "study", sampler="random", pruner="none")
    news: list[TrialNews] = []
    work(study, Budget(trials=2), on_trial=news.append, shared=shared)
    assert [trial.state for trial in study.trials()] == [TrialState.FAIL, TrialState.COMPLETE]
    reason = f"its validation accuracy is {value}, which cannot be compared with other trials"
    assert study.trials()[0].user_attrs["reason"] == reason
    assert [(one.state, one.message) for one in news if one.number == 0][1:] == [("failed", reason)]
    assert study.best().number == 1


def test_an_interrupted_trial_goes_on_from_its_checkpoint(config, shared, tmp_path, monkeypatch):
    study = begin_search(config, write_space(tmp_path), tmp_path / "study", sampler="random", pruner="none")

    def stopped(event):
        if event.kind == "checkpoint" and event.step == 2:
            raise Preempted("stopped")

    from jaxtrain.tuning import trial as module

    real = module._Watch.__call__
    with monkeypatch.context() as patch:
        patch.setattr(module._Watch, "__call__", lambda self, event: (real(self, event), stopped(event)))
        with pytest.raises(Preempted):
            work(study, Budget(trials=2), shared=shared)
    assert [trial.state for trial in study.trials()] == [TrialState.RUNNING]
    began: list[TrainingResult] = []

    def watched(*args: Any, **more: Any) -> TrainingResult:
        began.append(train(*args, **more))
        return began[-1]

    monkeypatch.setattr(module, "train", watched)
    work(study, Budget(trials=2), shared=shared)
    assert began[0].resumed_from >= 1
    assert [trial.state for trial in study.trials()] == [TrialState.COMPLETE] * 2
    assert len(study.trials()[0].intermediate_values) == 4


def test_a_trial_that_another_process_still_trains_is_not_counted_as_failed(config, shared, tmp_path):
    """Its worker stood still so long that it was taken for dead; it holds the run, and goes on with it."""
    study = begin_search(config, write_space(tmp_path), tmp_path / "study", **OPTIONS)
    run = study.run_of(0)
    run.mkdir(parents=True)
    with CubeLock(run, "train", key=LOCK_KEY):
        work(study, Budget(trials=2), shared=shared)
        assert [trial.state for trial in study.trials()] == [TrialState.RUNNING, TrialState.COMPLETE]
    work(study, Budget(trials=2), shared=shared)
    assert [trial.state for trial in study.trials()] == [TrialState.COMPLETE, TrialState.COMPLETE]


def test_folds_are_scored_one_by_one(config, shared, tmp_path):
    study = begin_search(
        config, write_space(tmp_path, {"optim.learning_rate": [1e-3, 1e-2]}), tmp_path / "study", sampler="random",
        pruner="none", folds=2,
    )  # fmt: skip
    work(study, Budget(trials=1), shared=shared)
    (trial,) = study.trials()
    folds = trial.user_attrs["folds"]
    assert trial.value == pytest.approx(sum(folds) / 2)
    assert trial.intermediate_values[1] == folds[0]
    assert set(shared.compiled().values()) == {1}  # mean and spread of a fold are arguments, too
    assert [sorted(path.name for path in study.run_of(0).iterdir())] == [["fold-0", "fold-1"]]


@pytest.mark.slow
def test_a_killed_worker_loses_no_trial(config, tmp_path):
    space = {"optim.learning_rate": {"low": 1e-4, "high": 3e-2, "log": True}}
    longer = tiny_config(shared_cube(), run=SHORT["run"] | {"steps": 80, "evaluate_every": 20, "checkpoint_every": 5})
    study = begin_search(longer, write_space(tmp_path, space), tmp_path / "study", sampler="random", pruner="none")
    notes: list[str] = []
    killed: list[int] = []

    def kill():
        until = time.monotonic() + 120
        while time.monotonic() < until and not killed:
            for path in study.path.glob("trials/*.trial.lock"):
                number = path.name.split(".")[0]
                if any((study.path / "trials" / number).glob("checkpoints/*")):
                    pid = json.loads(path.read_text())["pid"]
                    os.kill(pid, signal.SIGKILL)
                    killed.append(int(number))
                    return
            time.sleep(0.02)

    hand = threading.Thread(target=kill)
    hand.start()
    compiled = run_workers(
        study, ThisMachine([sys.executable, "-P", *WORKER], 1), Budget(trials=2), on_note=notes.append
    )
    hand.join()
    assert killed, "no worker was killed: the test shows nothing"
    assert any("goes on from its checkpoint" in note for note in notes)
    trials = study.trials()
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 2
    assert len(trials[killed[0]].intermediate_values) == 4
    lines = [json.loads(line) for line in (study.run_of(killed[0]) / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, 81))
    assert all(count == 1 for groups in compiled.values() for count in groups.values())
