"""`terrashard tune`: a search from its command, its table, its continuation, and what it refuses in one line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from ..jaxtrain.cube_factory import CLASSES, shared_cube
from .conftest import Outcome

SPACE = {"optim.learning_rate": {"low": 1e-3, "high": 3e-2, "log": True}}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration of seconds, and spaces."""
    folder = tmp_path_factory.mktemp("tune")
    config = {
        "data": {"cube": str(shared_cube()), "classes": CLASSES, "patch": 32, "split": {"block_m": 320}},
        "model": {"width": 4, "depth": 1},
        "run": {"steps": 2, "batch_size": 8, "evaluate_every": 1, "checkpoint_every": 2},
    }
    (folder / "c.toml").write_text(tomli_w.dumps(config))
    (folder / "space.toml").write_text(tomli_w.dumps(SPACE))
    (folder / "wrong.toml").write_text(tomli_w.dumps({"optim.lr": [1e-3]}))
    return folder


def test_a_search_is_begun_shown_and_extended(run: Callable[..., Outcome], files: Path, tmp_path: Path) -> None:
    begun = run("tune", files / "c.toml", "--space", files / "space.toml", "--out", tmp_path / "s", "--trials", 2,
                "--seeds", 0, "--sampler", "random", "--pruner", "none", "--json")  # fmt: skip
    assert begun.code == 0, begun.err
    found = begun.json
    assert [row["state"] for row in found["trials"]] == ["complete"] * 2
    assert found["best"]["value"] == max(row["value"] for row in found["trials"])
    assert list(found["compiled"]["0"].values()) == [1]
    assert "trial 1 complete: accuracy 0." in begun.err
    shown = run("tune", tmp_path / "s", "--show")
    assert shown.code == 0
    assert "optim.learning_rate" in shown.out
    assert f"terrashard train {tmp_path / 's' / 'best.toml'} --out RUN" in shown.out
    extended = run("tune", tmp_path / "s", "--extend", 1, "--seeds", 0, "--json")
    assert [row["number"] for row in extended.json["trials"]] == [0, 1, 2]
    assert extended.json["trials"][:2] == found["trials"]
    refused = run("tune", tmp_path / "s", "--sampler", "tpe")
    assert refused.code == 2
    assert "is a search with a plan of its own: leave out --sampler" in refused.err


def test_an_interrupted_search_continues_to_the_same_end(
    run: Callable[..., Outcome], files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jaxtrain.tuning import trial as trials
    from jaxtrain.tuning import worker
    from zarr_store.errors import Preempted

    begin = ("tune", files / "c.toml", "--space", files / "space.toml", "--out", tmp_path / "s", "--sampler", "random",
             "--pruner", "none", "--seeds", 0)  # fmt: skip
    real = trials.run_trial

    def stopped(folder: Any, space: Any, trial: Any, *args: Any, **more: Any) -> Any:
        if trial.number == 1:
            raise Preempted("stopped")
        return real(folder, space, trial, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(worker, "run_trial", stopped)
        assert run(*begin, "--trials", 3).code == Preempted.exit_code
    again = run("tune", tmp_path / "s", "--seeds", 0, "--json")
    assert [row["state"] for row in again.json["trials"]] == ["complete"] * 3
    assert "limits of the last command: --trials 3" in again.err
    assert len(run(*begin, "--json").json["trials"]) == 3  # all of them have ended


def test_a_command_without_limits_has_those_of_the_last_one(
    run: Callable[..., Outcome], files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jaxtrain.tuning.study import StudyFolder
    from jaxtrain.tuning.worker import Budget

    asked: list[Budget] = []
    monkeypatch.setattr("cli.tuning.run_search", lambda session, folder, limits, **more: asked.append(limits))
    study = tmp_path / "s"
    begin = ("tune", files / "c.toml", "--space", files / "space.toml", "--out", study, "--pruner", "none")
    for arguments, expected in (
        (begin, Budget(50)),
        (("tune", study, "--hours", 2, "--steps", 900), Budget(None, 7200.0, 900)),
        (("tune", study), Budget(None, 7200.0, 900)),
        (begin, Budget(None, 7200.0, 900)),
        (("tune", study, "--extend", 7), Budget(7)),
        (("tune", study), Budget(7)),
    ):
        assert run(*arguments).code == 0
        assert asked[-1] == expected, arguments
    earlier = StudyFolder.open(study).study()
    earlier.set_user_attr("budget", None)  # as an earlier release left it
    earlier.ask()
    shown = run("tune", study)
    assert asked[-1] == Budget(1)
    assert "keeps no limits, as an earlier release began it; no further trial begins: give --trials" in shown.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--out", "s"], "a new search needs --space SPACE.toml"),
        (["--space", "space.toml"], "a new search needs --out STUDY"),
        (["--space", "wrong.toml", "--out", "s"], "unknown setting 'optim.lr'"),
        (["--space", "nothing.toml", "--out", "s"], "nothing.toml does not exist"),
        (["--space", "space.toml", "--out", "s", "--score", "rmse"], "run.monitor = 'rmse', but classes are learned"),
        (["--space", "space.toml", "--out", "s", "--pruner", "wilcoxon"], "add --folds 5"),
        (["--space", "space.toml", "--out", "s", "--folds", "200"], "200 folds"),
        (["--space", "space.toml", "--out", "s", "--set", "data.split.validation=0"], "data.split.validation is 0"),
    ],
)
def test_what_is_wrong_is_one_line_and_leaves_nothing(
    run: Callable[..., Outcome], files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str],
    words: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(files)
    before = sorted(files.iterdir())
    done = run("tune", "c.toml", *options)
    assert done.code == 2, done.err
    errors = [line for line in done.err.splitlines() if line.startswith("error")]
    assert len(errors) == 1
    assert words in errors[0]
    assert sorted(files.iterdir()) == before


def test_without_optuna_the_line_says_what_to_install(
    run: Callable[..., Outcome], files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith(("optuna", "jaxtrain.tuning."))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "optuna", None)
    done = run("tune", files / "c.toml", "--space", files / "space.toml", "--out", tmp_path / "s")
    assert done.code == 2
    assert "pip install 'terrashard[tune]'" in done.error_line()
    assert not (tmp_path / "s").exists()
