"""`Population` computes the steps of several trials as one program, vmapped over trials.

Each trial is trained by `train` in a thread of its own, as ever: its data, validations, checkpoints and history are
those of a run by itself. Only its step waits until the other trials of its group have theirs, too; then all of them are
computed at once. A trial that ends, fails or is stopped leaves, and its place is computed for nothing until another one
takes it, so that a group is compiled once for the population and once for a trial that is alone.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.config import TrainConfig
from jaxtrain.data.arrays import Reader
from jaxtrain.data.training_data import TrainingData, TrainingSet
from jaxtrain.learn.step import batch_shardings
from jaxtrain.parallel.mesh import replicated
from jaxtrain.runs.rundir import ModelCard
from jaxtrain.shared import RunParts, SharedParts, group_of

__all__ = ["Population", "PopulationSpeed", "make_population_step", "measure_population"]

_TIMED_STEPS = 3


def make_population_step(parts: RunParts, size: int) -> Any:
    """Make the step of `size` trials: a function of their states, batches, keys and numbers, each a tuple.

    It returns a tuple with the new state and the metrics of each trial. The states are donated.

    Args:
        parts: Program and steps of one trial, as `SharedParts` gives them.
        size: Number of trials.
    """
    one: Callable[..., Any] = parts.train.jitted.__wrapped__
    program, whole = parts.program, replicated(parts.program.mesh)

    def together(*arguments: Sequence[Any]) -> tuple[Any, ...]:
        stacked = [jax.tree.map(lambda *leaves: jnp.stack(leaves), *each) for each in arguments]
        found = jax.vmap(one)(*stacked)
        return tuple(jax.tree.map(lambda leaf: leaf[place], found) for place in range(size))  # noqa: B023

    return jax.jit(
        together,
        in_shardings=((program.shardings,) * size, (batch_shardings(program),) * size, whole, whole),
        out_shardings=((program.shardings, whole),) * size,
        donate_argnums=0,
    )


@dataclass(frozen=True)
class _Call:
    """The step of one trial that waits to be computed."""

    state: Any
    batch: Any
    key: jax.Array
    values: Any


@dataclass
class _Group:
    """Trials that share one program, and their steps that wait.

    Attributes:
        one: The compiled step of a trial by itself.
        together: The compiled step of all.
        size: Places of the population.
        always_full: Whether a trial that is alone is computed by the program of all, too.
    """

    one: Any
    together: Any
    size: int
    always_full: bool
    joined: set[int] = field(default_factory=set)
    waiting: dict[int, _Call] = field(default_factory=dict)
    done: dict[int, Any] = field(default_factory=dict)
    ready: threading.Condition = field(default_factory=threading.Condition)

    def step(self, place: int, call: _Call) -> Any:
        """Return state and metrics of a trial, computed as soon as all that have joined have come."""
        with self.ready:
            self.joined.add(place)
            self.waiting[place] = call
            self._compute_if_all_are_here()
            while place not in self.done:
                self.ready.wait()
            found = self.done.pop(place)
        if isinstance(found, Exception):
            raise found
        return found

    def leave(self, place: int) -> None:
        """Remove a trial; the others continue without it."""
        with self.ready:
            self.joined.discard(place)
            self._compute_if_all_are_here()

    def _compute_if_all_are_here(self) -> None:
        if not self.waiting or self.joined - set(self.waiting):
            return
        calls, self.waiting = self.waiting, {}
        try:
            self.done |= self._compute(calls)
        except Exception as error:  # noqa: BLE001  raised in the thread of each trial
            self.done |= dict.fromkeys(calls, error)
        self.ready.notify_all()

    def _compute(self, calls: dict[int, _Call]) -> dict[int, Any]:
        if len(calls) == 1 and not self.always_full:
            ((place, call),) = calls.items()
            return {place: self.one(call.state, call.batch, call.key, call.values)}
        first = next(iter(calls.values()))
        # a free place gets a copy: one array cannot be donated twice
        rows = [calls.get(place) or replace(first, state=jax.tree.map(jnp.copy, first.state))
                for place in range(self.size)]  # fmt: skip
        found = self.together(*(tuple(getattr(row, name) for row in rows)
                                for name in ("state", "batch", "key", "values")))  # fmt: skip
        return {place: found[place] for place in calls}


@dataclass
class Population:
    """Places for trials that are computed together; see the module.

    Attributes:
        shared: Data and compiled steps of the process.
        size: Number of places.
        always_full: Whether every step is computed by the program of all, so that the bits of a trial do not depend on
            how many others are under way.
    """

    shared: SharedParts
    size: int
    always_full: bool = False
    _groups: dict[str, _Group] = field(default_factory=dict)
    _guard: threading.Lock = field(default_factory=threading.Lock)

    @contextlib.contextmanager
    def member(self, place: int) -> Iterator[_Member]:
        """Yield what `train` shares of the trial at a place, 0 … size - 1; the trial leaves at the end of the block."""
        member = _Member(self, place)
        try:
            yield member
        finally:
            if member.group is not None:
                member.group.leave(place)

    def group_of(self, card: ModelCard, config: TrainConfig, parts: RunParts) -> _Group:
        """Return the group of a run."""
        key = group_of(card, config)
        with self._guard:
            if key not in self._groups:
                together = self.shared.together(key, self.size, lambda: make_population_step(parts, self.size))
                self._groups[key] = _Group(parts.train.jitted, together, self.size, self.always_full)
            return self._groups[key]

    def compiled(self) -> dict[str, int]:
        """Return how many times the step of the whole population was compiled, for each group."""
        return {key: int(group.together._cache_size()) for key, group in self._groups.items()}


@dataclass
class _Member:
    """The interface of a population for `train`, for the trial at one place."""

    population: Population
    place: int
    group: _Group | None = None

    @property
    def stop(self) -> threading.Event:
        return self.population.shared.stop

    def open(self, url: str | Sequence[str]) -> TrainingData:
        return self.population.shared.open(url)

    def kept(self, ready: TrainingSet, config: TrainConfig, make: Callable[[], Reader]) -> Reader:
        return self.population.shared.kept(ready, config, make)

    def parts_of(self, card: ModelCard, config: TrainConfig) -> RunParts:
        parts = self.population.shared.parts_of(card, config)
        if parts.program.layout is not None:
            return parts
        group = self.group = self.population.group_of(card, config, parts)

        def step(state: Any, batch: Any, key: jax.Array, values: Any) -> Any:
            if isinstance(key, jax.core.Tracer):  # `rehearse` asks for shapes alone
                return parts.train.jitted(state, batch, key, values)
            return group.step(self.place, _Call(state, batch, key, values))

        return replace(parts, train=replace(parts.train, jitted=step))


@dataclass(frozen=True)
class PopulationSpeed:
    """The result of a short measurement of a population.

    Attributes:
        device: Kind of the device.
        size: Number of trials.
        alone_s: Seconds of a step of one trial by itself.
        together_s: Seconds of a step of all trials; None where the device has no room for them.
    """

    device: str
    size: int
    alone_s: float
    together_s: float | None

    @property
    def is_faster(self) -> bool:
        """Whether the trials are computed sooner together than one after the other."""
        return self.together_s is not None and self.together_s < self.size * self.alone_s

    def words(self) -> str:
        """Return one line."""
        if self.together_s is None:
            return f"population of {self.size} on {self.device}: no room for it"
        return (
            f"population of {self.size} on {self.device}: a step takes {1000 * self.together_s:.0f} ms, "
            f"{self.size} steps one after the other {1000 * self.size * self.alone_s:.0f} ms"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {**asdict(self), "is_faster": self.is_faster}


def measure_population(parts: RunParts, ready: TrainingSet, size: int, together_step: Any) -> PopulationSpeed:
    """Time a step of one trial and a step of a population, on images of the training part.

    Args:
        parts: Program and steps of a run.
        ready: Its training data.
        size: Number of trials.
        together_step: Result of `make_population_step`.
    """
    run = parts.program.config.run
    rows = ready.plan.parts["train"].rows
    sample = ready.reader.read(np.resize(rows, (run.batch_size, *rows.shape[1:])))
    batch = {name: sample[name] for name in parts.train.names or sample}
    key, values = jax.random.key(0), parts.train.values[0]

    def states(number: int) -> tuple[Any, ...]:
        first = parts.program.init(jax.random.key(0))
        return (first, *(jax.tree.map(jnp.copy, first) for _ in range(number - 1)))

    def alone(state: tuple[Any, ...]) -> tuple[Any, ...]:
        return (parts.train.jitted(state[0], batch, key, values)[0],)

    def together(state: tuple[Any, ...]) -> tuple[Any, ...]:
        found = together_step(state, (batch,) * size, (key,) * size, (values,) * size)
        return tuple(each[0] for each in found)

    device = parts.program.mesh.devices.flat[0].device_kind
    alone_s = _seconds(alone, states(1))
    try:
        return PopulationSpeed(device, size, alone_s, _seconds(together, states(size)))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return PopulationSpeed(device, size, alone_s, None)


def _seconds(step: Callable[[tuple[Any, ...]], tuple[Any, ...]], state: tuple[Any, ...]) -> float:
    """Return the shortest time of a step, after the one that compiles it."""
    state = step(state)
    jax.block_until_ready(state)  # type: ignore[no-untyped-call]  # of jax
    times = []
    for _ in range(_TIMED_STEPS):
        began = time.perf_counter()
        state = step(state)
        jax.block_until_ready(state)  # type: ignore[no-untyped-call]  # of jax
        times.append(time.perf_counter() - began)
    return min(times)
