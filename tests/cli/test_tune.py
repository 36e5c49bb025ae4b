"""`terrashard tune`: a search from its command, its table, its continuation, and what it refuses in one line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

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
