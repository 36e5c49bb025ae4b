"""`Dropout` hides features at random in training; its rate may be an argument of a compiled step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

__all__ = ["Dropout", "dropout_rate"]

_RATE: ContextVar[Any] = ContextVar("rate", default=None)


@contextmanager
def dropout_rate(rate: Any) -> Iterator[None]:
    """Run a block in which every `Dropout` has this rate, a number or an argument of a function that JAX traces."""
    token = _RATE.set(rate)
    try:
        yield
    finally:
        _RATE.reset(token)


class Dropout(nnx.Dropout):
    """`flax.nnx.Dropout` of a rate above 0 and below 1 that may be traced.

    Flax compares the rate with 0 and 1 in Python, which a traced number does not allow.
    """

    def __call__(self, inputs: jax.Array, *, deterministic: bool | None = None, rngs: Any = None) -> jax.Array:
        if deterministic:  # not by Flax, whose method a translator into ONNX replaces by one of fewer arguments
            return inputs
        rate = _RATE.get()
        made_with = rate is None or (not isinstance(rate, jax.Array) and rate == self.rate)
        if made_with:
            kept: jax.Array = super().__call__(inputs, deterministic=deterministic, rngs=rngs)
            return kept
        shape = [1 if axis in self.broadcast_dims else size for axis, size in enumerate(inputs.shape)]
        keep = jnp.float32(1) - rate
        mask = jnp.broadcast_to(jax.random.bernoulli(self.rngs(), p=keep, shape=shape), inputs.shape)
        return jnp.where(mask, inputs / keep.astype(inputs.dtype), jnp.zeros_like(inputs))
