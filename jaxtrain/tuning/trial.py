"""`run_trial` trains one trial, reports each validation to the study, and stops where the pruner says so."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import optuna

from jaxtrain.config import TrainConfig
from jaxtrain.loop import train
from jaxtrain.runs.events import TrainEvent, TrainingResult
from jaxtrain.runs.rundir import find_card
from jaxtrain.shared import Sharing
from jaxtrain.tuning.inheritance import inherit
from jaxtrain.tuning.plan import SearchPlan
from jaxtrain.tuning.rungs import PASSED, PAUSED, first_of, rungs_below
from jaxtrain.tuning.space import Space
from jaxtrain.tuning.study import StudyFolder
from zarr_store.errors import InvalidInput

__all__ = ["DataChanged", "TrialResult", "run_trial"]


class DataChanged(InvalidInput):
    """The data of a search are no longer those it began with."""


@dataclass(frozen=True)
class TrialResult:
    """The result of a trial.

    Attributes:
        value: Best validation score, or its mean over the folds.
        folds: Best score of each fold; one without a cross-validation.
    """

    value: float
    folds: tuple[float, ...]


@dataclass
class _Watch:
    """Observer of the trainings of one trial."""

    trial: optuna.Trial
    score: str
    every: int
    reports: bool
    """Whether each validation is reported to the study."""
    prunes: bool
    """Whether the pruner is asked after each validation."""
    look: Callable[[], bool] = lambda: True
    """Looks at the card of the training once it is there, and returns whether it was."""
    looked: bool = False
    steps: int = 0
    """Steps of the folds that are done, and of the one under way."""
    before: int = 0

    def __call__(self, event: TrainEvent) -> None:
        self.looked = self.looked or self.look()
        if event.kind in ("step", "validation"):
            self.steps = self.before + event.step
        if event.kind != "validation" or not self.reports:
            return
        value = event.metrics.get(self.score)
        if value is not None:
            report(self.trial, float(value), -(-event.step // self.every))
            if self.prunes and self.trial.should_prune():
                raise optuna.TrialPruned(f"step {event.step}")


def report(trial: optuna.Trial, value: float, step: int) -> None:
    """Report a value; one that is known, from before the trial was interrupted, stays."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trial.report(value, step)


def run_trial(
    folder: StudyFolder, space: Space, trial: optuna.Trial,
    sharing: Callable[[], AbstractContextManager[Sharing]], *, on_begin: Callable[[TrainConfig], None] | None = None,
) -> TrialResult:  # fmt: skip
    """Train one trial, from its newest checkpoint if an earlier process, or an earlier trial, began its training.

    Args:
        folder: The search.
        space: Its space.
        trial: The trial, which this process holds.
        sharing: Gives what the trials of this process have in common, for one training.
        on_begin: Called with the configuration of the trial (of its first fold).

    Raises:
        optuna.TrialPruned: The pruner stopped or paused it.
        DataChanged: The data are no longer those of the search.
        InvalidInput: The values do not fit together, or the training failed.
        Preempted: The process was told to stop; another one continues the trial.
    """
    plan = folder.plan
    turn = plan.turn(folder.trials(), trial.number) if plan.members else None
    if turn is not None:
        for name, about in asdict(turn).items():
            trial.set_user_attr(name, about)
    values = space.suggest(trial, plan.base)
    began = time.monotonic()
    folds: list[float] = []
    trials, run = folder.trials(), folder.run_of(first_of(trial))
    passed = max(int(trial.user_attrs.get(PASSED, 0)), (trials[trial.number].last_step or 0) - 1)
    before = sum(one.user_attrs.get("steps", 0) for one in trials[: trial.number] if first_of(one) == first_of(trial))
    watch = _Watch(trial, plan.score, plan.base.run.evaluate_every, reports=not plan.folds,
                   prunes=not plan.folds and not plan.pauses, steps=before)  # fmt: skip
    earlier = float(trial.user_attrs.get("seconds", 0.0))
    try:
        for fold in range(plan.folds) if plan.folds else (None,):
            config = plan.config_of({**values, **plan.of_generations()}, fold=fold, where=f"trial {trial.number}")
            watch.every = config.run.evaluate_every
            if not folds and on_begin is not None:
                on_begin(config)
            out = run / (f"fold-{fold}" if plan.folds else "")
            watch.look, watch.looked = partial(_check_data, plan, config, out), False
            with sharing() as shared:
                until = None
                if turn is not None:
                    until = min((turn.generation + 1) * config.run.evaluate_every, config.run.steps)
                    if turn.parent is not None:
                        inherit(folder.run_of(turn.parent), out, config, shared)
                        watch.before = -turn.generation * config.run.evaluate_every  # steps of its parents
                further = partial(_train, watch, config, out, shared)
                climbs = plan.pauses and fold is None
                result = _climb(trial, config, further, passed) if climbs else further(until=until)
            watch.before += result.steps
            folds.append(_score(result, plan.score, f"trial {trial.number}", last=turn is not None))
            if fold is not None:
                pruned_by_fold = plan.pruner == "wilcoxon"
                report(trial, folds[-1] if pruned_by_fold else sum(folds) / len(folds), fold + 1)
                if plan.pauses:
                    _pause(trial, fold + 1, plan.folds, passed, f"fold {fold}")
                elif trial.should_prune() and fold + 1 < plan.folds:
                    raise optuna.TrialPruned(f"fold {fold}")
    finally:
        trial.set_user_attr("steps", max(0, watch.steps - before))
        trial.set_user_attr("seconds", round(earlier + time.monotonic() - began, 3))
        if plan.folds:
            trial.set_user_attr("folds", folds)
    return TrialResult(sum(folds) / len(folds), tuple(folds))


def _train(watch: _Watch, config: TrainConfig, out: Path, shared: Sharing, until: int | None = None) -> TrainingResult:
    """Train, and count the steps of an earlier process too, which it may not have recorded."""
    result = train(config, out, on_event=watch, progress=False, shared=shared, report=False, until=until)
    watch.steps = max(watch.steps, watch.before + result.steps)
    return result


def _climb(
    trial: optuna.Trial, config: TrainConfig, further: Callable[..., TrainingResult], passed: int
) -> TrainingResult:
    """Train from rung to rung, each of which ends with a checkpoint, until the end or a pause.

    Args:
        trial: The trial.
        config: Its configuration.
        further: Trains until a step.
        passed: The training is known to go on from this rung.

    Raises:
        optuna.TrialPruned: It pauses.
    """
    every, steps = config.run.evaluate_every, config.run.steps
    for rung in rungs_below(-(-steps // every)):
        if rung > passed:
            result = further(until=rung * every)
            if result.stopped_early or result.steps >= steps:
                return result
            _pause(trial, rung, -(-steps // every), passed, f"step {result.steps}")
    return further()


def _pause(trial: optuna.Trial, done: int, total: int, passed: int, where: str) -> None:
    """End a trial as a paused one if it is at a rung, has not passed it, and is not in its best quarter.

    Raises:
        optuna.TrialPruned: It pauses.
    """
    if done > passed and done in rungs_below(total) and trial.should_prune():
        trial.set_user_attr(PAUSED, done)
        raise optuna.TrialPruned(where)


def _check_data(plan: SearchPlan, config: TrainConfig, out: Path) -> bool:
    """Compare the data of a training with those of the search; False where it has no card yet.

    Raises:
        DataChanged: They are others, so the scores of the search would not be comparable.
    """
    card = find_card(out)
    if card is None:
        return False
    base = plan.base
    chosen = [(one.model.name, one.data.cube, one.data.collection, one.data.label, one.data.modalities)
              for one in (base, config)]  # fmt: skip
    if chosen[0] == chosen[1] and card.cube_digest != plan.digest:
        raise DataChanged(
            f"{card.cube} has changed since the search began, so further trials could not be compared with the others: "
            "restore the data, or begin another search in another folder"
        )
    return True


def _score(result: TrainingResult, name: str, what: str, *, last: bool = False) -> float:
    """Return the best score of a run, or the last one: a member of a population is compared as it is now."""
    best = None if last else result.best_score
    value: Any = best if best is not None else result.validation.get(name)
    if value is None:
        raise InvalidInput(f"{what}: no validation has a {name}: {json.dumps(result.validation)[:200]}")
    if not math.isfinite(value):
        raise InvalidInput(f"{what}: its validation {name} is {value}, which cannot be compared with other trials")
    return float(value)
