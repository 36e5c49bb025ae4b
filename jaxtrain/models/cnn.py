"""A plain fully convolutional network at full resolution: the baseline that a U-Net must beat.

`depth` blocks of two 3 × 3 convolutions, no halving and no skip; it sees `4 * depth + 1` pixels around each pixel.
"""

from __future__ import annotations

import jax
from flax import nnx

from jaxtrain.config import ModelConfig
from jaxtrain.models.blocks import SMALL, ConvBlock, conv

__all__ = ["CNN", "build_cnn"]


class CNN(nnx.Module):
    """`depth` blocks of `width` channels, then a 1 × 1 convolution."""

    def __init__(self, config: ModelConfig, *, channels: int, classes: int, rngs: nnx.Rngs, data_shards: int) -> None:
        self.body = nnx.Dict(
            {
                f"block{i}": ConvBlock(
                    config.width if i else channels,
                    config.width,
                    norm=config.norm,
                    dropout=config.dropout,
                    data_shards=data_shards,
                    residual=False,
                    rngs=rngs,
                )
                for i in range(config.depth)
            }
        )
        self.head = conv(config.width, classes, 1, rngs=rngs, init=SMALL)
        self.depth = config.depth

    def __call__(self, x_BHWC: jax.Array, *, train: bool) -> jax.Array:
        for i in range(self.depth):
            x_BHWC = self.body[f"block{i}"](x_BHWC, train=train)
        logits_BHWK: jax.Array = self.head(x_BHWC)
        return logits_BHWK


def build_cnn(config: ModelConfig, *, channels: int, classes: int, rngs: nnx.Rngs, data_shards: int) -> nnx.Module:
    """The builder of `MODELS["cnn"]`."""
    return CNN(config, channels=channels, classes=classes, rngs=rngs, data_shards=data_shards)
