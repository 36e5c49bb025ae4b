"""Rules that stop trials early, replayed on the validation scores of trials that were trained to their end.

One search shows one order of trials. Full trials in 200 random orders show how often a rule, in a share of the time of
16 full trials, comes to the best score of those 16, and how much it misses on average. Time is counted in steps, and
each trial costs a tenth of its steps for its start. Nothing is trained here.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from harness import Row

Curve = tuple[list[float], float]
"""Validation scores of a full trial, and its own score."""

RULES = {"ASHA, thirds": (1, 3), "ASHA, halves": (1, 2), "ASHA, halves, from the second validation": (2, 2)}
ORDERS, FULL, START = 200, 16, 0.1


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


def replay(curves: Sequence[Curve], rule: tuple[int, int], budget: float) -> float:
    """Return the best score of trials in this order, begun until the budget, in full trials, is spent."""
    import optuna

    first, factor = rule
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=first, reduction_factor=factor)
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
        spent += START + number / len(scores)
    return best


def compare_rules(world: str, curves: Sequence[Curve], share: float) -> list[Row]:
    """Return how often each rule comes to the best of `FULL` full trials in a share of their time."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    rng = np.random.default_rng(0)
    orders = [[curves[number] for number in rng.permutation(len(curves))] for _ in range(ORDERS)]
    rows = []
    for name, rule in RULES.items():
        gaps = [
            replay(order, rule, share * FULL * (1 + START)) - max(value for _, value in order[:FULL])
            for order in orders
        ]
        rows.append(
            Row(f"{world}: {name}: orders that come to the best of {FULL}", sum(gap >= 0 for gap in gaps) / ORDERS,
                note=f"{len(curves)} trials, {100 * share:.0f} % of the time; mean gap {statistics.fmean(gaps):+.4f}")
        )  # fmt: skip
    return rows
