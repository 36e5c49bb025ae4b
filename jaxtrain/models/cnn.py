"""Plain convolutional networks as baselines: one prediction for each pixel, or one for each image.

Per pixel it is fully convolutional at full resolution: the baseline that a U-Net must beat. `depth` blocks of two 3 × 3
convolutions without halving; each pixel is predicted from a window of `4 * depth + 1` pixels.
The one skip leads from the image to the last layer: norms forget the level of an image, and reflectance is evidence.

Per image it is the classic of LeCun et al. (1998), "Gradient-based learning applied to document recognition", with
today's parts: `depth` times a 5 × 5 convolution, relu and a maximum over 2 × 2 pixels, then two dense layers. The means
over the image take the place of a position, so images of any size do.
"""

from __future__ import annotations

import jax
from flax import nnx

from jaxtrain.config import ModelConfig
from jaxtrain.models.blocks import HE, SMALL, ConvBlock, conv, halve, run_block
from jaxtrain.models.dropout import Dropout
from jaxtrain.models.units import Carry, Unit, halves

__all__ = ["CNN", "LeNet", "build_cnn", "build_lenet"]


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
        self.depth, self.remat = config.depth, config.remat

    def __call__(self, x_BHWC: jax.Array, *, train: bool) -> jax.Array:
        y_BHWC = x_BHWC
        for i in range(self.depth):
            y_BHWC = run_block(self.body[f"block{i}"], y_BHWC, train=train, remat=self.remat)
        logits_BHWK: jax.Array = self.head(nnx.relu(y_BHWC + self.skip(x_BHWC)))
        return logits_BHWK

    def units(self) -> list[Unit]:
        """Return the pieces between which a pipeline may cut; the image is carried to the skip of the last layer."""
        found = []
        for i in range(self.depth):
            found += halves(f"body/block{i}", self.body[f"block{i}"], tuple if i else lambda carry: carry * 2)

        def leave(carry: Carry, train: bool) -> Carry:
            y, image = carry
            return (self.head(nnx.relu(y + self.skip(image))),)

        return [*found, Unit("head", ("skip", "head"), leave)]


def build_cnn(config: ModelConfig, *, channels: int, classes: int, rngs: nnx.Rngs, data_shards: int) -> nnx.Module:
    """Build the network `MODELS["cnn"]`."""
    return CNN(config, channels=channels, classes=classes, rngs=rngs, data_shards=data_shards)


class LeNet(nnx.Module):
    """`depth` × (conv 5 × 5, relu, halve) with doubling channels, mean, dense, relu, dropout, dense: (B, K)."""

    def __init__(self, config: ModelConfig, *, channels: int, classes: int, rngs: nnx.Rngs) -> None:
        widths = [channels, *(config.width << i for i in range(config.depth))]
        self.depth = config.depth
        self.body = nnx.Dict(
            {f"conv{i + 1}": conv(widths[i], widths[i + 1], 5, rngs=rngs) for i in range(config.depth)}
        )
        self.dense = nnx.Linear(widths[-1], 2 * widths[-1], kernel_init=HE, rngs=rngs)
        self.dropout = Dropout(config.dropout, rngs=rngs) if config.dropout else None
        self.head = nnx.Linear(2 * widths[-1], classes, kernel_init=SMALL, rngs=rngs)

    def __call__(self, x_BHWC: jax.Array, *, train: bool) -> jax.Array:
        for i in range(self.depth):
            x_BHWC = halve(nnx.relu(self.body[f"conv{i + 1}"](x_BHWC)))
        y_BC = nnx.relu(self.dense(x_BHWC.mean(axis=(1, 2))))
        if self.dropout is not None:
            y_BC = self.dropout(y_BC, deterministic=not train)
        logits_BK: jax.Array = self.head(y_BC)
        return logits_BK


def build_lenet(config: ModelConfig, *, channels: int, classes: int, rngs: nnx.Rngs, data_shards: int) -> nnx.Module:
    """Build the network `cnn` for images."""
    return LeNet(config, channels=channels, classes=classes, rngs=rngs)
