"""The two programs of a replica: one adds the gradient of a chunk to a sum, one applies the sum of a whole batch.

A chunk is a fixed number of windows of the global batch, in the order of its samples. All that is random (turns,
mixtures, dropout) is drawn from the key of the step and the number of the chunk. So what a chunk adds does not depend
on the replica that computes it, and any shares give the same update but for the order of float32 sums:

    gradient = Σ over chunks of Σ over pixels of w · ∂loss  ÷  Σ over chunks of Σ over pixels of w

Both programs have one shape, whatever the share, so nothing is compiled after the first step. The sum is one flat
vector: it stays on the device from chunk to chunk, is copied to the host once a step, and is what replicas exchange.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from jaxtrain.learn.losses import LossTerms
from jaxtrain.learn.state import Program, TrainState
from jaxtrain.learn.step import Batch, batch_shardings, differentiate, update_state
from jaxtrain.parallel.mesh import replicated

__all__ = ["SUMS", "ChunkPrograms", "make_chunk_programs", "pack_state", "unpack_state"]

SUMS = ("loss", "weight", "labelled", "right")
"""Names of the sums of a chunk beside its gradient."""

Vector = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ChunkPrograms:
    """The compiled programs of one replica; made by `make_chunk_programs`.

    Attributes:
        size: Length of the vector: all parameters, then all batch statistics.
        jitted_chunk: The program of a chunk, for counting compilations.
        jitted_apply: The program of an update, likewise.
    """

    program: Program
    size: int
    names: tuple[str, ...]
    jitted_chunk: Any
    jitted_apply: Any

    def zeros(self) -> jax.Array:
        """Return the first buffer of the sum; a step that starts again overwrites it."""
        made: jax.Array = jax.device_put(np.zeros(self.size, np.float32), replicated(self.program.mesh))
        return made

    def add_chunk(
        self, vector: jax.Array, state: TrainState, batch: Batch, *, key: jax.Array, number: int, first: bool
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Add the gradient of chunk `number`; return the vector and the sums of the chunk.

        Args:
            vector: The sum so far, which is donated.
            state: The state before the step.
            batch: The windows of the chunk.
            key: Random key of the step.
            number: Number of the chunk in the global batch.
            first: Whether the sum begins with this chunk.
        """
        arrays = {name: batch[name] for name in self.names}
        result: tuple[jax.Array, dict[str, jax.Array]] = self.jitted_chunk(
            vector, state.params, state.model_state, arrays, key, np.int32(number), np.bool_(first)
        )
        return result

    def apply(
        self, state: TrainState, vector: Vector, sums: Mapping[str, float], chunks: int
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """Update the state, which is donated, by the sums of all chunks; return metrics as a train step does.

        Args:
            state: The state before the step.
            vector: Sum over all chunks.
            sums: Sums of `SUMS` over all chunks.
            chunks: Number of chunks in the batch.
        """
        numbers: dict[str, Any] = {name: np.float32(sums[name]) for name in ("loss", "weight", "right")}
        labelled = sums["labelled"]
        numbers["labelled"] = np.int32(labelled) if math.isfinite(labelled) else np.int32(0)
        result: tuple[TrainState, dict[str, jax.Array]] = self.jitted_apply(state, vector, numbers, np.float32(chunks))
        return result

    def compiled(self) -> int:
        """Return how often the two programs were compiled; two of a run in which nothing changes shape."""
        return int(self.jitted_chunk._cache_size() + self.jitted_apply._cache_size())


def make_chunk_programs(program: Program) -> ChunkPrograms:
    """Make the programs of a replica for the mesh of its own devices."""
    whole, lies = replicated(program.mesh), batch_shardings(program)
    shapes = (program.shapes.params, program.shapes.model_state)
    leaves, structure = jax.tree.flatten(shapes)
    ends = np.cumsum([math.prod(leaf.shape) for leaf in leaves]).tolist()
    accumulating = program.config.optim.accumulate > 1

    def add(
        vector: jax.Array, params: Any, model_state: Any, batch: dict[str, Any], key: jax.Array, number: jax.Array,
        first: jax.Array,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:  # fmt: skip
        key = jax.random.fold_in(key, number)
        gradient, terms, right, after = differentiate(program, params, model_state, batch, key, of_sum=True)
        flat = jnp.concatenate([leaf.astype(jnp.float32).reshape(-1) for leaf in jax.tree.leaves((gradient, after))])
        sums = {"loss": terms.loss, "weight": terms.weight, "labelled": terms.labelled, "right": right}
        return jnp.where(first, jnp.float32(0), vector) + flat, sums

    def apply(
        state: TrainState, vector: jax.Array, sums: dict[str, jax.Array], chunks: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        parts = [
            vector[end - math.prod(leaf.shape) : end].reshape(leaf.shape)
            for leaf, end in zip(leaves, ends, strict=True)
        ]
        gradient, statistics = jax.tree.unflatten(structure, parts)
        if not accumulating:
            divisor = jnp.where(sums["weight"] > 0, sums["weight"], jnp.float32(1))
            gradient = jax.tree.map(lambda leaf: leaf / divisor, gradient)
        # running statistics are the mean of what each chunk alone would make of them
        statistics = jax.tree.map(lambda leaf: leaf / chunks, statistics)
        terms = LossTerms(sums["loss"], sums["weight"], sums["labelled"])
        return update_state(program, state, gradient, terms, sums["right"], statistics)

    state = program.shardings
    return ChunkPrograms(
        program=program,
        size=int(ends[-1]),
        names=tuple(lies),
        jitted_chunk=jax.jit(
            add,
            in_shardings=(whole, state.params, state.model_state, lies, whole, whole, whole),
            out_shardings=(whole, whole),
            donate_argnums=0,
        ),
        jitted_apply=jax.jit(
            apply, in_shardings=(state, whole, whole, whole), out_shardings=(state, whole), donate_argnums=0
        ),
    )


def pack_state(state: TrainState) -> bytes:
    """Return the bytes of all arrays of a state, one after the other, little-endian."""
    arrays = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
    return b"".join(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes() for array in arrays)


def unpack_state(program: Program, data: bytes | bytearray | memoryview) -> TrainState:
    """Place the arrays of `pack_state` on the devices of a program.

    Raises:
        ValueError: The number of bytes is not that of the program's state.
    """
    leaves, structure = jax.tree.flatten(program.shapes)
    places = jax.tree.leaves(program.shardings)
    expected = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
    if len(data) != expected:
        raise ValueError(f"a state of this network has {expected} bytes, got {len(data)}")
    placed, at = [], 0
    for leaf, where in zip(leaves, places, strict=True):
        count = math.prod(leaf.shape)
        array = np.frombuffer(data, leaf.dtype.newbyteorder("<"), count, at).astype(leaf.dtype).reshape(leaf.shape)
        # a copy of its own: JAX may take an array of the host over, and this one goes on being used
        placed.append(jax.device_put(array.copy(), where))
        at += count * leaf.dtype.itemsize
    state: TrainState = jax.tree.unflatten(structure, placed)
    return state
