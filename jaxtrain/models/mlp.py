"""Perceptrons are baselines that see no neighbourhood, or no position.

Per pixel, each pixel's spectrum goes through `depth` dense layers. Per image, the mean and the spread of each band do:
what a network that looks at shapes must beat.

Letters in shapes: B sample, H row, W column, C channel, K class.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtrain.config import ModelConfig
from jaxtrain.models.blocks import HE, SMALL
from jaxtrain.models.dropout import Dropout

__all__ = ["MLP", "ImageMLP", "build_image_mlp", "build_pixel_mlp"]


class MLP(nnx.Module):
    """`depth` dense layers of `width` units with relu and dropout, then the logits; acts on the last axis.

    In each pair `linear1` may be split by its outputs and `linear2` by its inputs (`mesh.rules`).
    """

    def __init__(self, config: ModelConfig, *, channels: int, classes: int, rngs: nnx.Rngs) -> None:
        self.depth = config.depth
        self.layers = nnx.Dict(
            {
                f"linear{i + 1}": nnx.Linear(config.width if i else channels, config.width, kernel_init=HE, rngs=rngs)
                for i in range(config.depth)
            }
        )
        self.dropout = Dropout(config.dropout, rngs=rngs) if config.dropout else None
        self.head = nnx.Linear(config.width, classes, kernel_init=SMALL, rngs=rngs)

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        for i in range(self.depth):
            x = nnx.relu(self.layers[f"linear{i + 1}"](x))
            if self.dropout is not None:
                x = self.dropout(x, deterministic=not train)
        logits: jax.Array = self.head(x)
        return logits


class ImageMLP(nnx.Module):
    """An MLP on the mean and the standard deviation of each band over the image: (B, H, W, C) → (B, K)."""

    def __init__(self, config: ModelConfig, *, channels: int, classes: int, rngs: nnx.Rngs) -> None:
        self.mlp = MLP(config, channels=2 * channels, classes=classes, rngs=rngs)

    def __call__(self, x_BHWC: jax.Array, *, train: bool) -> jax.Array:
        mean_BC = x_BHWC.mean(axis=(1, 2))
        # a floor under the root: its gradient at 0, a flat image, is infinite
        spread_BC = jnp.sqrt(
            jnp.square(x_BHWC - mean_BC[:, None, None]).mean(axis=(1, 2)) + jnp.asarray(1e-6, x_BHWC.dtype)
        )
        logits: jax.Array = self.mlp(jnp.concatenate([mean_BC, spread_BC], axis=-1), train=train)
        return logits


def build_pixel_mlp(
    config: ModelConfig, *, channels: int, classes: int, rngs: nnx.Rngs, data_shards: int
) -> nnx.Module:
    """Build the network `mlp` for pixels."""
    return MLP(config, channels=channels, classes=classes, rngs=rngs)


def build_image_mlp(
    config: ModelConfig, *, channels: int, classes: int, rngs: nnx.Rngs, data_shards: int
) -> nnx.Module:
    """Build the network `mlp` for images."""
    return ImageMLP(config, channels=channels, classes=classes, rngs=rngs)
