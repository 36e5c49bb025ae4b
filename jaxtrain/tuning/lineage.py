"""The history of a population: which member came from which, as a figure and as the line of parents of one trial."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from optuna.trial import FrozenTrial

__all__ = ["ancestors", "draw_generations"]


def ancestors(trials: Sequence[FrozenTrial], number: int) -> list[FrozenTrial]:
    """Return the trials that led to one, the first generation first, and the trial itself last."""
    line: list[FrozenTrial] = []
    at: int | None = number
    while at is not None:
        line.append(trials[at])
        at = trials[at].user_attrs.get("parent")
    return line[::-1]


def draw_generations(trials: Sequence[FrozenTrial], score: str) -> Any:
    """Draw the score of each member in each generation; a dashed line leads to a member that copied another one."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for trial in trials:
        generation, parent = trial.user_attrs.get("generation"), trial.user_attrs.get("parent")
        if generation is None or trial.value is None:
            continue
        colour = f"C{trial.user_attrs['member'] % 10}"
        axes.plot([generation + 1], [trial.value], "o", color=colour, markersize=4)
        before = None if parent is None else trials[parent].value
        if before is not None:
            style = "--" if trial.user_attrs["explores"] else "-"
            axes.plot([generation, generation + 1], [before, trial.value], style, color=colour, linewidth=1)
    axes.set(xlabel="generation", ylabel=score)
    figure.tight_layout()
    return axes
