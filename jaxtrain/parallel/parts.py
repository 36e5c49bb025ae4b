"""`Parts` divides the state of a network among the parts of a pipeline, and joins it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import optax
from jax.sharding import Mesh

from jaxtrain.config import TrainConfig
from jaxtrain.models.units import Carry
from jaxtrain.parallel.links import join
from jaxtrain.parallel.mesh import replicated
from jaxtrain.parallel.sharding import path_name
from jaxtrain.parallel.stages import Layout

__all__ = ["Changed", "Held", "Objective", "Parts", "PipelinedProgram", "State", "Tree"]

Tree = dict[str, Any]
"""Arrays by path."""


class State(Protocol):
    """The state of training, of the whole network; `TrainState` is one."""

    @property
    def step(self) -> Any:
        """Steps done."""

    @property
    def params(self) -> Any:
        """All parameters."""

    @property
    def model_state(self) -> Any:
        """All batch statistics."""

    @property
    def opt_state(self) -> Any:
        """The state of the optimiser."""


class Objective(Protocol):
    """Loss and counts of a task; `jaxtrain.learn.objective.Objective` is one."""

    @property
    def score(self) -> str:
        """Name of the metric that `right` counts for."""

    @property
    def task(self) -> Any:
        """Task of the network."""

    def blend(self, logits: jax.Array, labels: Sequence[tuple[jax.Array, jax.Array]]) -> Any:
        """Return the loss, weight and number of labelled pixels, of several labels with their shares."""

    def right(self, logits: jax.Array, label: jax.Array) -> jax.Array:
        """Return the number of right predictions."""

    def sums(self, logits: jax.Array, label: jax.Array) -> dict[str, jax.Array]:
        """Return the sums for an evaluation."""

    def answer(self, logits: jax.Array) -> jax.Array:
        """Return the predictions from logits."""


class PipelinedProgram(Protocol):
    """The parts of a program that a pipeline needs; `Program` is one."""

    @property
    def config(self) -> TrainConfig:
        """The whole configuration."""

    @property
    def classes(self) -> int:
        """Number of classes."""

    @property
    def mesh(self) -> Mesh:
        """All devices."""

    @property
    def layout(self) -> Layout | None:
        """Cuts of the network."""

    @property
    def objective(self) -> Objective:
        """Loss and counts of the task."""

    @property
    def views(self) -> int:
        """Answers for each sample of a training step."""

    @property
    def schedule(self) -> optax.Schedule:
        """Learning rate of each step."""

    @property
    def shapes(self) -> State:
        """Shapes of the state."""

    @property
    def shardings(self) -> State:
        """Shardings of the state."""

    @property
    def whole(self) -> Any:
        """Shardings of the parameters in use."""

    @property
    def parts(self) -> Any:
        """Shardings of the parameters that the optimiser updates."""

    def apply_units(
        self, params: Mapping[str, Any], statistics: Mapping[str, Any], carry: Carry, *, span: tuple[int, int],
        train: bool, key: jax.Array,
    ) -> tuple[Carry, dict[str, Any]]:  # fmt: skip
        """Run some units of the network."""


class Held(NamedTuple):
    """Parameters and batch statistics of one part, by path."""

    params: Tree
    statistics: Tree


class Changed(NamedTuple):
    """One part after an update."""

    params: Tree
    opt: list[Any]
    """Leaves of the optimiser's state, in the order of `Parts.opt_names`."""
    statistics: Tree


class Parts:
    """The assignment of the leaves of the state to the parts.

    Args:
        program: Gives shapes and places.
        layout: Gives the part of each parameter.
        optimizer: Optimiser, whose state is cut as well.
    """

    def __init__(self, program: PipelinedProgram, layout: Layout, optimizer: optax.GradientTransformation) -> None:
        chunks = range(layout.chunks)
        self._program, self._layout = program, layout
        self._names = [[n for n, at in layout.owner.items() if at == chunk] for chunk in chunks]
        self.shapes = [Held(self.of(program.shapes.params, k), self.of(program.shapes.model_state, k)) for k in chunks]
        self._opt = [jax.eval_shape(optimizer.init, held.params) for held in self.shapes]
        self.opt_names = [
            [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)] for tree in self._opt
        ]
        self._counters = {
            path_name(path)
            for path, lies in jax.tree_util.tree_leaves_with_path(program.shardings.opt_state)
            if lies.mesh == program.mesh
        }

    def of(self, tree: Any, k: int) -> Tree:
        """Return the leaves of one part, by path."""
        found = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        return {name: found[name] for name in self._names[k] if name in found}

    def held(self, state: State, k: int) -> Held:
        """Return parameters and batch statistics of one part."""
        return Held(self.of(state.params, k), self.of(state.model_state, k))

    def opt_of(self, opt_state: Any, k: int) -> tuple[list[Any], list[Any]]:
        """Return the leaves of the optimiser's state for one part: its moments, and all counters."""
        found = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(opt_state)}
        leaves = [found[name] for name in self.opt_names[k]]
        alike = list(zip(self.opt_names[k], leaves, strict=True))
        return [v for n, v in alike if n not in self._counters], [v for n, v in alike if n in self._counters]

    def opt_state(self, k: int, moments: Any, counters: Any) -> Any:
        """Build the optimiser's state of one part from moments and counters."""
        return jax.tree.unflatten(jax.tree.structure(self._opt[k]), self._merge(k, moments, counters))

    def _merge(self, k: int, moments: Any, counters: Any) -> list[Any]:
        own, common = iter(moments), iter(counters)
        return [next(common if name in self._counters else own) for name in self.opt_names[k]]

    def homes(self, k: int) -> Changed:
        """Return the shardings after an update: parameters, leaves of the optimiser's state, batch statistics."""
        lies = self._program.shardings
        moments, counters = self.opt_of(lies.opt_state, k)
        opt = self._merge(k, moments, [replicated(self._layout.mesh(k)) for _ in counters])
        return Changed(self.of(lies.params, k), opt, self.of(lies.model_state, k))

    def whole(self, before: Any, changed: Mapping[int, Changed], step: jax.Array) -> Any:
        """Join the state of the whole network from its parts; of other processes only places are known."""
        found: dict[str, Any] = {"step": step}
        copies: dict[str, dict[int, jax.Array]] = {}
        for k, part in changed.items():
            found |= {f"params/{name}": leaf for name, leaf in part.params.items()}
            found |= {f"model_state/{name}": leaf for name, leaf in part.statistics.items()}
            for name, leaf in zip(self.opt_names[k], part.opt, strict=True):
                if name in self._counters:
                    copies.setdefault(name, {})[self._layout.homes[k]] = leaf
                else:
                    found[f"opt_state/{name}"] = leaf
        for name, by_group in copies.items():
            parts = list(by_group.values())
            found[f"opt_state/{name}"] = join(parts, replicated(self._program.mesh), parts[0].shape)
        return jax.tree_util.tree_map_with_path(lambda at, old: found.get(path_name(at), old), before)
