"""What both ways to start a training do before JAX looks for devices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cli.session import Session
from cli.training import run_training
from jaxtrain import script
from jaxtrain.config import TrainConfig


def test_memory_and_kernels_are_asked_for_before_devices_are_looked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    order: list[str] = []

    def spread(config: TrainConfig) -> TrainConfig:
        order.append("devices")
        return config

    def train(*_: Any, **__: Any) -> None:
        order.append("training")

    monkeypatch.setattr("jaxtrain.parallel.heap.keep_freed_memory", lambda: order.append("memory"))
    monkeypatch.setattr("jaxtrain.runs.repeat.repeat_exactly", lambda: order.append("exactly"))
    monkeypatch.setattr("jaxtrain.parallel.processes.spread_mesh", spread)
    monkeypatch.setattr("jaxtrain.loop.train", train)
    (tmp_path / "run.toml").write_text('[data]\ncube = "none"\n')

    run_training(Session(verbosity=-1), TrainConfig.model_validate({"data": {"cube": "none"}}), tmp_path / "one")
    assert order == ["memory", "exactly", "devices", "training"]
    assert script.main([str(tmp_path / "run.toml"), "--out", str(tmp_path / "two")]) == 0
    assert order[4:] == ["memory", "exactly", "devices", "training"]

    free = TrainConfig.model_validate({"data": {"cube": "none"}, "run": {"deterministic": False}})
    run_training(Session(verbosity=-1), free, tmp_path / "three")
    (tmp_path / "run.toml").write_text('[data]\ncube = "none"\n[run]\ndeterministic = false\n')
    assert script.main([str(tmp_path / "run.toml"), "--out", str(tmp_path / "four")]) == 0
    assert order[8:] == ["memory", "devices", "training"] * 2
