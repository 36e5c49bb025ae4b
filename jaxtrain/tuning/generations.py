"""`GenerationSampler` is population-based training as a sampler of Optuna (Jaderberg et al. 2017, arXiv:1711.09846).

The members of a population are trained side by side. A trial is one member from one validation to the next: trial
n is member n mod N in generation n div N. After each generation, a member of the worst fifth continues from the state
of one of the best fifth (exploit), with each of its numbers changed by a factor of 0.8 or 1.2 (explore); the others go
on as they are.

What a trial gets is a function of the seed, its number and the scores of the generation before. So a search that was
killed and continued gives the same answer as one that was not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

__all__ = ["GenerationSampler", "Turn", "explore", "turn_of"]

_SHARE = 0.2
"""Share of the members that copy, and of those that are copied."""
_FACTORS = (0.8, 1.2)


@dataclass(frozen=True)
class Turn:
    """Generation, member and parent of one trial of a population.

    Attributes:
        generation: Number of its interval between two validations.
        member: Number of the member.
        parent: Number of the trial whose state it continues; None in the first generation.
        explores: Whether the parent is another member, so that the settings change.
    """

    generation: int
    member: int
    parent: int | None = None
    explores: bool = False


def turn_of(number: int, trials: Sequence[FrozenTrial], members: int, seed: int, *, lower: bool) -> Turn:
    """Return generation, member and parent of a trial.

    Args:
        number: Number of the trial.
        trials: All trials of the study, by number; those of the generation before must have ended.
        members: Size of the population.
        seed: Seed of the search.
        lower: Whether a smaller score is better.
    """
    generation, member = divmod(number, members)
    if not generation:
        return Turn(0, member)
    before = trials[(generation - 1) * members : generation * members]
    sign = 1.0 if lower else -1.0

    def rank(trial: FrozenTrial) -> tuple[float, int]:
        usable = trial.state == TrialState.COMPLETE and trial.value is not None and math.isfinite(trial.value)
        return (sign * (trial.value or 0.0) if usable else math.inf), trial.number

    ranked = sorted(before, key=rank)
    count = max(1, math.ceil(_SHARE * members)) if members > 1 else 0
    own = before[member]
    lost = rank(own)[0] == math.inf
    if not lost and own not in ranked[members - count :]:
        return Turn(generation, member, own.number)
    best = [trial for trial in ranked[:count] if rank(trial)[0] < math.inf and trial.number != own.number]
    if not best:
        return Turn(generation, member, None if lost else own.number)
    chosen = best[int(_draws(seed, number, "parent").integers(len(best)))]
    return Turn(generation, member, chosen.number, explores=True)


def explore(value: Any, distribution: BaseDistribution, draws: np.random.Generator) -> Any:
    """Return a value near another one: a number times 0.8 or 1.2 within its range, or a neighbour of a choice."""
    if isinstance(distribution, CategoricalDistribution):
        choices = distribution.choices
        at = choices.index(value) + int(draws.choice([-1, 1]))
        return choices[min(max(at, 0), len(choices) - 1)]
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    wanted = value * float(draws.choice(_FACTORS))
    if distribution.step is not None:
        least = distribution.low + distribution.step * round((wanted - distribution.low) / distribution.step)
        if least == value:  # a small number would never leave its step
            least = value + distribution.step * (1 if wanted > value else -1)
        wanted = least
    inside = min(max(wanted, distribution.low), distribution.high)
    return int(inside) if isinstance(distribution, IntDistribution) else float(inside)


def _draws(seed: int, number: int, what: str) -> np.random.Generator:
    """Return random numbers of one trial for one purpose."""
    return np.random.default_rng([seed, number, *what.encode()])


class GenerationSampler(optuna.samplers.BaseSampler):
    """Sampler that draws the first generation at random, and later ones from the generation before.

    Args:
        members: Size of the population.
        seed: Seed of the search.
    """

    def __init__(self, members: int, seed: int) -> None:
        self._members, self._seed = members, seed

    def turn(self, study: optuna.Study, number: int) -> Turn:
        """Return generation, member and parent of a trial; the generation before must have ended."""
        lower = study.direction == optuna.study.StudyDirection.MINIMIZE
        return turn_of(number, study.get_trials(deepcopy=False), self._members, self._seed, lower=lower)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return nothing: each setting is drawn by itself."""
        return {}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return nothing, as no setting is drawn together with others."""
        return {}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Return the value of one setting."""
        turn, draws = self.turn(study, trial.number), _draws(self._seed, trial.number, param_name)
        if turn.parent is None:
            sampler = optuna.samplers.RandomSampler(seed=int(draws.integers(1 << 31)))
            return sampler.sample_independent(study, trial, param_name, param_distribution)
        value = study.get_trials(deepcopy=False)[turn.parent].params[param_name]
        return explore(value, param_distribution, draws) if turn.explores else value
