"""The autoencoder squeezes an image through a narrow code and reconstructs it; what it cannot reconstruct is unusual.

It has no skip connections, so that the whole reconstruction passes through the bottleneck; and it learns without labels
(Hinton & Salakhutdinov 2006, doi:10.1126/science.1127647).

Letters in shapes: B sample, H row, W column, C channel, Z code.
"""

from __future__ import annotations

import jax
from flax import nnx

from jaxtrain.config import ModelConfig
from jaxtrain.models.blocks import SMALL, ConvBlock, conv, halve, repeat_nearest, run_block

__all__ = ["Autoencoder", "build_autoencoder"]


class Autoencoder(nnx.Module):
    """`depth` halvings with doubling channels, `code` channels in the code, and the way back."""

    def __init__(self, config: ModelConfig, *, channels: int, rngs: nnx.Rngs, data_shards: int) -> None:
        widths = [config.width << level for level in range(config.depth + 1)]

        def block(inputs: int, outputs: int) -> ConvBlock:
            return ConvBlock(
                inputs, outputs, norm=config.norm, dropout=config.dropout, data_shards=data_shards, residual=True,
                rngs=rngs,
            )  # fmt: skip

        self.encoder = nnx.Dict(
            {f"level{i}": block(channels if i == 0 else widths[i - 1], w) for i, w in enumerate(widths)}
        )
        self.waist = conv(widths[-1], config.code, 1, rngs=rngs)
        self.widen = conv(config.code, widths[-1], 1, rngs=rngs)
        self.up = nnx.Dict({f"level{i}": conv(widths[i + 1], widths[i], 1, rngs=rngs) for i in range(config.depth)})
        self.decoder = nnx.Dict({f"level{i}": block(widths[i], widths[i]) for i in range(config.depth)})
        self.head = conv(widths[0], channels, 1, rngs=rngs, init=SMALL)
        self.depth, self.remat = config.depth, config.remat

    def embed(self, x_BHWC: jax.Array, *, train: bool = False) -> jax.Array:
        """Return the code, (B, H / 2^depth, W / 2^depth, Z)."""
        for level in range(self.depth + 1):
            x_BHWC = halve(x_BHWC) if level else x_BHWC
            x_BHWC = run_block(self.encoder[f"level{level}"], x_BHWC, train=train, remat=self.remat)
        code_BHWZ: jax.Array = self.waist(x_BHWC)
        return code_BHWZ

    def __call__(self, x_BHWC: jax.Array, *, train: bool) -> jax.Array:
        y_BHWC = self.widen(self.embed(x_BHWC, train=train))
        for level in reversed(range(self.depth)):
            y_BHWC = repeat_nearest(self.up[f"level{level}"](y_BHWC))
            y_BHWC = run_block(self.decoder[f"level{level}"], y_BHWC, train=train, remat=self.remat)
        given_back_BHWC: jax.Array = self.head(y_BHWC)
        return given_back_BHWC


def build_autoencoder(
    config: ModelConfig, *, channels: int, classes: int, rngs: nnx.Rngs, data_shards: int
) -> nnx.Module:
    """Build the network `autoencoder`: it answers with as many channels as it takes."""
    return Autoencoder(config, channels=channels, rngs=rngs, data_shards=data_shards)
