"""The process that runs strategies briefly and times their steps: `python -m jaxtrain.planner.measurer`.

All programs are compiled first. Then they take turns, a few steps each, so that whatever else the machine does falls on
all of them alike. The batch holds random numbers: how long a step takes does not depend on them.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxtrain.config import TrainConfig
from jaxtrain.data.arrays import put_batch
from jaxtrain.learn.step import make_train_step
from jaxtrain.parallel.mesh import batch_sharding
from jaxtrain.planner.facts import batch_shapes
from jaxtrain.runs.rundir import ModelCard, program_of
from zarr_store.errors import TerrashardError

__all__ = ["measure", "random_batch"]

ROUNDS, STEPS = 5, 3


class _Runner:
    """One strategy with its state, ready to step."""

    def __init__(self, request: Mapping[str, Any]) -> None:
        config = TrainConfig.model_validate(request["config"])
        program = program_of(ModelCard.from_dict(request["card"]), config)
        batch = random_batch(batch_shapes(program, request["dtypes"]), program.classes)
        self._batch = put_batch(batch, batch_sharding(program.mesh), config.run.batch_size)
        self._step = make_train_step(program)
        self._state = program.init(jax.random.key(0))
        self._key = jax.random.key(1)

    def run(self, steps: int) -> float:
        """Return the seconds of a step."""
        began = time.perf_counter()
        for _ in range(steps):
            self._state, metrics = self._step(self._state, self._batch, key=self._key)
        wait: Callable[..., Any] = jax.block_until_ready
        wait((self._state.params, metrics))
        return (time.perf_counter() - began) / steps


def random_batch(shapes: Mapping[str, Any], classes: int) -> dict[str, np.ndarray]:
    """Return a batch of random numbers: stored values, class indices, all observed."""
    rng = np.random.default_rng(0)
    made = {}
    for name, leaf in shapes.items():
        if name == "observed":
            made[name] = np.ones(leaf.shape, leaf.dtype)
        elif np.issubdtype(leaf.dtype, np.floating):
            made[name] = rng.normal(size=leaf.shape).astype(leaf.dtype)
        else:
            most = {"label": 2 if leaf.ndim == 2 else classes, "day": 365}.get(name, 4000)
            made[name] = rng.integers(0, most, leaf.shape).astype(leaf.dtype)
    return made


def measure(requests: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Run strategies in turns; return the median seconds of a step of each, and all measured, or why it cannot be."""
    runners: dict[int, _Runner] = {}
    found: list[dict[str, Any]] = [{} for _ in requests]
    for number, request in enumerate(requests):
        try:
            runners[number] = _Runner(request)
            runners[number].run(2)
        except TerrashardError as error:
            found[number] = {"why_not": str(error)}
    seconds: dict[int, list[float]] = {number: [] for number in runners}
    for _ in range(ROUNDS):
        for number, runner in runners.items():
            seconds[number].append(runner.run(STEPS))
    for number, values in seconds.items():
        found[number] = {"seconds": statistics.median(values), "every": values}
    return found


if __name__ == "__main__":
    json.dump(measure(json.load(sys.stdin)), sys.stdout)
