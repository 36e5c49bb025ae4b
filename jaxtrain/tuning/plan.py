"""`SearchPlan` is all that determines a search: configuration, space, score, sampler and pruner. It never changes."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self, get_args

import optuna
from optuna.trial import FrozenTrial

from jaxtrain.config import TrainConfig
from jaxtrain.data.task import Task
from jaxtrain.settings import build
from jaxtrain.traced import NUMBERS
from jaxtrain.tuning.generations import GenerationSampler, Turn, turn_of
from jaxtrain.tuning.rungs import RungPruner, Rungs, trainings_of
from jaxtrain.tuning.space import Space, parse_space, trial_config
from zarr_store.errors import InvalidInput

__all__ = ["Pruner", "Sampler", "SearchPlan", "check_search", "default_score"]

Sampler = Literal["tpe", "random", "cmaes", "gp", "pbt"]
Pruner = Literal["asha", "hyperband", "median", "wilcoxon", "none"]
_LOWER = ("loss", "rmse")


@dataclass(frozen=True)
class SearchPlan:
    """A search, fixed when it begins.

    Attributes:
        settings: Tables of the configuration of all trials.
        space: Tables of the space.
        digest: Digest of the training data.
        score: Name of the validation score.
        sampler: Sampler, which chooses the values of a trial.
        pruner: Pruner, which stops trials early.
        folds: Folds of a cross-validation; 0 for one validation part.
        seed: Seed of the sampler; a trial is trained with the seed of its configuration.
        storage: URL of the database with the study; empty for a journal in the folder.
        name: Name of the study.
        members: Size of the population of the sampler pbt; 0 for others.
    """

    settings: Mapping[str, Any]
    space: Mapping[str, Any]
    digest: str
    score: str
    sampler: Sampler = "tpe"
    pruner: Pruner = "asha"
    folds: int = 0
    seed: int = 0
    storage: str = ""
    name: str = "search"
    members: int = 0

    @property
    def generations(self) -> int:
        """Intervals between validations of the sampler pbt, each of which is a trial of each member."""
        run = self.base.run
        return -(-run.steps // run.evaluate_every)

    @property
    def pauses(self) -> bool:
        """Whether a trial that the pruner ends is paused: it keeps its checkpoint, and may go on later."""
        return self.pruner == "asha"

    def rungs(self, trials: Sequence[FrozenTrial]) -> Rungs:
        """Return all trainings of a search that pauses, for comparison at its rungs."""
        return Rungs(trainings_of(trials), self.direction == "minimize", best_so_far=not self.folds)

    def of_generations(self) -> dict[str, Any]:
        """Return the settings of each trial of a population: it saves its state at its end, and never ends early."""
        return {"run.checkpoint_every": self.base.run.evaluate_every, "run.patience": 0} if self.members else {}

    def turn(self, trials: Sequence[FrozenTrial], number: int) -> Turn:
        """Return generation, member and parent of a trial of a population."""
        return turn_of(number, trials, self.members, self.seed, lower=self.direction == "minimize")

    @property
    def direction(self) -> Literal["maximize", "minimize"]:
        """Direction of the score: "maximize" if a larger one is better, else "minimize"."""
        return "minimize" if self.score in _LOWER else "maximize"

    @property
    def base(self) -> TrainConfig:
        """The configuration without a value of the space: the defaults that the best trial is compared with."""
        return build(TrainConfig, self.settings, where="configuration of the search")

    def read_space(self) -> Space:
        """Return the space."""
        return parse_space(self.space, self.base)

    def config_of(self, values: Mapping[str, Any], *, fold: int | None = None, where: str = "trial") -> TrainConfig:
        """Return the configuration of a trial, or of one of its folds.

        Raises:
            InvalidInput: The values do not fit together.
        """
        more = {} if fold is None else {"data.split.folds": self.folds, "data.split.fold": fold}
        return trial_config(self.settings, {**values, **more, "run.monitor": self.score}, where=where)

    def make_sampler(self, offset: int = 0) -> optuna.samplers.BaseSampler:
        """Return the sampler; `offset` gives each worker, and each start, draws of its own."""
        seed = (self.seed + offset) % (1 << 32)
        match self.sampler:
            case "random":
                return optuna.samplers.RandomSampler(seed=seed)
            case "cmaes":
                # a paused trial is a pruned one, and most trials are paused: without them it would learn nothing
                return optuna.samplers.CmaEsSampler(
                    seed=seed, warn_independent_sampling=False, consider_pruned_trials=self.pauses
                )
            case "gp":
                return optuna.samplers.GPSampler(seed=seed)
            case "pbt":
                return GenerationSampler(self.members, self.seed)
        return optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True, constant_liar=True)

    def make_pruner(self) -> optuna.pruners.BasePruner:
        """Return the pruner; a trial reports after each validation, or after each fold."""
        match self.pruner:
            case "asha":
                return RungPruner(best_so_far=not self.folds)
            case "hyperband":
                run = self.base.run
                most = self.folds or -(-run.steps // run.evaluate_every)
                return optuna.pruners.HyperbandPruner(min_resource=1, max_resource=max(most, 1))
            case "median":
                return optuna.pruners.MedianPruner(n_startup_trials=5)
            case "wilcoxon":
                return optuna.pruners.WilcoxonPruner()
        return optuna.pruners.NopPruner()

    def key(self) -> str:
        """Return the identity of the search."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:32]

    def differences(self, other: SearchPlan) -> list[str]:
        """List in words what differs in another search."""
        found = []
        names = {"settings": "configuration", "space": "space", "digest": "training data"}
        for name, mine in asdict(self).items():
            yours = getattr(other, name)
            if name == "storage" or (mine == yours and name != "settings"):
                continue
            if name in ("settings", "space"):
                found += _differing(mine, yours, "" if name == "settings" else "space")
            elif name == "digest":
                found.append(f"{names[name]}: {mine[:12]} → {yours[:12]}")
            else:
                found.append(f"{name}: {mine} → {yours}")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form; of plans without a population it is that of releases that had none."""
        return {name: value for name, value in asdict(self).items() if name != "members" or value}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Make the object from its JSON form, which `to_dict` returns."""
        return cls(**{name: data[name] for name in cls.__dataclass_fields__ if name != "members" or name in data})


_ORDERED = ("data.classes", "data.modalities")
"""Tables whose order counts: class indices and channels follow it."""


def _differing(mine: Any, yours: Any, at: str) -> list[str]:
    if isinstance(mine, Mapping) and isinstance(yours, Mapping):
        if at in _ORDERED and mine.keys() == yours.keys() and list(mine) != list(yours):
            return [f"{at} (their order): {', '.join(mine)} → {', '.join(yours)}"]
        names = [*mine, *(name for name in yours if name not in mine)]
        return [line for name in names for line in
                _differing(mine.get(name), yours.get(name), f"{at}.{name}" if at else name)]  # fmt: skip
    return [] if mine == yours else [f"{at}: {json.dumps(mine)} → {json.dumps(yours)}"]


def default_score(config: TrainConfig, task: Task) -> str:
    """Return the score of a search that names none: that of `run.monitor`, else accuracy, or R² for values."""
    if config.run.monitor != "none":
        return config.run.monitor
    return "r2" if task.values else "accuracy"


def check_search(
    sampler: Sampler, pruner: Pruner, folds: int, space: Space, config: TrainConfig, members: int = 0
) -> None:
    """Refuse a sampler or pruner that cannot serve a search.

    Raises:
        InvalidInput: The space has what the sampler cannot draw, a package that it needs is not installed, or the
            pruner has nothing to look at.
    """
    if sampler not in get_args(Sampler):
        raise InvalidInput(f"--sampler {sampler}: expected one of {', '.join(get_args(Sampler))}")
    if sampler == "cmaes" and (space.chosen or space.conditional):
        name = (*space.chosen, *space.conditional)[0]
        kind = "choices" if name in space.chosen else "a condition"
        raise InvalidInput(
            f"--sampler cmaes draws numbers from ranges, and {name} has {kind}: use --sampler tpe, or leave it "
            "out of the space"
        )
    if sampler == "pbt":
        _check_generations(pruner, folds, space, config, members)
    needed = {"cmaes": "cmaes", "gp": "torch"}.get(sampler)
    if needed is not None:
        try:
            importlib.import_module(needed)
        except ImportError as error:
            raise InvalidInput(f"--sampler {sampler} needs the package {needed}: pip install {needed}") from error
    if pruner == "wilcoxon" and not folds:
        raise InvalidInput("--pruner wilcoxon compares trials fold by fold: add --folds 5, or use --pruner asha")
    validations = -(-config.run.steps // config.run.evaluate_every)
    if pruner not in ("none", "wilcoxon") and not folds and validations < 2:
        raise InvalidInput(
            f"--pruner {pruner} looks at validations, and a trial of run.steps = {config.run.steps} has one "
            f"(run.evaluate_every = {config.run.evaluate_every}): validate more often, or use --pruner none"
        )


def _check_generations(pruner: Pruner, folds: int, space: Space, config: TrainConfig, members: int) -> None:
    """Refuse what population-based training cannot do: a member keeps its network when its settings change."""
    if members < 2:
        raise InvalidInput(f"--sampler pbt trains at least two members, got --members {members}")
    if folds:
        raise InvalidInput("--sampler pbt changes settings while a member is trained: leave out --folds")
    if pruner != "none":
        raise InvalidInput(f"--sampler pbt replaces weak members itself: leave out --pruner {pruner}")
    for one in space.parameters:
        if one.name not in NUMBERS:
            raise InvalidInput(
                f"--sampler pbt changes settings while a network is trained, and {one.name} belongs to its shape or "
                f"data: use --sampler tpe, or leave it out of the space; possible: {', '.join(NUMBERS)}"
            )
        least = min(one.choices, key=float) if one.choices else one.low
        if one.when or not least or float(least) <= 0:
            why = "has a condition" if one.when else "may be 0, which switches its part of the step off"
            raise InvalidInput(f"--sampler pbt: {one.name} {why}: give values above 0, or use --sampler tpe")
    if config.run.steps <= config.run.evaluate_every:
        raise InvalidInput(
            f"--sampler pbt compares members at validations, and run.steps = {config.run.steps} has one "
            f"(run.evaluate_every = {config.run.evaluate_every}): validate more often"
        )
