"""The state that training changes (`TrainState`), and the parts that stay fixed (`Program`).

The module is split once: `Program` keeps its structure, the state is a plain pytree of nested dicts with string keys
that every mesh rule, checkpoint and report can walk. Initialisation never holds an array unsharded: shapes by
`eval_shape`, shardings from the rule table, then a jitted init whose outputs already lie where they belong (in
a pipeline, one for each group of devices).

Randomness is not state: dropout draws from the key that a step is given, so a run resumes from (seed, step) alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpy.typing import ArrayLike, NDArray

from jaxtrain.config import TrainConfig
from jaxtrain.data.task import Task
from jaxtrain.learn.objective import Objective
from jaxtrain.learn.optim import build_optimizer, build_schedule
from jaxtrain.models import PER_PIXEL, build_model
from jaxtrain.models.dropout import dropout_rate
from jaxtrain.models.modality import Modality, view_count
from jaxtrain.models.precision import run_model, set_precision
from jaxtrain.models.units import FUSION, Carry, Unit, is_owned, streams_of, units_of
from jaxtrain.parallel.links import absent, everywhere, init_by_group, is_here, part_of, shape_of
from jaxtrain.parallel.mesh import constrain, replicated
from jaxtrain.parallel.placement import Streams, check_groups, place_branches, place_stages
from jaxtrain.parallel.schedule import balance_cuts
from jaxtrain.parallel.sharding import check_split, partition_specs, path_name
from jaxtrain.parallel.spatial import over_space
from jaxtrain.parallel.stages import Layout, estimate, lay_out, measure
from jaxtrain.parallel.zero import gather_for_use, share_out
from jaxtrain.traced import NUMBERS, numbers_of, with_numbers
from zarr_store.errors import InvalidInput

__all__ = ["Program", "TrainState", "build_program", "data_numbers"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """The part of a checkpoint that belongs to the model; a pytree."""

    step: Any
    """Number of steps taken, int32 scalar."""
    params: Any
    """Nested dict of float32 arrays; convolution kernels are HWIO."""
    model_state: Any
    """Nested dict of batch statistics; empty for the norm `group`."""
    opt_state: Any
    """The optax state."""


@dataclass(frozen=True)
class Program:
    """The parts of a run that are fixed once configuration, data and mesh are known; made by `build_program`."""

    config: TrainConfig
    channels: int
    classes: int
    mesh: Mesh
    mean: NDArray[np.float32]
    """Mean of each band (C,), in units of the stored image."""
    std: NDArray[np.float32]
    """Standard deviation of each band (C,); 1 for a constant band."""
    class_weights: NDArray[np.float32] | None
    objective: Objective
    """Task, loss and counts of the evaluation."""
    optimizer: optax.GradientTransformationExtraArgs
    schedule: optax.Schedule
    graphdef: Any
    templates: tuple[Any, Any, Any]
    """Abstract NNX states of parameters, batch statistics and random streams, from which a module is built again."""
    shapes: TrainState
    """The state as `jax.ShapeDtypeStruct`."""
    shardings: TrainState
    """The state as `NamedSharding`, for checkpoints."""
    whole: Any
    """Shardings of the parameters that the network uses: not split over `data`."""
    parts: Any
    """Shardings of the parameters that the optimiser updates: split over `data` with `mesh.zero`."""
    layout: Layout | None
    """Cuts of the pipeline; None without a pipeline."""
    modalities: tuple[Modality, ...]
    """What each branch of the network multimodal gets; none of other networks."""
    _init: Callable[[jax.Array], TrainState]

    def init(self, key: jax.Array) -> TrainState:
        """Make a new state on the mesh; the same key gives the same numbers on every mesh."""
        # LLVM spends seconds on random numbers that are drawn once; at level 1 the same bits come seven times sooner
        on_cpu, name = self.mesh.devices.flat[0].platform == "cpu", "xla_backend_optimization_level"
        chosen = name in os.environ.get("XLA_FLAGS", "")  # a level that is asked for holds here, too
        options = {name: 1} if on_cpu and not chosen else None
        if self.layout is not None:
            placed: TrainState = init_by_group(self._init, self.shapes, self.shardings, key, options)
            return placed
        state: TrainState = jax.jit(self._init, out_shardings=self.shardings, compiler_options=options)(key)
        return state

    @property
    def saved_shardings(self) -> TrainState:
        """Shardings of the arrays of a checkpoint; each process must see a part of every array."""
        if self.layout is None or all(map(is_here, self.layout.groups)):
            return self.shardings
        found: TrainState = jax.tree.map(lambda at: NamedSharding(self.mesh, at.spec), self.shardings)
        return found

    def to_save(self, state: TrainState) -> TrainState:
        """Return the state in `saved_shardings`; in a pipeline across processes, each gets the parts it lacks.

        All processes call it together.
        """
        if self.saved_shardings is self.shardings:
            return state
        leaves, structure = jax.tree.flatten(state)
        whole: TrainState = jax.tree.unflatten(structure, everywhere(leaves, self.mesh))
        return whole

    def of_saved(self, state: TrainState) -> TrainState:
        """Turn a saved state, as `to_save` returns it, into the state of training."""
        if self.saved_shardings is self.shardings:
            return state

        def place(leaf: jax.Array, at: Any) -> jax.Array:
            if at.mesh == self.mesh:
                return leaf
            return part_of(leaf, at.mesh, at.spec) if is_here(at.mesh) else absent(leaf.shape, leaf.dtype, at)

        placed: TrainState = jax.tree.map(place, state, self.shardings)
        return placed

    def apply_units(
        self,
        params: Mapping[str, Any],
        statistics: Mapping[str, Any],
        carry: Carry,
        *,
        span: tuple[int, int],
        train: bool,
        key: jax.Array,
    ) -> tuple[Carry, dict[str, Any]]:
        """Run some units of the network, those from `span[0]` to before `span[1]`, inside a jitted function.

        Args:
            params: Parameters that the units own, by path.
            statistics: Batch statistics that the units own, by path.
            carry: Input of the first unit.
            span: which units.
            train: use and update batch statistics, drop out.
            key: Random key for dropout.

        Returns:
            The carry after the last of them (of the network's last unit: the float32 logits), and their statistics.
        """
        abstract = (self.shapes.params, self.shapes.model_state)
        states = [
            _like(template, list(({**_by_path(shapes), **mine}).values()))
            for template, shapes, mine in zip(self.templates, abstract, (params, statistics), strict=False)
        ]
        model = nnx.merge(self.graphdef, *states, _reseed(self.templates[2], key))
        carry = (set_precision(model, carry[0], self.config.model), *carry[1:])
        units = units_of(model)
        for unit in units[slice(*span)]:
            carry = unit.run(carry, train)
        if span[1] == len(units):
            carry = (carry[0].astype(jnp.float32),)
        found = _by_path(_plain(nnx.state(model, nnx.BatchStat)))
        return carry, {name: found[name] for name in statistics}

    def apply(
        self, params: Any, model_state: Any, x_BHWC: Any, *, train: bool, key: jax.Array | None = None
    ) -> tuple[jax.Array, Any]:
        """Run the network inside a jitted function.

        Args:
            params: Parameters, as in the state.
            model_state: Batch statistics, as in the state.
            x_BHWC: normalised float32 image; of several modalities a dict of one for each.
            train: use and update batch statistics, drop out.
            key: Random key for dropout; needed if `train` and `model.dropout` are set.

        Returns:
            Logits, (B, H, W, K) or, of one answer per image, (B, K), float32; and the new model_state.
        """
        if train and key is None and self.config.model.dropout:
            raise InvalidInput("a training step with model.dropout needs a key")
        start = jax.random.key(0) if key is None else key

        def run(params: Any, model_state: Any, x_BHWC: Any) -> tuple[jax.Array, Any]:
            streams = _reseed(self.templates[2], start)  # made in here: `zero = 3` computes this function again
            model = nnx.merge(
                self.graphdef, _like(self.templates[0], params), _like(self.templates[1], model_state), streams
            )
            with over_space(self.mesh), dropout_rate(self.config.model.dropout):
                logits = run_model(model, x_BHWC, train=train, config=self.config.model)
            return logits, _plain(nnx.state(model, nnx.BatchStat))

        if self.config.mesh.zero == 3:
            run = gather_for_use(run, self.whole)
        return run(params, model_state, x_BHWC)

    def embed(self, params: Any, model_state: Any, x_BHWC: jax.Array) -> jax.Array:
        """Return the code of an autoencoder inside a jitted function, float32 (B, H', W', Z)."""
        streams = _reseed(self.templates[2], jax.random.key(0))
        states = (_like(self.templates[0], params), _like(self.templates[1], model_state), streams)
        model = nnx.merge(self.graphdef, *states)
        with over_space(self.mesh):
            code: jax.Array = model.embed(set_precision(model, x_BHWC, self.config.model))
        return code.astype(jnp.float32)

    def values(self) -> dict[str, Any]:
        """Return what a step can take as arguments (`with_values`): numbers of the configuration, and of the data."""
        weights = {} if self.class_weights is None else {"class_weights": self.class_weights}
        return {**numbers_of(self.config), "mean": self.mean, "std": self.std, **weights}

    def with_values(self, values: Mapping[str, Any]) -> Program:
        """Return the program with other values, which may be arguments of the function that is traced.

        Args:
            values: As `values` returns them, of a run whose configuration differs in its numbers alone.
        """
        numbers = {name: value for name, value in values.items() if name in NUMBERS}
        config, weights = with_numbers(self.config, numbers), values.get("class_weights")
        return replace(
            self, config=config, mean=values["mean"], std=values["std"], class_weights=weights,
            objective=replace(self.objective, optim=config.optim, class_weights=weights),
            optimizer=build_optimizer(config.optim, config.run.steps),
            schedule=build_schedule(config.optim, config.run.steps),
        )  # fmt: skip

    @property
    def views(self) -> int:
        """Number of answers of a training step for each sample: of all modalities together, and of each alone."""
        return view_count(self.modalities, self.config.model)

    def entry(self, branch: str) -> tuple[int, ...]:
        """Return the shape of the input of a branch, without the samples."""
        one = next(one for one in self.modalities if one.name == branch)
        side = self.config.data.patch // one.ratio
        return (side, side, *((one.dates,) if one.dates else ()), one.inputs)

    def share(self, gradient: Any) -> Any:
        """Return the gradient for the optimiser, inside a jitted function; `mesh.zero` splits it over replicas."""
        if not self.config.mesh.zero:
            return gradient
        return constrain(gradient, self.parts)


def build_program(
    config: TrainConfig,
    *,
    channels: int,
    classes: int,
    mesh: Mesh,
    mean: ArrayLike,
    std: ArrayLike,
    class_weights: ArrayLike | None = None,
    task: Task | None = None,
    modalities: Sequence[Modality] = (),
) -> Program:
    """Fix shapes, shardings and optimiser of a run; no array is made on a device.

    Args:
        config: the whole configuration; `model`, `optim`, `mesh.rules` and `run.steps` matter here.
        channels: bands of the image.
        classes: Number of classes.
        mesh: Result of `parallel.mesh.make_mesh`.
        mean: per band (C,), in stored units.
        std: per band (C,), in stored units; 0 (a constant band) counts as 1.
        class_weights: per class (K,), positive; only their ratios matter.
        modalities: What each branch of the network multimodal gets; `mean` and `std` have the bands of one after the
            other.
        task: what is answered; one class per pixel where none is given, per image by a network that knows nothing else.

    Raises:
        InvalidInput: shapes or values do not fit, or a sharding rule cannot be applied.
    """
    numbers = data_numbers(mean, std, class_weights, channels=channels, classes=classes)
    weights_K = numbers.get("class_weights")
    if task is None:
        task = Task(per_image=config.model.name not in PER_PIXEL)
    objective = Objective(task, config.optim, weights_K)

    def build(key: jax.Array) -> nnx.Module:
        params_key, dropout_key = jax.random.split(key)
        return build_model(
            config.model,
            channels=channels,
            classes=classes,
            rngs=nnx.Rngs(params=params_key, dropout=dropout_key),
            data_shards=mesh.shape["data"],
            per_image=task.per_image,
            values=task.values,
            modalities=modalities,
        )

    optimizer = build_optimizer(config.optim, config.run.steps)

    def init(key: jax.Array) -> TrainState:
        model = build(key)
        params = _plain(nnx.state(model, nnx.Param))
        statistics = _plain(nnx.state(model, nnx.BatchStat))
        return TrainState(jnp.zeros((), jnp.int32), params, statistics, optimizer.init(params))

    abstract = nnx.eval_shape(lambda: build(jax.random.key(0)))
    graphdef, *states = nnx.split(abstract, nnx.Param, nnx.BatchStat, nnx.RngState)
    templates = (states[0], states[1], states[2])
    shapes = jax.eval_shape(init, jax.eval_shape(lambda: jax.random.key(0)))
    program = Program(
        config=config,
        channels=channels,
        classes=classes,
        mesh=mesh,
        mean=numbers["mean"],
        std=numbers["std"],
        class_weights=weights_K,
        objective=objective,
        optimizer=optimizer,
        schedule=build_schedule(config.optim, config.run.steps),
        graphdef=graphdef,
        templates=templates,
        shapes=shapes,
        shardings=shapes,  # until the layout is known
        whole=None,
        parts=None,
        layout=None,
        modalities=tuple(modalities),
        _init=init,
    )
    layout = None if config.mesh.pipe == 1 else _cut(program, abstract)
    shardings, whole, parts = _shardings(config, mesh, optimizer, shapes, layout)
    return replace(program, shardings=shardings, whole=whole, parts=parts, layout=layout)


def data_numbers(
    mean: ArrayLike, std: ArrayLike, class_weights: ArrayLike | None, *, channels: int, classes: int
) -> dict[str, NDArray[np.float32]]:
    """Return mean, spread and class weights as a program keeps them; arguments and errors as of `build_program`."""
    mean_C, std_C = _vector("mean", mean, channels), _vector("std", std, channels)
    if (std_C < 0).any():
        raise InvalidInput(f"std must not be negative, got {std_C.tolist()}")
    numbers = {"mean": mean_C, "std": np.where(std_C > 0, std_C, np.float32(1))}
    if class_weights is not None:
        weights_K = _vector("class_weights", class_weights, classes)
        if (weights_K < 0).any() or not weights_K.any():
            raise InvalidInput(f"class weights must be positive, got {weights_K.tolist()}")
        numbers["class_weights"] = weights_K
    return numbers


def _cut(program: Program, abstract: Any) -> Layout:
    """Choose the parts of the network and their groups, from the costs of its units or as the placement says."""
    config = program.config
    if streams := streams_of(abstract):
        return _place(program, streams)
    if config.placement.kind == "branches":
        raise InvalidInput(
            f"placement.kind = 'branches', but model.name = {config.model.name!r} has no branches: use 'replicated', "
            "'stages' or 'filters', or model.name = 'multimodal'"
        )
    if not hasattr(abstract, "units"):
        raise InvalidInput(f"mesh.pipe cuts cnn per pixel, resnet and unet, not {config.model.name}: use mesh.pipe = 1")
    units: list[Unit] = abstract.units()
    balance_cuts([1.0] * len(units), config.mesh.parts)  # refused before anything is measured
    side = config.data.patch
    costs, _ = _costs(program, units, 0, (_image(program, (side, side, program.channels)),))
    names = [*_by_path(program.shapes.params), *_by_path(program.shapes.model_state)]
    return lay_out(program.mesh, units, names, _agreed(config, costs), chunks=config.mesh.parts)


def _place(program: Program, units: Mapping[str, list[Unit]]) -> Layout:
    """Place a network with branches on groups of devices."""
    config, mesh = program.config, program.mesh
    if config.mesh.schedule == "interleaved":
        raise InvalidInput(
            "mesh.schedule = 'interleaved' is for a network without branches: use '1f1b' with this one, or more parts "
            "in placement.groups"
        )
    groups = config.placement.groups if config.placement.kind == "branches" else ()
    branches = [name for name in units if name != FUSION]
    if groups:
        check_groups(groups, branches)  # refused before anything is measured
    costs: dict[str, list[float]] = {}
    joined: tuple[Any, ...] = ()
    position = 0
    for name, several in units.items():
        entered = joined if name == FUSION else (_image(program, program.entry(name)),)
        costs[name], out = _costs(program, several, position, entered)
        joined += out
        position += len(several)
    flat = _agreed(config, [cost for several in costs.values() for cost in several])
    agreed = {name: [flat.pop(0) for _ in several] for name, several in costs.items()}
    names = [*_by_path(program.shapes.params), *_by_path(program.shapes.model_state)]
    streams = Streams(units, agreed)
    if groups:
        return place_branches(mesh, streams, names, groups)
    return place_stages(mesh, streams, names, config.mesh.pipe)


def _image(program: Program, shape: Sequence[int]) -> Any:
    """Return the shape of an input of a microbatch."""
    config = program.config
    return shape_of((config.run.batch_size // config.mesh.microbatches, *shape), jnp.float32)


def _costs(program: Program, units: Sequence[Unit], first: int, carry: Any) -> tuple[list[float], Any]:
    """Return the cost of each of some units that follow each other, and the shapes of what the last one gives."""
    params, statistics = _by_path(program.shapes.params), _by_path(program.shapes.model_state)
    costs = []
    for position, unit in enumerate(units, start=first):
        mine = [{n: leaf for n, leaf in tree.items() if is_owned(n, unit)} for tree in (params, statistics)]

        def run(params: Any, carry: Any, at: int = position, statistics: Any = mine[1]) -> Carry:
            kept = jax.tree.map(jnp.ones_like, statistics)
            return program.apply_units(params, kept, carry, span=(at, at + 1), train=True, key=jax.random.key(0))[0]

        cost_of = measure if program.config.mesh.balance == "measured" else estimate
        costs.append(cost_of(run, mine[0], carry))
        carry = jax.eval_shape(run, mine[0], carry)
    return costs, carry


def _agreed(config: TrainConfig, costs: list[float]) -> list[float]:
    """Return costs that all processes share, as all must cut alike."""
    if config.mesh.balance == "measured" and jax.process_count() > 1:
        found: list[float] = multihost_utils.broadcast_one_to_all(np.asarray(costs, np.float32)).tolist()
        return found
    return costs


def _shardings(
    config: TrainConfig,
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    shapes: TrainState,
    layout: Layout | None,
) -> tuple[TrainState, Any, Any]:
    """Return the shardings of the state, of the parameters in use, and of those that the optimiser updates."""

    def names(tree: Any) -> list[str]:
        return [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]

    rules = config.mesh.rules
    where = mesh if layout is None else layout.groups[0]
    params = partition_specs(shapes.params, where, rules, known=names(shapes.model_state))
    check_split(shapes.params, params, where)
    statistics = partition_specs(shapes.model_state, where, rules, known=names(shapes.params))
    parts = share_out(shapes.params, params, where) if config.mesh.zero else params

    def place(tree: Any) -> Any:
        def at(path: Any, lies: PartitionSpec) -> NamedSharding:
            home = mesh if layout is None else layout.mesh(layout.owner[path_name(path)])
            return NamedSharding(home, lies)

        return jax.tree_util.tree_map_with_path(at, tree, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))

    whole, shared = place(params), place(parts)

    def absent(leaf: Any) -> bool:  # a parameter that another part of the optimiser steps has no moment in this one
        return isinstance(leaf, optax.MaskedNode)

    # moments lie as the optimiser changes their parameters; counters are whole everywhere
    moments = optax.tree.map_params(
        optimizer,
        lambda leaf, lies: leaf if absent(leaf) else lies,
        shapes.opt_state,
        shared,
        transform_non_params=lambda _: replicated(mesh),
        is_leaf=absent,
    )
    used = shared if config.mesh.zero == 3 else whole
    return TrainState(replicated(mesh), used, place(statistics), moments), whole, shared


def _vector(name: str, values: ArrayLike, size: int) -> NDArray[np.float32]:
    vector = np.asarray(values, np.float32)
    if vector.shape != (size,) or not np.isfinite(vector).all():
        raise InvalidInput(f"{name} must be {size} finite numbers, got shape {vector.shape}: {vector.tolist()}")
    return vector


def _by_path(tree: Any) -> dict[str, Any]:
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _plain(state: Any) -> Any:
    """Turn an NNX state into nested dicts of arrays."""
    return nnx.to_pure_dict(state)


def _like(template: Any, plain: Any) -> Any:
    """Turn nested dicts of arrays into an NNX state; both sort their keys, so the leaves come in one order."""
    return jax.tree.unflatten(jax.tree.structure(template), jax.tree.leaves(plain))


def _reseed(template: Any, key: jax.Array) -> Any:
    """Return random streams that start at `key`, a different one for each layer."""
    leaves, structure = jax.tree.flatten(template)
    fresh = [
        jax.random.fold_in(key, position)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        else jnp.zeros(leaf.shape, leaf.dtype)
        for position, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, fresh)
