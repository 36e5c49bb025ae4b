"""`Rungs` decides which trainings go on, by asynchronous successive halving (Li et al. 2018, arXiv:1810.05934).

A rung is a number of validations, or of folds: 1, 4, 16, … A training that comes to a rung goes on if its score is in
the best quarter of all that came there. Else it pauses and keeps its checkpoint. It is promoted, which means that it
goes on from there, as soon as it is in the best quarter of a rung that has grown.

Optuna changes no trial that has ended. So a paused trial is a pruned one in the study, and its promotion is another
trial with the same values, whose attribute `continues` is the number of the first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial

__all__ = [
    "CONTINUES",
    "FACTOR",
    "PASSED",
    "PAUSED",
    "RungPruner",
    "Rungs",
    "Training",
    "count_begun",
    "first_of",
    "promote",
    "rungs_below",
    "trainings_of",
]

FACTOR = 4
"""Reduction factor: one of so many trainings at a rung goes on."""
CONTINUES, PASSED, PAUSED = "continues", "passed", "paused"
"""Attributes of a trial: the first trial of its training, the rung from which it goes on, and that where it paused."""


@dataclass(frozen=True)
class Training:
    """The training of one choice of values, in one or more trials of the study.

    Attributes:
        number: Number of its first trial, which names its run directory.
        scores: Its score after each validation, or fold, by their number.
        state: "running", "paused", "complete", or "ended" without a score of its own.
        rung: The rung at which it is paused; 0 if it is not.
    """

    number: int
    scores: Mapping[int, float]
    state: Literal["running", "paused", "complete", "ended"] = "running"
    rung: int = 0


def first_of(trial: FrozenTrial | optuna.Trial) -> int:
    """Return the number of the first trial of a training."""
    return int(trial.user_attrs.get(CONTINUES, trial.number))


def count_begun(trials: Sequence[FrozenTrial]) -> int:
    """Return how many trainings have begun; trials that continue one are not counted again."""
    return sum(CONTINUES not in trial.user_attrs for trial in trials)


def rungs_below(total: int) -> list[int]:
    """Return the rungs of a training of so many validations; none in its second half, where a pause saves little.

    >>> rungs_below(12), rungs_below(32), rungs_below(1)
    ([1, 4], [1, 4, 16], [])
    """
    rungs, rung = [], 1
    while 2 * rung <= total:
        rungs.append(rung)
        rung *= FACTOR
    return rungs


def trainings_of(trials: Sequence[FrozenTrial]) -> list[Training]:
    """Return the trainings that the trials of a study belong to, in the order in which they began."""
    parts: dict[int, list[FrozenTrial]] = {}
    for trial in trials:
        parts.setdefault(first_of(trial), []).append(trial)
    found = []
    for number, mine in parts.items():
        newest = mine[-1]
        scores = {step: value for trial in mine for step, value in trial.intermediate_values.items()}
        rung = int(newest.user_attrs.get(PAUSED, 0)) if newest.state == TrialState.PRUNED else 0
        if newest.state in (TrialState.RUNNING, TrialState.WAITING):
            found.append(Training(number, scores))
        elif newest.state == TrialState.COMPLETE:
            found.append(Training(number, scores, "complete"))
        else:
            found.append(Training(number, scores, "paused" if rung else "ended", rung))
    return found


@dataclass(frozen=True)
class Rungs:
    """All trainings of a search, compared at their rungs.

    Attributes:
        trainings: All of them.
        lower: Whether a smaller score is better.
        best_so_far: Whether the score of a training at a rung is its best until there, or the one there.

    Example:
        >>> scores = (0.5, 0.8, 0.6, 0.7)
        >>> waiting = [Training(number, {1: score}, "paused", 1) for number, score in enumerate(scores)]
        >>> Rungs(waiting).promoted().number, Rungs(waiting[:3]).promoted()
        (1, None)
    """

    trainings: Sequence[Training]
    lower: bool = False
    best_so_far: bool = True

    def goes_on(self, number: int, rung: int) -> bool:
        """Return whether a training that has come to a rung is in its best quarter."""
        return number in [one.number for one in self._best_of(rung)]

    def promoted(self) -> Training | None:
        """Return a paused training in the best quarter of its rung, of the highest such rung; None if none is."""
        for rung in sorted({one.rung for one in self.trainings if one.state == "paused"}, reverse=True):
            for one in self._best_of(rung):
                if one.state == "paused" and one.rung == rung:
                    return one
        return None

    def to_finish(self, wanted: int | None) -> Training | None:
        """Return the paused training with the best score, when no further one begins; None if enough are trained.

        Args:
            wanted: Trainings to be complete or under way; None for as many as there is time for.
        """
        if wanted is not None and sum(one.state in ("complete", "running") for one in self.trainings) >= wanted:
            return None
        paused = [one for one in self.trainings if one.state == "paused"]
        return min(paused, key=lambda one: (self._rank(one, one.rung)[0], -one.rung, one.number), default=None)

    def _best_of(self, rung: int) -> list[Training]:
        came = sorted((one for one in self.trainings if rung in one.scores), key=lambda one: self._rank(one, rung))
        return came[: len(came) // FACTOR]

    def _rank(self, one: Training, rung: int) -> tuple[float, int]:
        until = [value for step, value in one.scores.items() if (step <= rung if self.best_so_far else step == rung)]
        sign = 1.0 if self.lower else -1.0
        return min((sign * value for value in until if math.isfinite(value)), default=math.inf), one.number


class RungPruner(optuna.pruners.BasePruner):
    """Pruner that ends a trial at a rung unless it is in the best quarter of the rung.

    Args:
        best_so_far: The attribute of `Rungs`.
    """

    def __init__(self, *, best_so_far: bool = True) -> None:
        self._best_so_far = best_so_far

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Return whether a trial pauses after the validation that it reported last."""
        rung = trial.last_step
        if rung is None or rung not in rungs_below(2 * rung):
            return False
        lower = study.direction == optuna.study.StudyDirection.MINIMIZE
        rungs = Rungs(trainings_of(study.get_trials(deepcopy=False)), lower, self._best_so_far)
        return not rungs.goes_on(first_of(trial), rung)


def promote(study: optuna.Study, one: Training) -> optuna.Trial:
    """Begin a trial that continues a paused training; the caller holds the right to begin trials."""
    trials = study.get_trials(deepcopy=False)
    before = trials[one.number]
    study.add_trial(create_trial(
        state=TrialState.RUNNING, params=before.params, distributions=before.distributions,
        intermediate_values=dict(one.scores), user_attrs={CONTINUES: one.number, PASSED: one.rung},
    ))  # fmt: skip
    begun = max((trial for trial in study.get_trials(deepcopy=False) if first_of(trial) == one.number),
                key=lambda trial: trial.number)  # fmt: skip
    return optuna.Trial(study, begun._trial_id)
