"""A plain fully convolutional network at full resolution: the baseline that a U-Net must beat.

`depth` blocks of two 3 × 3 convolutions without halving; each pixel is judged by a window of `4 * depth + 1` pixels.
The one skip leads from the image to the last layer: norms forget the level of an image, and reflectance is evidence.
"""

from __future__ import annotations

import jax
from flax import nnx

from jaxtrain.config import ModelConfig
from jaxtrain.models.blocks import SMALL, ConvBlock, conv
from jaxtrain.models.units import Carry, Unit, halves

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
        self.skip = conv(channels, config.width, 1, rngs=rngs)
        self.head = conv(config.width, classes, 1, rngs=rngs, init=SMALL)
        self.depth = config.depth

    def __call__(self, x_BHWC: jax.Array, *, train: bool) -> jax.Array:
        y_BHWC = x_BHWC
        for i in range(self.depth):
            y_BHWC = self.body[f"block{i}"](y_BHWC, train=train)
        logits_BHWK: jax.Array = self.head(nnx.relu(y_BHWC + self.skip(x_BHWC)))
        return logits_BHWK

    def units(self) -> list[Unit]:
        """The pieces that a pipeline may cut between; the image travels along for the skip to the last layer."""
        found = []
        for i in range(self.depth):
            found += halves(f"body/block{i}", self.body[f"block{i}"], tuple if i else lambda carry: carry * 2)

        def leave(carry: Carry, train: bool) -> Carry:
            y, image = carry
            return (self.head(nnx.relu(y + self.skip(image))),)

        return [*found, Unit("head", ("skip", "head"), leave)]


def build_cnn(config: ModelConfig, *, channels: int, classes: int, rngs: nnx.Rngs, data_shards: int) -> nnx.Module:
    """The builder of `MODELS["cnn"]`."""
    return CNN(config, channels=channels, classes=classes, rngs=rngs, data_shards=data_shards)
