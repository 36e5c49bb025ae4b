"""Add up the gradients of several batches, and divide once: one update, as of one large batch.

A loss is a mean over labelled pixels, and batches differ in how many they have. So sums of gradients and sums of
weights are kept, and only their quotient is the gradient of the batches together; a mean of means would give a batch of
few labels the weight of a full one. The last batches of a run make an update of their own where they are fewer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

__all__ = ["UNKNOWN", "Accumulated", "accumulate"]

UNKNOWN = -1.0
"""Weight in the state of a checkpoint that has none: `acc_grads` then holds a mean of means (release 0.1.0)."""


class Accumulated(NamedTuple):
    """The state between updates; its first names are those of `optax.MultiStepsState`, as in earlier checkpoints."""

    mini_step: jax.Array
    """Batches since the last update."""
    gradient_step: jax.Array
    """Updates so far."""
    inner_opt_state: Any
    acc_grads: Any
    """Sum of the gradients since the last update."""
    weight: jax.Array
    """Sum of their weights, or `UNKNOWN`."""


def accumulate(inner: optax.GradientTransformation, every: int) -> optax.GradientTransformationExtraArgs:
    """Return a transformation that makes one update of `every` batches, and zeros in between.

    Its update takes, by name, `weight` (the sum of the weights of the labelled pixels of the batch; the gradient is
    that of the sum of their losses) and `last` (no batch follows, so what was added up is used now).
    """

    def init(params: Any) -> Accumulated:
        zero = jnp.zeros((), jnp.int32)
        sums = optax.tree.zeros_like(params, dtype=jnp.float32)
        return Accumulated(zero, zero, inner.init(params), sums, jnp.zeros((), jnp.float32))

    def update(
        updates: Any, state: Accumulated, params: Any = None, *, weight: Any = 1.0, last: Any = False, **_: Any
    ) -> tuple[Any, Accumulated]:
        now = jnp.asarray(weight, jnp.float32)
        # the batches before weigh as much as this one, where all that is known of them is their mean
        assumed = state.mini_step.astype(jnp.float32) * now
        of_mean = state.weight < 0
        before = jnp.where(of_mean, assumed, state.weight)
        sums = jax.tree.map(
            lambda total, new: jnp.where(of_mean, total * assumed, total) + new.astype(jnp.float32),
            state.acc_grads,
            updates,
        )
        total = before + now
        emit = (state.mini_step == every - 1) | jnp.asarray(last, bool)
        divisor = jnp.where(total > 0, total, jnp.float32(1))
        mean = jax.tree.map(lambda leaf, of: (leaf / divisor).astype(of.dtype), sums, updates)
        made, moved = inner.update(mean, state.inner_opt_state, params)
        return jax.tree.map(lambda leaf: jnp.where(emit, leaf, jnp.zeros_like(leaf)), made), Accumulated(
            jnp.where(emit, 0, state.mini_step + 1),
            state.gradient_step + emit.astype(jnp.int32),
            jax.tree.map(lambda old, new: jnp.where(emit, new, old).astype(old.dtype), state.inner_opt_state, moved),
            jax.tree.map(lambda leaf: jnp.where(emit, jnp.zeros_like(leaf), leaf), sums),
            jnp.where(emit, jnp.float32(0), total),
        )

    return optax.GradientTransformationExtraArgs(init, update)
