"""The process that runs strategies briefly and times their steps: `python -m jaxtrain.planner.measurer`.

All programs are compiled first. Then they take turns, a few steps each, so that whatever else the machine does falls on
all of them alike. The batch holds random numbers: how long a step takes does not depend on them. Several processes do
it together where the run has several; the first prints the answers.

A request with `copies` does not run a strategy: several devices run the program of one device at once, each on windows
of its own, and none waits for another. That is what computing costs where devices share cores, without any exchange.
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
from jaxtrain.data.arrays import local_rows, put_batch
from jaxtrain.learn.step import make_train_step
from jaxtrain.parallel.heap import keep_freed_memory
from jaxtrain.parallel.mesh import batch_sharding
from jaxtrain.parallel.processes import start_distributed, wait_for_all
from jaxtrain.planner.facts import batch_shapes
from jaxtrain.runs.rundir import ModelCard, program_of
from zarr_store.errors import TerrashardError

__all__ = ["measure", "random_batch"]

ROUNDS, STEPS = 5, 3
TURN_S = 0.6
"""Seconds of the steps of one turn, if a step is long."""


class _Runner:
    """One strategy with its state, ready to step."""

    def __init__(self, request: Mapping[str, Any], devices: list[Any] | None) -> None:
        config = TrainConfig.model_validate(request["config"])
        program = program_of(ModelCard.from_dict(request["card"]), config, devices)
        batch = random_batch(batch_shapes(program, request["dtypes"]), program.classes)
        sharding, size = batch_sharding(program.mesh), config.run.batch_size
        rows = local_rows(sharding, size)
        self._batch = put_batch({name: array[rows] for name, array in batch.items()}, sharding, size)
        self._step = make_train_step(program)
        self._state = program.init(jax.random.key(0))
        self._key = jax.random.key(1)

    def begin(self) -> Any:
        """Start a step, and return what is there when it has ended."""
        self._state, metrics = self._step(self._state, self._batch, key=self._key)
        return self._state.params, metrics


class _Together:
    """What one request runs: a strategy, or copies of the program of one device."""

    def __init__(self, request: Mapping[str, Any]) -> None:
        copies, mine = request.get("copies"), jax.local_devices()
        if copies is None:
            self._runners = [_Runner(request, None)]
        elif copies == 1:
            self._runners = [_Runner(request, mine[:1])] if jax.process_index() == 0 else []
        else:
            here = mine[: max(1, copies // jax.process_count())]
            self._runners = [_Runner(request, [device]) for device in here]
        self.steps = STEPS
        for _ in range(2):
            self.steps = max(1, min(STEPS, round(TURN_S / max(self.run(1), 1e-3))))

    def run(self, steps: int) -> float:
        """Return the seconds of a step."""
        wait: Callable[..., Any] = jax.block_until_ready
        began = time.perf_counter()
        for _ in range(steps):
            under_way = [runner.begin() for runner in self._runners]
        if self._runners:
            wait(under_way)
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
    """Run strategies in turns; return the median seconds of a step of each, and all measured, or why it cannot be.

    Args:
        requests: `config` of the run, `card` of its data, `dtypes` of its batches; `copies` of the program of one
            device, where no strategy is asked for.
    """
    runners: dict[int, _Together] = {}
    found: list[dict[str, Any]] = [{} for _ in requests]
    for number, request in enumerate(requests):
        try:
            runners[number] = _Together(request)
        except TerrashardError as error:
            found[number] = {"why_not": str(error)}
        wait_for_all("a strategy is compiled")
    seconds: dict[int, list[float]] = {number: [] for number in runners}
    for _ in range(ROUNDS):
        for number, runner in runners.items():
            wait_for_all("a strategy takes its turn")
            seconds[number].append(runner.run(STEPS if jax.process_count() > 1 else runner.steps))
    for number, values in seconds.items():
        found[number] = {"seconds": statistics.median(values), "every": values}
    return found


if __name__ == "__main__":
    keep_freed_memory()  # as a run of training does
    asked = json.load(sys.stdin)
    process = start_distributed()
    answers = measure(asked)
    if process.is_first:
        json.dump(answers, sys.stdout)
