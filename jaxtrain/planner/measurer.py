"""The process that runs strategies briefly and times their steps: `python -m jaxtrain.planner.measurer`.

All programs are compiled first. Then they take turns, a few steps each, so that whatever else the machine does falls on
all of them alike. The batch holds random numbers: how long a step takes does not depend on them. Several processes do
it together where the run has several; the first prints the answers.

A request with `copies` does not run a strategy: several devices run the program of one device at once, each on windows
of its own, and none waits for another. That is what computing costs where devices share cores, without any exchange.
With `exchange` it is the exchange that is timed: after each step of the copies all devices sum arrays of these shapes,
one after the other, as they sum gradients.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

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

ROUNDS, STEPS = 9, 3
TURN_S = 0.6
"""Seconds of the steps of one turn, if a step is long."""
COMPILERS = 2
"""Programs that are compiled at once."""


class _Runner:
    """One strategy with its state, ready to step."""

    def __init__(self, request: Mapping[str, Any], devices: list[Any] | None) -> None:
        config = TrainConfig.model_validate(request["config"])
        self._program = program_of(ModelCard.from_dict(request["card"]), config, devices)
        self._shapes = batch_shapes(self._program, request["dtypes"])
        self._step: Any = make_train_step(self._program)
        self._key = jax.random.key(1)

    def compile(self) -> None:
        """Compile the step; several may do so at once, because nothing runs."""
        if self._program.layout is None:
            key = jax.eval_shape(lambda: jax.random.key(0))
            self._step = self._step.jitted.lower(self._program.shapes, self._shapes, key).compile()

    def prepare(self) -> None:
        """Make the state and the batch."""
        batch = random_batch(self._shapes, self._program.classes)
        sharding, size = batch_sharding(self._program.mesh), self._program.config.run.batch_size
        rows = local_rows(sharding, size)
        self._batch = put_batch({name: array[rows] for name, array in batch.items()}, sharding, size)
        self._state = self._program.init(jax.random.key(0))

    def begin(self) -> Any:
        """Start a step, and return arrays that are ready when it has ended."""
        # a compiled step takes its arguments by their places
        key = {"key": self._key} if self._program.layout is not None else {}
        self._state, metrics = self._step(self._state, self._batch, *(() if key else (self._key,)), **key)
        return self._state.params, metrics


class _Turn(Protocol):
    """Interface of what a request runs in its turn."""

    runners: list[_Runner]
    steps: int

    def prepare(self) -> None:
        """Make states and batches, and run the first steps."""

    def run(self, steps: int) -> float:
        """Return the seconds of a step."""


class _Together:
    """The work of one request: a strategy, or copies of the program of one device."""

    def __init__(self, request: Mapping[str, Any]) -> None:
        self._copies = request.get("copies")
        mine: list[Any] = jax.local_devices()
        if self._copies is None:
            self.runners = [_Runner(request, None)]
        elif self._copies == 1:
            self.runners = [_Runner(request, mine[:1])] if jax.process_index() == 0 else []
        else:
            here = mine[: max(1, self._copies // jax.process_count())]
            self.runners = [_Runner(request, [device]) for device in here]
        self.steps = STEPS

    def prepare(self) -> None:
        """Make states and batches, and run the first steps."""
        for runner in self.runners:
            runner.prepare()
        for _ in range(2):
            spent = self.run(1)
        if jax.process_count() == 1:  # several processes must take as many steps
            self.steps = max(1, min(STEPS, round(TURN_S / max(spent, 1e-3))))

    def run(self, steps: int) -> float:
        """Return the seconds of a step; copies wait for each other after each, as the devices of a strategy do."""
        wait: Callable[..., Any] = jax.block_until_ready
        began = time.perf_counter()
        for number in range(steps):
            under_way = [runner.begin() for runner in self.runners]
            if self.runners and (self._copies or number == steps - 1):
                wait(under_way)
        return (time.perf_counter() - began) / steps


class _Exchange:
    """Sums of arrays over all devices, each time after a step of copies, as gradients are summed."""

    def __init__(self, request: Mapping[str, Any]) -> None:
        self._copies = _Together(request)
        self.runners, self.steps = self._copies.runners, STEPS
        self._shapes = [(tuple(shape), dtype) for shape, dtype in request["exchange"]]

    def prepare(self) -> None:
        """Make states and arrays, and sum once."""
        devices: list[Any] = jax.devices()
        mesh = Mesh(np.array(devices), ("data",))
        spec: Callable[..., PartitionSpec] = PartitionSpec
        psum: Any = jax.lax.psum
        added: Any = jax.shard_map(
            lambda *arrays: tuple(psum(x, "data") for x in arrays),
            mesh=mesh, in_specs=spec(), out_specs=spec(), check_vma=False,
        )  # fmt: skip
        self._sum = jax.jit(added)
        self._arrays = [
            jax.device_put(np.zeros(shape, dtype), NamedSharding(mesh, spec())) for shape, dtype in self._shapes
        ]
        self._copies.prepare()
        self.steps = self._copies.steps
        self.run(1)

    def run(self, steps: int) -> float:
        """Return the seconds from the end of the own copies to the end of the exchange: others may be later."""
        wait: Callable[..., Any] = jax.block_until_ready
        spent = 0.0
        for _ in range(steps):
            wait([runner.begin() for runner in self.runners])
            began = time.perf_counter()
            wait(self._sum(*self._arrays))
            spent += time.perf_counter() - began
        return spent / steps


def random_batch(shapes: Mapping[str, Any], classes: int) -> dict[str, np.ndarray]:
    """Return a batch of random numbers: stored values, class indices, all observed."""
    rng = np.random.default_rng(0)
    made = {}
    for name, leaf in shapes.items():
        if name.startswith("observed"):
            made[name] = np.ones(leaf.shape, leaf.dtype)
        elif np.issubdtype(leaf.dtype, np.floating):
            made[name] = rng.normal(size=leaf.shape).astype(leaf.dtype)
        else:
            most = {"label": 2 if leaf.ndim == 2 else classes, "day": 365}.get(name.partition("_")[0], 4000)
            made[name] = rng.integers(0, most, leaf.shape).astype(leaf.dtype)
    return made


def measure(requests: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Run strategies by turns; return the median seconds of a step of each, and all measured, or why it cannot be.

    Args:
        requests: `config` of the run, `card` of its data, `dtypes` of its batches; `copies` of the program of one
            device, where no strategy is asked for, and with them `exchange`, shapes and types of arrays to sum.
    """
    runners: dict[int, _Turn] = {}
    found: list[dict[str, Any]] = [{} for _ in requests]
    for number, request in enumerate(requests):
        try:
            runners[number] = _Exchange(request) if "exchange" in request else _Together(request)
        except TerrashardError as error:
            found[number] = {"why_not": str(error)}
    with ThreadPoolExecutor(COMPILERS) as pool:
        list(pool.map(_Runner.compile, [runner for one in runners.values() for runner in one.runners]))
    for runner in runners.values():
        wait_for_all("a strategy is prepared")
        runner.prepare()
    seconds: dict[int, list[float]] = {number: [] for number in runners}
    for _ in range(ROUNDS):
        for number, runner in runners.items():
            wait_for_all("a strategy takes its turn")
            seconds[number].append(runner.run(runner.steps))
    for number, values in seconds.items():
        found[number] = {"seconds": statistics.median(values), "every": values}
    return found


if __name__ == "__main__":
    keep_freed_memory()  # as a run of training does
    asked = json.load(sys.stdin)
    # whatever a library prints must not stand before the answers
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    process = start_distributed()
    answers = measure(asked)
    if process.is_first:
        json.dump(answers, answer)
        answer.flush()
