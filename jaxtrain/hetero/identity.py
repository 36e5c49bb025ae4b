"""Identify a run by what its replicas must have in common: digests of configuration, data and code."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax
import jax
import optax

from jaxtrain.config import TrainConfig
from jaxtrain.data.training_data import TrainingSet
from jaxtrain.hetero.membership import Identity

__all__ = ["identify"]

_OF_THE_MACHINE = ("mesh", "data.cube", "data.colours", "run.read_threads", "run.prefetch", "run.hang_s", "run.track",
                   "hetero.silence_s")  # fmt: skip
"""Settings in which replicas may differ. The data are compared by their digest."""


def identify(config: TrainConfig, ready: TrainingSet) -> Identity:
    """Return the digests of a run; equal on every machine that can take part in it."""
    values = _without(config.model_dump(mode="json"), "")
    rows = hashlib.sha256(ready.digest.encode())
    for part, windows in sorted(ready.plan.parts.items()):
        rows.update(f"{part} {windows.rows.shape} {windows.patch}".encode())
        rows.update(windows.rows.astype("<i4").tobytes())
    rows.update(json.dumps([ready.bands, ready.classes.to_list()]).encode())
    return Identity(_digest(json.dumps(values, sort_keys=True).encode()), rows.hexdigest(), _code())


def _without(values: Mapping[str, Any], at: str) -> dict[str, Any]:
    kept = {}
    for key, value in values.items():
        name = f"{at}.{key}" if at else key
        if name not in _OF_THE_MACHINE:
            kept[key] = _without(value, name) if isinstance(value, dict) and at == "" else value
    return kept


@functools.cache
def _code() -> str:
    """Return the digest of the sources that compute, and of the versions of the libraries that they compute with."""
    package = Path(__file__).parents[1]
    sources = hashlib.sha256(f"jax {jax.__version__}, flax {flax.__version__}, optax {optax.__version__}".encode())
    for folder in ("data", "hetero", "learn", "models", "parallel"):
        for path in sorted((package / folder).rglob("*.py")):
            sources.update(path.relative_to(package).as_posix().encode())
            sources.update(path.read_bytes())
    return sources.hexdigest()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
