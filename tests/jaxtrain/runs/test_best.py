"""Early stopping: the best checkpoint is kept, scored and used; a run that was killed stops where it would have."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from jaxtrain import TrainEvent, evaluate, train
from jaxtrain.config import RunConfig
from jaxtrain.runs.best import Best
from jaxtrain.runs.checkpoint import CheckpointStore
from jaxtrain.runs.log import read_metrics
from zarr_store.errors import InvalidInput

from ..cube_factory import shared_cube, tiny_config

pytestmark = pytest.mark.usefixtures("shared_programs")


def test_a_lower_loss_and_a_higher_score_are_better() -> None:
    loss = Best(RunConfig(monitor="loss", patience=2))
    assert [loss.see(s, {"loss": v}) for s, v in enumerate((3.0, 2.0, 2.5, 1.0))] == [True, True, False, True]
    assert (loss.step, loss.value, loss.ended) == (3, 1.0, False)
    score = Best(RunConfig(monitor="miou", patience=2))
    assert [score.see(s, {"miou": v}) for s, v in enumerate((0.3, None, 0.2))] == [True, False, False]
    assert (score.step, score.ended) == (0, True)
    again = Best(RunConfig(monitor="miou", patience=2), score.to_dict())
    assert (again.step, again.value, again.ended) == (0, 0.3, True)
    assert not Best(RunConfig(monitor="miou")).see(1, {"miou": float("nan")})
    with pytest.raises(InvalidInput, match="has miou"):
        Best(RunConfig(monitor="r2")).see(1, {"miou": 0.5})


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValidationError, match="name it in run"):
        tiny_config("x", run={"patience": 2})
    with pytest.raises(ValidationError, match="needs validations"):
        tiny_config("x", run={"monitor": "loss"}, data={"split": {"block_m": 320, "validation": 0.0}})


def settings() -> Any:
    """A rate at which the loss soon rises again, and validations beside the checkpoints."""
    return tiny_config(shared_cube(), optim={"learning_rate": 0.3, "schedule": "constant", "warmup_steps": 0},
                       run={"steps": 60, "batch_size": 8, "evaluate_every": 2, "checkpoint_every": 5, "log_every": 1,
                            "monitor": "loss", "patience": 3, "keep_checkpoints": 2})  # fmt: skip


def test_a_run_stops_early_and_keeps_its_best(tmp_path: Path) -> None:
    config = settings()
    result = train(config, tmp_path / "run")
    losses = {line["step"]: line["loss"] for line in read_metrics(tmp_path / "run") if line["kind"] == "validation"}
    assert result.stopped_early
    assert result.steps == max(losses) < 60
    assert result.best_step == min(losses, key=lambda step: losses[step]) == result.steps - 2 * 3
    store = CheckpointStore(tmp_path / "run/checkpoints")
    assert result.best_step in store.steps()
    assert len(store.steps()) == 3, "the newest two, and the best"
    scores = evaluate(tmp_path / "run", split="validation").to_dict()
    assert scores["step"] == result.best_step
    assert scores["loss"] == pytest.approx(losses[result.best_step], rel=1e-5)
    # the same command finds it ended
    again = train(config, tmp_path / "run")
    assert (again.steps, again.resumed_from, again.best_step) == (result.steps, result.steps, result.best_step)
    # damage to the best is said, and the newest is used
    next((store.path(result.best_step) / "state").rglob("*")).touch()
    (store.path(result.best_step) / "contents.json").write_text("{}")
    fallen = evaluate(tmp_path / "run", split="validation").to_dict()
    assert fallen["step"] == result.steps
    assert any("the best checkpoint" in line for line in fallen["warnings"])

    # killed between a best validation and the next checkpoint, it stops at the same step with the same best
    class KilledError(Exception):
        pass

    def kill(event: TrainEvent) -> None:
        if event.kind == "step" and event.step == (result.best_step or 0) + 1:
            raise KilledError

    with pytest.raises(KilledError):
        train(config, tmp_path / "killed", on_event=kill)
    other = train(config, tmp_path / "killed")
    assert other.resumed_from > 0
    assert (other.steps, other.best_step, other.best_score) == (result.steps, result.best_step, result.best_score)


@pytest.mark.parametrize(("monitor", "worse"), [("loss", 0.6), ("miou", 0.4)])
def test_only_a_better_score_counts_and_patience_ends_the_waiting(monitor: str, worse: float) -> None:
    best = Best(RunConfig.model_validate({"monitor": monitor, "patience": 3}))
    assert best.see(10, {monitor: 0.5})
    for step, value in ((20, 0.5), (30, math.nan)):
        assert not best.see(step, {monitor: value}), "neither the same score nor none at all"
        assert not best.ended
    assert not best.see(40, {monitor: worse})
    assert best.ended
    assert best.to_dict() == {"step": 10, "value": 0.5, "waited": 3}
    assert Best(RunConfig.model_validate({"monitor": monitor, "patience": 3}), best.to_dict()).ended
