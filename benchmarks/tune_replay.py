"""Rules that end trials early, replayed on the validation scores of trials that were trained to their end.

One search shows one order of trials. Full trials in 200 random orders show how often a rule, in a share of the time of
16 full trials, comes to the best score of those 16, and how much it misses on average. Time is counted in steps; what
the start of a trial and the continuation of a paused one cost beside them was measured. Nothing is trained here.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from harness import Row

from jaxtrain.tuning.rungs import Rungs, Training, rungs_below

Curve = tuple[list[float], float]
"""Validation scores of a full trial, and its own score."""

ORDERS, FULL = 200, 16
LOOKS = (1, 4)
"""Numbers of validations after which the rank of the best trial is shown: the rungs of a trial of 12."""
BEGINS = 0.75
"""Share of the time in which new trials begin, if trials are paused."""


def curves_of(folder: Path) -> list[Curve]:
    """Return the curves of the complete trials of a study."""
    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalStorage

    storage = JournalStorage(JournalFileBackend(str(folder / "journal.log")))
    (name,) = optuna.get_all_study_names(storage)
    trials = optuna.load_study(study_name=name, storage=storage).get_trials(
        deepcopy=False, states=[optuna.trial.TrialState.COMPLETE]
    )
    return [
        ([trial.intermediate_values[key] for key in sorted(trial.intermediate_values)], float(trial.value or 0))
        for trial in trials
    ]


@dataclass(frozen=True)
class Costs:
    """What trials cost beside their steps, as shares of the steps of a full trial.

    Attributes:
        start: The start of a trial.
        continuation: The continuation of a paused one.
    """

    start: float
    continuation: float


def replay_stops(factor: int, curves: Sequence[Curve], budget: float, costs: Costs) -> float:
    """Return the best score if Optuna stops all but one of `factor` trials at a rung, and none goes on later.

    Args:
        factor: One of so many goes on; 0 to stop none.
        curves: Trials in the order in which they begin.
        budget: Time, in steps of full trials, after which none begins.
        costs: Of the start of a trial.
    """
    import optuna

    halving = optuna.pruners.SuccessiveHalvingPruner
    pruner = halving(min_resource=1, reduction_factor=factor) if factor else optuna.pruners.NopPruner()
    study = optuna.create_study(direction="maximize", pruner=pruner)
    spent, best = 0.0, float("-inf")
    for scores, value in curves:
        if spent >= budget:
            break
        trial = study.ask()
        for number, score in enumerate(scores, start=1):
            trial.report(score, number)
            if trial.should_prune():
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                break
        else:
            study.tell(trial, value)
            best = max(best, value)
        spent += costs.start + number / len(scores)
    return best


def replay_pauses(curves: Sequence[Curve], budget: float, costs: Costs) -> float:
    """Return the best score of `--pruner asha`, which pauses trials at rungs and promotes them later."""
    trainings: list[Training] = []
    spent, best = 0.0, float("-inf")

    def climb(number: int) -> None:
        """Train until the next rung that is not passed at once, or until the end."""
        nonlocal spent, best
        (scores, value), one = curves[number], trainings[number]
        done = one.rung
        spent += costs.continuation if done else costs.start
        for rung in (*(rung for rung in rungs_below(len(scores)) if rung > done), len(scores)):
            spent += (rung - done) / len(scores)
            done = rung
            seen = {step: scores[step - 1] for step in range(1, rung + 1)}
            trainings[number] = Training(number, seen)
            if rung == len(scores):
                trainings[number] = replace(trainings[number], state="complete")
                best = max(best, value)
            elif not Rungs(trainings).goes_on(number, rung):
                trainings[number] = replace(trainings[number], state="paused", rung=rung)
                return

    while spent < budget:
        begins = len(trainings) < len(curves)
        chosen = Rungs(trainings).promoted()
        if chosen is None and (not begins or spent >= BEGINS * budget):
            chosen = Rungs(trainings).to_finish(None)
        if chosen is not None:
            climb(chosen.number)
        elif begins:
            trainings.append(Training(len(trainings), {}))
            climb(len(trainings) - 1)
        else:
            break
    return best


RULES: dict[str, Callable[[Sequence[Curve], float, Costs], float]] = {
    "no trial ends early": partial(replay_stops, 0),
    "two thirds are stopped": partial(replay_stops, 3),
    "one half is stopped": partial(replay_stops, 2),
    "ASHA pauses three quarters": replay_pauses,
}


def compare_rules(world: str, curves: Sequence[Curve], share: float, costs: Costs) -> list[Row]:
    """Return how often each rule comes to the best of `FULL` full trials in a share of their time."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    rng = np.random.default_rng(0)
    orders = [[curves[number] for number in rng.permutation(len(curves))] for _ in range(ORDERS)]
    rows = []
    for name, rule in RULES.items():
        gaps = [
            rule(order, share * FULL * (1 + costs.start), costs) - max(value for _, value in order[:FULL])
            for order in orders
        ]
        rows.append(
            Row(f"{world}: {name}: orders that come to the best of {FULL}", sum(gap >= 0 for gap in gaps) / ORDERS,
                note=f"{len(curves)} trials, {100 * share:.0f} % of the time; mean gap {statistics.fmean(gaps):+.4f}")
        )  # fmt: skip
    looked = [statistics.median(_rank_of_best(order[:FULL], number) for order in orders) for number in LOOKS]
    rows += [
        Row(f"{world}: rank of the best of {FULL} after {number} validations, median of the orders", rank)
        for number, rank in zip(LOOKS, looked, strict=True)
    ]
    return rows


def _rank_of_best(curves: Sequence[Curve], number: int) -> int:
    """Return the rank that the trial with the best score, or the first of equal ones, has after some validations."""
    best = max(value for _, value in curves)
    ranked = sorted(curves, key=lambda curve: -max(curve[0][:number]))
    return next(rank for rank, (_, value) in enumerate(ranked, start=1) if value == best)
