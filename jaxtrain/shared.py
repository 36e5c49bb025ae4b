"""`SharedParts` holds what several runs in one process share: open data, and compiled steps.

Runs whose configurations differ in numbers alone (`traced.NUMBERS`) use one compiled step, which gets the numbers as
arguments. All others are compiled as ever, once for each shape.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from jaxtrain.config import TrainConfig
from jaxtrain.data.arrays import Reader
from jaxtrain.data.opening import open_training_data
from jaxtrain.data.training_data import TrainingData, TrainingSet
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


_NOT_READ = (
    "split", "colours", "min_labelled", "cache", "augment", "zoom", "jitter", "band_dropout", "mix", "mix_alpha",
    "modality_dropout",
)  # fmt: skip
"""Settings of the data on which the pixels of a row do not depend."""


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
    """The interface by which `train` shares data and steps with other runs of its process."""

    @property
    def stop(self) -> threading.Event:
        """Set when all of these runs are to save and end."""

    def open(self, url: str | Sequence[str]) -> TrainingData:
        """Open training data, or return those that are open."""

    def parts_of(self, card: ModelCard, config: TrainConfig) -> RunParts:
        """Return program and steps of a run."""

    def kept(self, ready: TrainingSet, config: TrainConfig, make: Callable[[], Reader]) -> Reader:
        """Return the reader that keeps these rows, made by `make` if no run has made it yet."""


@dataclass
class SharedParts:
    """Data and compiled steps that the runs of this process share; several threads may use it.

    Example:
        >>> SharedParts().compiled()
        {}
    """

    _data: dict[str, TrainingData] = field(default_factory=dict)
    _parts: dict[str, RunParts] = field(default_factory=dict)
    _together: dict[tuple[str, int], Any] = field(default_factory=dict)
    _guard: threading.RLock = field(default_factory=threading.RLock)
    _kept: dict[str, Reader] = field(default_factory=dict)
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

    def kept(self, ready: TrainingSet, config: TrainConfig, make: Callable[[], Reader]) -> Reader:
        """Return the reader that keeps the rows of a run, for all runs that read the same pixels of them.

        Folds differ in what they train on and validate on, and have the same rows in all. Rows of one kind are kept at
        a time. Where damaged rows are put in quarantine, each run must meet them itself, and nothing is shared.
        """
        if config.run.on_corrupt != "stop":
            return make()
        settings = config.data.model_dump(mode="json", exclude=set(_NOT_READ))
        rows = np.concatenate([ready.plan.parts[part].rows for part in ("train", "validation")])
        about = json.dumps([settings, ready.digest, ready.bands, ready.classes.to_list()], sort_keys=True)
        key = hashlib.sha256(about.encode() + np.unique(rows, axis=0).tobytes()).hexdigest()
        with self._guard:
            if key not in self._kept:
                self._kept.clear()
                self._kept[key] = make()
            return self._kept[key]

    def together(self, group: str, size: int, make: Callable[[], Any]) -> Any:
        """Return the compiled step of several runs of a group at once, made by a function if it is not there yet."""
        with self._guard:
            if (group, size) not in self._together:
                self._together[group, size] = make()
            return self._together[group, size]

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
