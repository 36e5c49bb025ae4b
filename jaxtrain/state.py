"""What training changes (`TrainState`), and what it does not (`Program`).

The module is split once: `Program` keeps its structure, the state is a plain pytree of nested dicts with string keys
that every mesh rule, checkpoint and report can walk. Initialisation never holds an array unsharded: shapes by
`eval_shape`, shardings from the rule table, then one jitted init whose outputs already lie where they belong.

Randomness is not state: dropout draws from the key that a step is given, so a run resumes from (seed, step) alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpy.typing import ArrayLike, NDArray

from jaxtrain.config import TrainConfig
from jaxtrain.models import build_model
from jaxtrain.optim import build_optimizer, build_schedule
from jaxtrain.parallel.mesh import constrain, spec
from jaxtrain.parallel.sharding import partition_specs, path_name
from jaxtrain.parallel.spatial import over_space
from jaxtrain.parallel.zero import gather_for_use, share_out
from zarr_store.errors import InvalidInput

__all__ = ["Program", "TrainState", "build_program"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that a checkpoint holds of the model; a pytree."""

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
    """Per band (C,), in units of the stored image."""
    std: NDArray[np.float32]
    """Per band (C,); 1 where a band is constant."""
    class_weights: NDArray[np.float32] | None
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    graphdef: Any
    templates: tuple[Any, Any, Any]
    """Abstract NNX states of parameters, batch statistics and random streams, to put a module together again."""
    shapes: TrainState
    """The state as `jax.ShapeDtypeStruct`."""
    shardings: TrainState
    """The state as `NamedSharding`; feed it to checkpoints."""
    whole: Any
    """Shardings of the parameters as the network uses them: not shared out over `data`."""
    parts: Any
    """Shardings of the parameters as the optimiser changes them: shared out with `mesh.zero`."""
    _init: Callable[[jax.Array], TrainState]

    def init(self, key: jax.Array) -> TrainState:
        """A new state on the mesh; the same key gives the same numbers on every mesh."""
        # LLVM spends seconds on random numbers that are drawn once; at level 1 the same bits come seven times sooner
        on_cpu = self.mesh.devices.flat[0].platform == "cpu"
        options = {"xla_backend_optimization_level": 1} if on_cpu else None
        state: TrainState = jax.jit(self._init, out_shardings=self.shardings, compiler_options=options)(key)
        return state

    def apply(
        self, params: Any, model_state: Any, x_BHWC: jax.Array, *, train: bool, key: jax.Array | None = None
    ) -> tuple[jax.Array, Any]:
        """Run the network inside a jitted function.

        Args:
            params: as in the state.
            model_state: as in the state.
            x_BHWC: normalised float32 image.
            train: use and update batch statistics, drop out.
            key: for dropout; needed where `train` and `model.dropout` are set.

        Returns:
            logits_BHWK and the new model_state.
        """
        if train and key is None and self.config.model.dropout:
            raise InvalidInput("a training step with model.dropout needs a key")
        streams = _reseed(self.templates[2], jax.random.key(0) if key is None else key)

        def run(params: Any, model_state: Any, x_BHWC: jax.Array) -> tuple[jax.Array, Any]:
            model = nnx.merge(
                self.graphdef, _like(self.templates[0], params), _like(self.templates[1], model_state), streams
            )
            with over_space(self.mesh):
                logits = model(x_BHWC, train=train)
            return logits, _plain(nnx.state(model, nnx.BatchStat))

        if self.config.mesh.zero == 3:
            run = gather_for_use(run, self.whole)
        return run(params, model_state, x_BHWC)

    def share(self, gradient: Any) -> Any:
        """The gradient as the optimiser takes it, inside a jitted function: with `mesh.zero`, each replica its part."""
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
) -> Program:
    """Fix shapes, shardings and optimiser of a run; no array is made on a device.

    Args:
        config: the whole configuration; `model`, `optim`, `mesh.rules` and `run.steps` matter here.
        channels: bands of the image.
        classes: number of classes.
        mesh: from `parallel.mesh.make_mesh`.
        mean: per band (C,), in stored units.
        std: per band (C,), in stored units; 0 (a constant band) counts as 1.
        class_weights: per class (K,), positive; only their ratios matter.

    Raises:
        InvalidInput: shapes or values do not fit, or a sharding rule cannot be applied.
    """
    mean_C = _vector("mean", mean, channels)
    std_C = _vector("std", std, channels)
    if (std_C < 0).any():
        raise InvalidInput(f"std must not be negative, got {std_C.tolist()}")
    weights_K = None if class_weights is None else _vector("class_weights", class_weights, classes)
    if weights_K is not None and ((weights_K < 0).any() or not weights_K.any()):
        raise InvalidInput(f"class weights must be positive, got {weights_K.tolist()}")

    def build(key: jax.Array) -> nnx.Module:
        params_key, dropout_key = jax.random.split(key)
        return build_model(
            config.model,
            channels=channels,
            classes=classes,
            rngs=nnx.Rngs(params=params_key, dropout=dropout_key),
            data_shards=mesh.shape["data"],
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
    shardings, whole, parts = _shardings(config, mesh, optimizer, shapes)
    return Program(
        config=config,
        channels=channels,
        classes=classes,
        mesh=mesh,
        mean=mean_C,
        std=np.where(std_C > 0, std_C, np.float32(1)),
        class_weights=weights_K,
        optimizer=optimizer,
        schedule=build_schedule(config.optim, config.run.steps),
        graphdef=graphdef,
        templates=templates,
        shapes=shapes,
        shardings=shardings,
        whole=whole,
        parts=parts,
        _init=init,
    )


def _shardings(
    config: TrainConfig, mesh: Mesh, optimizer: optax.GradientTransformation, shapes: TrainState
) -> tuple[TrainState, Any, Any]:
    """Of the state, of the parameters in use, and of the parameters as the optimiser changes them."""

    def names(tree: Any) -> list[str]:
        return [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]

    rules = config.mesh.rules
    params = partition_specs(shapes.params, mesh, rules, known=names(shapes.model_state))
    statistics = partition_specs(shapes.model_state, mesh, rules, known=names(shapes.params))
    parts = share_out(shapes.params, params, mesh) if config.mesh.zero else params
    # moments lie as the optimiser changes their parameters; counters are whole everywhere
    moments = optax.tree.map_params(
        optimizer, lambda _, lies: lies, shapes.opt_state, parts, transform_non_params=lambda _: spec()
    )
    specs = TrainState(spec(), parts if config.mesh.zero == 3 else params, statistics, moments)
    placed: tuple[TrainState, Any, Any] = jax.tree.map(
        lambda leaf: NamedSharding(mesh, leaf), (specs, params, parts), is_leaf=lambda x: isinstance(x, PartitionSpec)
    )
    return placed


def _vector(name: str, values: ArrayLike, size: int) -> NDArray[np.float32]:
    vector = np.asarray(values, np.float32)
    if vector.shape != (size,) or not np.isfinite(vector).all():
        raise InvalidInput(f"{name} must be {size} finite numbers, got shape {vector.shape}: {vector.tolist()}")
    return vector


def _plain(state: Any) -> Any:
    """An NNX state as nested dicts of arrays."""
    return nnx.to_pure_dict(state)


def _like(template: Any, plain: Any) -> Any:
    """Nested dicts of arrays as an NNX state; both sort their keys, so the leaves come in one order."""
    return jax.tree.unflatten(jax.tree.structure(template), jax.tree.leaves(plain))


def _reseed(template: Any, key: jax.Array) -> Any:
    """Random streams that start at `key`, a different one for each layer."""
    leaves, structure = jax.tree.flatten(template)
    fresh = [
        jax.random.fold_in(key, position)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        else jnp.zeros(leaf.shape, leaf.dtype)
        for position, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, fresh)
