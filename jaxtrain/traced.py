"""Numbers of a configuration that a compiled step can take as arguments, so that runs which differ in them share it.

A number that is 0 (or `none`) switches its part of the step off, so runs share a step only if the same parts are on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxtrain.config import TrainConfig

__all__ = ["NUMBERS", "is_on", "numbers_of", "with_numbers", "without_numbers"]

NUMBERS = (
    "optim.learning_rate", "optim.weight_decay", "optim.momentum", "optim.clip_norm", "optim.label_smoothing",
    "optim.focal_gamma", "optim.huber_delta", "optim.ema", "data.zoom", "data.jitter", "data.band_dropout",
    "data.mix_alpha", "data.modality_dropout", "model.dropout",
)  # fmt: skip
"""Settings that change no shape and no operation of a step, only its numbers."""


def is_on(value: Any) -> bool:
    """Return whether a number switches its part of a step on; one that a compiled step gets as an argument does.

    >>> is_on(0.1), is_on(0.0), is_on(None)
    (True, False, False)
    """
    return isinstance(value, jax.Array) or bool(value)


def numbers_of(config: TrainConfig) -> dict[str, np.float32]:
    """Return the numbers of a configuration that are on, by their dotted names.

    >>> config = TrainConfig.model_validate({"data": {"cube": "zagreb.zarr", "modality_dropout": 0.0}})
    >>> sorted(numbers_of(config))[:3]
    ['data.mix_alpha', 'optim.clip_norm', 'optim.focal_gamma']
    """
    values = {name: _get(config, name) for name in NUMBERS}
    return {name: np.float32(value) for name, value in values.items() if _is_number(name, value)}


def with_numbers(config: TrainConfig, numbers: Mapping[str, Any]) -> TrainConfig:
    """Return the configuration with other numbers, which may be arguments of a function that JAX traces.

    Args:
        config: The configuration.
        numbers: Dotted name → number. Nothing is checked again.
    """
    changed: dict[str, dict[str, Any]] = {}
    for name, value in numbers.items():
        section, _, key = name.partition(".")
        changed.setdefault(section, {})[key] = value
    sections = {name: getattr(config, name).model_copy(update=values) for name, values in changed.items()}
    return config.model_copy(update=sections)


def without_numbers(config: TrainConfig) -> dict[str, Any]:
    """Return the JSON form of a configuration without the numbers that `numbers_of` gives."""
    values = config.model_dump(mode="json")
    for name in NUMBERS:
        section, _, key = name.partition(".")
        value = values[section][key]
        values[section][key] = "number" if _is_number(name, value) else value
    return values


def _is_number(name: str, value: Any) -> bool:
    # all features hidden is another function, whose gradient is 0
    return is_on(value) and not (name == "model.dropout" and value == 1)


def _get(config: TrainConfig, name: str) -> Any:
    section, _, key = name.partition(".")
    return getattr(getattr(config, section), key)
