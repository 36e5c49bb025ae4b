"""What can be known before a run begins is checked before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jaxtrain import train
from jaxtrain.config import TrainConfig
from jaxtrain.data.task import Task
from jaxtrain.runs.checkpoint import CheckpointStore
from jaxtrain.runs.log import read_metrics
from jaxtrain.runs.rundir import load_card
from jaxtrain.session import check_monitor
from zarr_store.errors import InvalidInput

from ..cube_factory import shared_cube, tiny_config
from ..sample_factory import make_samples

pytestmark = pytest.mark.usefixtures("shared_programs")


def tiny_samples(store: Path, **sections: Any) -> TrainConfig:
    base: dict[str, dict[str, Any]] = {
        "data": {"split": {"kind": "random"}, "classes": {}},
        "model": {"name": "cnn", "width": 4, "depth": 1},
    }
    merged = {name: {**base.get(name, {}), **sections.get(name, {})} for name in {*base, *sections}}
    return tiny_config(store, **merged)


@pytest.mark.parametrize(
    ("side", "sections", "message"),
    [
        (33, {"model": {"name": "resnet", "blocks": (1, 1), "stem": "patch"}}, "cannot be folded by 2 × 2"),
        (20, {"model": {"name": "cnn", "depth": 3}}, "cannot be halved"),
        (33, {"model": {"name": "autoencoder", "depth": 2}, "optim": {"loss": "mse"}}, "cannot be halved"),
    ],
)
def test_a_sample_size_that_the_network_cannot_take(tmp_path: Path, side: int, sections: dict, message: str) -> None:
    store = make_samples(tmp_path / "s.zarr", count=16, side=side)
    out = tmp_path / "run"
    with pytest.raises(InvalidInput, match=message):
        train(tiny_samples(store, **sections), out)
    assert not out.exists(), "nothing was written, so the corrected command is not refused"


def test_a_monitor_that_no_validation_has(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(
        InvalidInput, match=r"run\.monitor = 'r2', but classes are learned: choose one of loss, accuracy"
    ):
        train(tiny_config(shared_cube(), run={"monitor": "r2"}), out)
    assert not out.exists()
    config, values = tiny_config(shared_cube(), run={"monitor": "rmse"}), Task(value=(0.0, 1.0))
    check_monitor(config, values, {"validation": 1})
    with pytest.raises(InvalidInput, match="the split keeps nothing for it"):
        check_monitor(config, values, {"validation": 0})


def test_a_run_without_a_checkpoint_never_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"

    def die(*_: object, **__: object) -> None:
        raise RuntimeError("lost before the first checkpoint")

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointStore, "begin", die)
        with pytest.raises(RuntimeError, match="lost before"):
            train(tiny_config(shared_cube(), run={"steps": 2}), out)
    assert load_card(out).config.run.steps == 2, "the fault fired after the folder was written"
    assert not CheckpointStore(out / "checkpoints").steps()

    huge = 20261129154047123456
    result = train(tiny_config(shared_cube(), run={"steps": 3, "seed": huge}), out, resume=False)
    assert result.steps == 3
    assert load_card(out).config.run.seed == huge
    assert [line["step"] for line in read_metrics(out) if line["kind"] == "train"] == [1, 2, 3], "of this attempt alone"
    with pytest.raises(InvalidInput, match=r"run\.steps: 3 → 4"):
        train(tiny_config(shared_cube(), run={"steps": 4, "seed": huge}), out)
