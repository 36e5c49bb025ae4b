"""Bytes that a strategy needs at least, known before anything is compiled.

A device holds its part of the state, and while a layer runs also what this layer reads and writes. A strategy for which
even that is too much is refused at once: its program would take minutes to compile, or could not be compiled.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import numpy as np

from jaxtrain.config import MeshConfig, TrainConfig
from jaxtrain.learn.step import prepare_batch
from jaxtrain.models.narrow import without_pairs
from jaxtrain.planner.facts import batch_shapes
from jaxtrain.runs.rundir import ModelCard, program_of

__all__ = ["Least", "least_bytes"]

LAYERS = ("conv_general_dilated", "dot_general")
"""Operations of JAX that no compiler runs without their operands and their result in memory."""


@dataclass(frozen=True)
class Least:
    """Bytes that the fullest device needs at least."""

    state: int
    """Parameters and moments."""
    layer: int
    """What the largest layer reads and writes."""

    @property
    def total(self) -> int:
        """All of it, bytes."""
        return self.state + self.layer


def least_bytes(request: Mapping[str, Any], state: int) -> Least:
    """Return what a strategy needs at least.

    Args:
        request: as of `jaxtrain.planner.compiler.answer`.
        state: Bytes of parameters and moments on the fullest device.
    """
    config = TrainConfig.model_validate(request["config"])
    plain = config.model_copy(update={"mesh": MeshConfig(), "run": config.run.model_copy(update={"batch_size": 1})})
    known = {"config": plain.model_dump(mode="json"), "card": request["card"], "dtypes": request["dtypes"]}
    mesh = config.mesh
    windows = config.run.batch_size / mesh.data / (mesh.microbatches if mesh.pipe > 1 else 1)
    parts = mesh.size // mesh.data // mesh.pipe  # at most so many devices share what a layer reads and writes
    return Least(state, int(_largest_layer(json.dumps(known, sort_keys=True)) * windows / parts))


@lru_cache(maxsize=4)
def _largest_layer(text: str) -> int:
    """Return the bytes that the largest layer of a network reads and writes for one window; all meshes share them."""
    request = json.loads(text)
    program = program_of(ModelCard.from_dict(request["card"]), TrainConfig.model_validate(request["config"]))
    key = jax.eval_shape(lambda: jax.random.key(0))

    def forward(params: Any, model_state: Any, batch: Any, key: Any) -> Any:
        images, _ = prepare_batch(program, batch, key, program.mesh)
        return program.apply(params, model_state, images, train=True, key=key)

    shapes = batch_shapes(program, request["dtypes"])
    with without_pairs():  # pairs of columns have kernels of their own, which are no arrays of every machine
        traced = jax.make_jaxpr(forward)(program.shapes.params, program.shapes.model_state, shapes, key)
    weights = {leaf.shape for leaf in jax.tree.leaves(program.shapes.params)}
    return max(map(_moved(weights), _layers(traced.jaxpr)), default=0)


def _moved(weights: set[tuple[int, ...]]) -> Any:
    """Return a function that sums the bytes of an operation's arrays, without parameters: the state has those."""

    def size(equation: Any) -> int:
        arrays = [one.aval for one in (*equation.invars, *equation.outvars)]
        return sum(math.prod(one.shape) * np.dtype(one.dtype).itemsize for one in arrays if one.shape not in weights)

    return size


def _layers(jaxpr: Any) -> Iterator[Any]:
    """Yield the equations of layers, also those of functions that are called inside."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in LAYERS:
            yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, list | tuple) else (value,):
                if hasattr(inner, "eqns"):
                    yield from _layers(inner)
                elif hasattr(inner, "jaxpr") and hasattr(inner.jaxpr, "eqns"):
                    yield from _layers(inner.jaxpr)
