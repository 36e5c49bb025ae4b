"""Run a network in the precision of the configuration.

bfloat16 halves the bytes of activations and doubles the rate of matrix units. Parameters stay float32 in the state
and are cast where they are used, so small updates are not lost; norms take their moments in float32; logits leave as
float32, so the loss and all metrics are computed in it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtrain.config import ModelConfig

__all__ = ["run_model", "set_precision"]


def run_model(model: Any, x: Any, *, train: bool, config: ModelConfig) -> jax.Array:
    """Return the network's logits, float32; called where its state is traced.

    Args:
        model: A merged module, whose parameters are float32.
        x: Normalised float32 input; of several modalities a dict.
        train: The argument `train` of the network.
        config: Gives `precision`.
    """
    logits: jax.Array = model(set_precision(model, x, config), train=train)
    return logits.astype(jnp.float32)


def set_precision(model: Any, x: Any, config: ModelConfig) -> Any:
    """Set a merged module's layers to the precision of the configuration; return the image, or all of a dict, in it."""
    if config.precision == "bfloat16":
        for _, layer in nnx.iter_modules(model):
            # convolutions and dense layers cast their own input, kernel and bias; norms keep float32 parameters
            if isinstance(layer, nnx.Conv | nnx.Linear):
                layer.dtype = jnp.bfloat16
        x = jax.tree.map(lambda array: array.astype(jnp.bfloat16), x)
    return x
