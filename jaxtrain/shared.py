"""`SharedParts` is what several runs in one process have in common: open data, and compiled steps.

Runs whose configurations differ in numbers alone (`traced.NUMBERS`) use one compiled step, which gets the numbers as
arguments. All others are compiled as ever, once for each shape.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from jaxtrain.config import TrainConfig
from jaxtrain.data.opening import open_training_data
from jaxtrain.data.training_data import TrainingData
from jaxtrain.learn.state import Program, data_numbers
from jaxtrain.learn.step import EvalStep, TrainStep, make_eval_step, make_train_step
from jaxtrain.runs.rundir import ModelCard, program_of
from jaxtrain.traced import numbers_of, without_numbers

__all__ = ["RunParts", "SharedParts", "Sharing", "group_of"]

_NOT_COMPILED = {
    "data": (
        "cube",
        "split",
        "colours",
        "min_labelled",
        "label",
        "learn_masked",
        "bands",
        "collection",
        "classes",
        "cache",
    ),
    "run": None,
    "hetero": None,
}
"""Settings that no compiled step depends on; what follows from them (bands, classes) is in the card. None: all."""


@dataclass(frozen=True)
class RunParts:
    """Program and steps of one run.

    Attributes:
        program: The fixed parts, with the run's own numbers.
        train: Its train step.
        evaluate: Its evaluation step.
        new: Whether nothing was compiled for such a run before.
    """

    program: Program
    train: TrainStep
    evaluate: EvalStep
    new: bool = True


class Sharing(Protocol):
    """What `train` takes from other runs of its process."""

    @property
    def stop(self) -> threading.Event:
        """Set when all of these runs are to save and end."""

    def open(self, url: str | Sequence[str]) -> TrainingData:
        """Open training data, or return those that are open."""

    def parts_of(self, card: ModelCard, config: TrainConfig) -> RunParts:
        """Return program and steps of a run."""


@dataclass
class SharedParts:
    """Data and compiled steps that the runs of this process share; several threads may use it.

    Example:
        >>> SharedParts().compiled()
        {}
    """

    _data: dict[str, TrainingData] = field(default_factory=dict)
    _parts: dict[str, RunParts] = field(default_factory=dict)
    _guard: threading.RLock = field(default_factory=threading.RLock)
    stop: threading.Event = field(default_factory=threading.Event)
    """Set when the runs are to save and end."""

    def open(self, url: str | Sequence[str]) -> TrainingData:
        """Open training data, once for all runs.

        Raises:
            NotACube: There are none at `url`.
            InvalidInput: They cannot be used.
        """
        key = json.dumps(url)
        with self._guard:
            if key not in self._data:
                self._data[key] = open_training_data(url)
            return self._data[key]

    def parts_of(self, card: ModelCard, config: TrainConfig) -> RunParts:
        """Return program and steps of a run; a pipeline, whose stages have programs of their own, shares none.

        Raises:
            InvalidInput: Network, mesh and data do not fit together.
        """
        key = group_of(card, config)
        with self._guard:
            known = self._parts.get(key)
            if known is None:
                program = program_of(card, config)
                shared = program.layout is None
                parts = RunParts(program, make_train_step(program, shared=shared),
                                 make_eval_step(program, shared=shared))  # fmt: skip
                if shared:
                    self._parts[key] = parts
                return parts
        channels, classes = len(card.bands), len(card.classes)
        values = ({
            **numbers_of(config),
            **data_numbers(card.mean, card.std, card.class_weights, channels=channels, classes=classes),
        },)  # fmt: skip
        program = replace(known.program.with_values(values[0]), config=config)
        return RunParts(program, replace(known.train, values=values), replace(known.evaluate, values=values), new=False)

    def compiled(self) -> dict[str, int]:
        """Return how many times the train step of each group of runs was compiled."""
        return {key: int(parts.train.jitted._cache_size()) for key, parts in self._parts.items()}


def group_of(card: ModelCard, config: TrainConfig) -> str:
    """Return the name of the group of runs that share compiled steps with this one: letters and digits."""
    settings = without_numbers(config)
    for section, names in _NOT_COMPILED.items():
        for name in settings[section] if names is None else names:
            settings[section] = {key: value for key, value in settings[section].items() if key != name}
    about: dict[str, Any] = {
        "settings": settings,
        "batch": [config.run.steps, config.unit],
        "bands": len(card.bands),
        "classes": len(card.classes),
        "weights": card.class_weights is not None,
        "task": card.task.to_dict(),
        "modalities": [one.to_dict() for one in card.modalities],
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
