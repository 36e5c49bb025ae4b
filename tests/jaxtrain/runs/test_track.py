"""Trackers hear what TensorBoard hears, a run goes on where it was, and one that is absent is named at once."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jaxtrain import train
from jaxtrain.runs.log import RunLog
from jaxtrain.runs.track import check_trackers, start_trackers
from zarr_store.errors import InvalidInput

from ..cube_factory import shared_cube, tiny_config


class FakeMLflow:
    """The part of `mlflow.MlflowClient` that is used, with a record of what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []
        self.MlflowClient = self._client

    def _client(self, tracking_uri: str) -> Any:
        self.told.append(("uri", tracking_uri))
        return SimpleNamespace(
            get_experiment_by_name=lambda name: None,
            create_experiment=lambda name: "7",
            create_run=lambda experiment, run_name: SimpleNamespace(
                info=SimpleNamespace(run_id=f"{run_name}-{experiment}")
            ),
            log_param=lambda run, key, value: self.told.append(("param", run, key, value)),
            log_metric=lambda run, name, value, step: self.told.append(("metric", run, name, value, step)),
            set_terminated=lambda run: self.told.append(("end", run)),
        )


class FakeWandB:
    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []
        self.Settings = SimpleNamespace

    def init(self, **values: Any) -> Any:
        self.told.append(("init", values["name"], values["id"], values["config"]))
        return SimpleNamespace(
            id="abc",
            log=lambda metrics, step: self.told.append(("log", metrics, step)),
            finish=lambda: self.told.append(("end",)),
        )


def test_trackers_hear_what_tensorboard_hears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow, wandb = FakeMLflow(), FakeWandB()
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = tmp_path / "a-run"
    run.mkdir()
    for first in (0, 4):  # begun, and continued
        trackers = start_trackers(check_trackers(["mlflow", "wandb"]), run, {"run": {"steps": 6}})
        with RunLog(run, step=first, tensorboard_every=2, trackers=trackers) as log:
            for step in range(first + 1, first + 4):
                log.write("train", step, {"loss": 1.0 / step, "seconds": None})
            log.write("validation", first + 3, {"accuracy": 0.5})
    metrics = [row for row in mlflow.told if row[0] == "metric"]
    assert metrics == [
        ("metric", "a-run-7", "train/loss", 0.5, 2), ("metric", "a-run-7", "validation/accuracy", 0.5, 3),
        ("metric", "a-run-7", "train/loss", 1 / 6, 6), ("metric", "a-run-7", "validation/accuracy", 0.5, 7),
    ]  # fmt: skip
    assert [row for row in mlflow.told if row[0] == "param"] == [("param", "a-run-7", "run.steps", "6")]
    assert mlflow.told[0] == ("uri", f"sqlite:///{run / 'mlflow.db'}")
    assert [row[:3] for row in wandb.told if row[0] == "init"] == [("init", "a-run", None), ("init", "a-run", "abc")]
    assert ("log", {"train/loss": 0.5}, 2) in wandb.told
    assert mlflow.told.count(("end", "a-run-7")) == wandb.told.count(("end",)) == 2


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_tracker_that_is_absent_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InvalidInput, match=rf"names '{name}'.*pip install 'terrashard\[{name}\]'"):
        train(tiny_config(shared_cube(), run={"track": [name]}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
